"""Function calls in generated text: find the first complete one, stop there, check it against its schema.

Design choices:
- The parser is a character automaton fed by a stream: it knows at every character whether the call is complete.
  Brace loops and whatever else follows the first complete object are never read.
- It translates while it scans: a single-quoted JSON text becomes the JSON value itself, so one `json.loads` at the
  end decides what is valid.
- Text that starts like a call and is none is recorded, and searched again as plain text from behind its marker.
- Nothing here runs a function, fetches a schema or trusts a field: a call is data, with a report of what is wrong
  with it.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagewise.data.tool_format import (
    CALL_MARKER,
    render_call,
    render_request,
    render_response,
    render_tools,
    standard_tool,
)

__all__ = [
    "CallReport",
    "ToolCall",
    "ToolCallParser",
    "check_call",
    "first_call",
    "render_call",
    "render_request",
    "render_response",
    "render_tools",
    "standard_tool",
]

MAX_DEPTH = 64  # nesting beyond this is a loop, not a call
MAX_CHARACTERS = 1 << 14  # of one call
OUTSIDE_STRINGS = set(
    " \t\r\n,:+-.0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)  # NaN and the like: named when decoded


@dataclass(frozen=True)
class ToolCall:
    """One function call as emitted: its name, its decoded arguments and the exact source text, marker included."""

    name: str
    arguments: dict[str, Any]
    source: str

    def render(self) -> str:
        """The call in the trained format."""
        return render_call(self.name, self.arguments)


@dataclass(frozen=True)
class CallReport:
    """What a check found. `invented` and `missing` are dotted paths; `errors` are sentences. `valid` means: safe to
    dispatch as far as the schema can tell.
    """

    known: bool
    invented: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        return self.known and not (self.invented or self.missing or self.errors)


class _Malformed(Exception):
    pass


class _CallScanner:
    """Reads the object after the marker, one character at a time, and writes plain JSON.

    `stack` holds the open brackets; a quote ``'`` on it is a single-quoted JSON text. Inside such a text an apostrophe
    is a plain character, but ends the text once the JSON value in it is complete.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []
        self.json: list[str] = []
        self.string: str = ""  # the quote that opened the string being read, or ""
        self.escaped = False
        self.undecided = False  # after an opening ' : a JSON text or a plain string?
        self.closed_text = False  # the value inside a quoted text is complete
        self.count = 0

    def push(self, char: str) -> bool:
        """Take one character; True when it completes the object. Raises _Malformed."""
        self.count += 1
        if self.count > MAX_CHARACTERS:
            raise _Malformed(f"longer than {MAX_CHARACTERS} characters")
        if self.undecided:
            if char in " \t\r\n":
                return False
            self.undecided = False
            if char in "{[":
                self.stack.append("'")
            else:
                self.string = "'"
                self.json.append('"')
        if self.string:
            self._in_string(char)
            return False
        if self.closed_text:
            if char in " \t\r\n":
                return False
            if char != "'":
                raise _Malformed("text after the quoted arguments")
            self.closed_text = False
            self.stack.pop()
            return False
        return self._structure(char)

    def _in_string(self, char: str) -> None:
        if self.escaped:
            self.escaped = False
            self.json.append(char if char == "'" else "\\" + char)
        elif char == "\\":
            self.escaped = True
        elif char == self.string:
            self.string = ""
            self.json.append('"')
        elif char == '"':  # inside a plain single-quoted string
            self.json.append('\\"')
        else:
            self.json.append(char)

    def _structure(self, char: str) -> bool:
        if char == '"':
            self.string = '"'
            self.json.append(char)
        elif char == "'":
            if "'" in self.stack:
                raise _Malformed("a quote inside quoted arguments")
            self.undecided = True
        elif char in "{[":
            if len(self.stack) >= MAX_DEPTH:
                raise _Malformed(f"nested deeper than {MAX_DEPTH}")
            self.stack.append(char)
            self.json.append(char)
        elif char in "}]":
            if not self.stack or self.stack[-1] != {"}": "{", "]": "["}[char]:
                raise _Malformed(f"unexpected {char!r}")
            self.stack.pop()
            self.json.append(char)
            if not self.stack:
                return True
            self.closed_text = self.stack[-1] == "'"
        elif char in OUTSIDE_STRINGS:
            self.json.append(char)
        else:
            raise _Malformed(f"{char!r} outside a string")
        return False


class ToolCallParser:
    """Finds the first complete call in a stream of text.

    Feed it pieces of any size. `call` is None until a call is complete; from then on everything fed is ignored.
    `text` is the plain text seen before the call (a possible beginning of a marker is held back until it is decided);
    `rejected` lists why texts that began like a call were none.
    """

    def __init__(self) -> None:
        self.call: ToolCall | None = None
        self.text = ""
        self.rejected: list[str] = []
        self._held = ""  # a prefix of the marker
        self._source: list[str] | None = None  # characters since the marker; None while searching
        self._scanner: _CallScanner | None = None

    @property
    def pending(self) -> bool:
        """Whether a call has begun and is not complete."""
        return self._source is not None

    def feed(self, piece: str) -> ToolCall | None:
        """Read `piece`; returns the call once it is complete."""
        queue = deque(piece)
        while queue and self.call is None:
            queue.extendleft(reversed(self._take(queue.popleft())))
        return self.call

    def close(self) -> ToolCall | None:
        """The stream has ended: held-back text is text, an unfinished call is rejected. Returns the call, if there was
        one.
        """
        while self._source is not None:
            self.feed(self._reject("the text ended inside the call"))
        self.text += self._held
        self._held = ""
        return self.call

    def _take(self, char: str) -> str:
        """Read one character; returns text to read again."""
        if self._source is None:
            self._search(char)
            return ""
        self._source.append(char)
        try:
            if self._scanner is None:
                if char in " \t\r\n" and len(self._source) < MAX_CHARACTERS:
                    return ""
                if char != "{":
                    raise _Malformed("no object after the marker")
                self._scanner = _CallScanner()
            if self._scanner.push(char):
                self.call = _read_call("".join(self._scanner.json), CALL_MARKER + "".join(self._source))
                self._source = self._scanner = None
        except _Malformed as error:
            return self._reject(str(error))
        return ""

    def _search(self, char: str) -> None:
        held = self._held + char
        while held and not CALL_MARKER.startswith(held):
            self.text += held[0]
            held = held[1:]
        self._held = held
        if held == CALL_MARKER:
            self._held, self._source = "", []

    def _reject(self, reason: str) -> str:
        """Drop the call being read: its marker is text, what followed is to be read again. Each pass consumes a
        marker, so this ends.
        """
        self.rejected.append(reason)
        again = "".join(self._source or [])
        self._source = self._scanner = None
        self.text += CALL_MARKER
        return again


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise _Malformed("a field is given twice")
    return out


def _constant(name: str) -> Any:
    raise _Malformed(f"{name} is no JSON number")


def _decode(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, strict=False)
    except (ValueError, RecursionError) as error:
        raise _Malformed(f"not JSON: {error}") from None


def _read_call(text: str, source: str) -> ToolCall:
    value = _decode(text)
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise _Malformed("no function name")
    arguments = value.get("arguments", {})
    if isinstance(arguments, str):  # quoted as a JSON string
        arguments = _decode(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise _Malformed("the arguments are no object")
    return ToolCall(name, arguments, source)


def first_call(text: str) -> ToolCall | None:
    """The first complete call in `text`, or None."""
    parser = ToolCallParser()
    parser.feed(text)
    return parser.close()


def parse_stream(pieces: Iterable[str]) -> Iterator[str | ToolCall]:
    """Plain text as it becomes certain, then the call if one comes; reading stops there."""
    parser, shown = ToolCallParser(), 0
    for piece in pieces:
        call = parser.feed(piece)
        if len(parser.text) > shown:
            yield parser.text[shown:]
            shown = len(parser.text)
        if call is not None:
            yield call
            return
    parser.close()
    if len(parser.text) > shown:
        yield parser.text[shown:]


def check_call(call: ToolCall, tools: Sequence[Mapping[str, Any]]) -> CallReport:
    """Check a call against the tools it was offered.

    An object with declared properties admits no others unless its schema says ``additionalProperties``. Needs
    jsonschema. Raises ValueError when a tool's own schema is unusable.
    """
    known = {tool["name"]: tool for tool in map(standard_tool, tools)}
    if call.name not in known:
        return CallReport(
            False, errors=[f"unknown function {call.name!r}; offered: {', '.join(sorted(known)) or 'none'}"]
        )
    schema = known[call.name]["parameters"]
    validator = _validator(call.name, schema)
    invented = list(_invented(call.arguments, schema, ""))
    missing, errors = [], []
    try:
        for error in validator.iter_errors(call.arguments):
            where = ".".join(str(part) for part in error.absolute_path)
            if error.validator == "required":
                absent = [key for key in error.validator_value if key not in error.instance]
                missing += [f"{where}.{key}" if where else key for key in absent]
            elif error.validator == "additionalProperties" and any(
                path.rpartition(".")[0] == where for path in invented
            ):
                continue
            else:
                errors.append(f"{where or 'arguments'}: {error.message}")
    except Exception as error:  # an unresolvable $ref or a broken pattern shows up only while validating
        raise ValueError(f"tool {call.name!r}: its schema cannot be used: {error}") from None
    return CallReport(True, invented, sorted(set(missing)), errors)


def _validator(name: str, schema: Mapping[str, Any]) -> Any:
    try:
        import jsonschema
        from referencing import Registry
    except ImportError:
        raise ValueError("checking tool calls needs jsonschema: pip install 'stagewise[tools]'") from None
    try:
        jsonschema.Draft202012Validator.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"tool {name!r}: 'parameters' is no valid JSON Schema: {error.message}") from None
    return jsonschema.Draft202012Validator(schema, registry=Registry())  # an empty registry: nothing is ever fetched


def _invented(value: Any, schema: Any, path: str) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    if isinstance(value, dict):
        properties = schema.get("properties")
        declared = properties if isinstance(properties, Mapping) else {}
        closed = (
            "additionalProperties" not in schema and "patternProperties" not in schema and (bool(declared) or not path)
        )
        closed = closed or schema.get("additionalProperties") is False
        closed = closed and not any(key in schema for key in ("$ref", "anyOf", "oneOf", "allOf"))
        for key, item in value.items():
            where = f"{path}.{key}" if path else key
            if key in declared:
                yield from _invented(item, declared[key], where)
            elif closed:
                yield where
    elif isinstance(value, list) and isinstance(schema.get("items"), Mapping):
        for index, item in enumerate(value):
            yield from _invented(item, schema["items"], f"{path}.{index}")
