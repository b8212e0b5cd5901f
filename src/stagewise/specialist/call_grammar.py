"""Grammars of function calls: what a model may write so that every call fits its schema.

Design choices:
- The text is the trained format to the letter: fields in the order of the schema, ", " and ": " between them, an
  apostrophe in the quoted arguments as ``\\'``.
- Everything is bounded (string lengths, digits, items), so a call ends; an unbounded grammar leaves a weak model
  inside a string until its tokens run out.
- What this file cannot write as bounded rules (patterns, references, ranges) is handed to llguidance's own JSON Schema
  compiler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagewise.data.tool_format import CALL_MARKER, standard_tool

MODES = ("call", "auto")
SEPARATORS = (", ", ": ")  # of JSON as it is trained
COMPILER_OPTIONS = {"item_separator": SEPARATORS[0], "key_separator": SEPARATORS[1], "whitespace_flexible": False}
NOT_BOUNDED = (
    "$ref",
    "allOf",
    "oneOf",
    "not",
    "if",
    "pattern",
    "format",
    "prefixItems",
    "contains",
    "patternProperties",
)
RANGES = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")


@dataclass
class CallGrammar:
    """Builds the Lark grammar of calls to some tools. Limits apply where a schema sets none of its own.

    `mode`: call (a call must come) or auto (a call, or a text without one).
    """

    tools: Sequence[Mapping[str, Any]]
    mode: str = "call"
    max_string: int = 64
    max_items: int = 8
    max_text: int = 400
    rules: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode {self.mode!r} must be one of {', '.join(MODES)}")
        if not self.tools and self.mode == "call":
            raise ValueError("a call needs at least one tool")
        self.standard = [standard_tool(tool) for tool in self.tools]

    def lark(self) -> str:
        """The grammar as text."""
        self.rules = []
        heads = []
        for index, tool in enumerate(self.standard):
            name = json.dumps(tool["name"], ensure_ascii=False)
            arguments = self._value(tool["parameters"], tool["parameters"])
            opening = f'{CALL_MARKER} {{"name": {name}, "arguments": \''
            self.rules.append(f"call_{index}: {_literal(opening)} {arguments} {_literal(chr(39) + '}')}")
            heads.append(f"call_{index}")
        if self.mode == "auto":
            self.rules.append(f"plain: /([^<]|<[^f]){{1,{self.max_text}}}/")
            heads.append("plain")
        return "\n".join([f"start: {' | '.join(heads)}", *self.rules]) + "\n"

    def _rule(self, body: str) -> str:
        name = f"v{len(self.rules)}"
        self.rules.append(f"{name}: {body}")
        return name

    def _compiled(self, schema: Any, root: Any) -> str:
        whole = dict(schema) if isinstance(schema, Mapping) else {}
        for key in ("$defs", "definitions"):
            if isinstance(root, Mapping) and key in root:
                whole.setdefault(key, root[key])
        return self._rule(f"%json {json.dumps({**whole, 'x-guidance': COMPILER_OPTIONS})}")

    def _value(self, schema: Any, root: Any) -> str:
        """The name of a rule for values of `schema`."""
        if not isinstance(schema, Mapping) or any(key in schema for key in NOT_BOUNDED):
            return self._compiled(schema, root)
        if "const" in schema or "enum" in schema:
            values = [schema["const"]] if "const" in schema else schema["enum"]
            return self._rule(" | ".join(_literal(_json(value)) for value in values))
        if "anyOf" in schema:
            return self._rule(" | ".join(self._value(option, root) for option in schema["anyOf"]))
        kind = schema.get("type")
        if isinstance(kind, Sequence) and not isinstance(kind, str):
            return self._rule(" | ".join(self._value({**schema, "type": one}, root) for one in kind))
        if kind in ("integer", "number") and any(key in schema for key in RANGES):
            return self._compiled(schema, root)
        if kind == "integer":
            return self._rule("/-?(0|[1-9][0-9]{0,14})/")
        if kind == "number":
            return self._rule("/-?(0|[1-9][0-9]{0,14})(\\.[0-9]{1,10})?([eE][+-]?[0-9]{1,2})?/")
        if kind == "boolean":
            return self._rule('"true" | "false"')
        if kind == "null":
            return self._rule('"null"')
        if kind == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", self.max_string)
            unit = r"([^\"\\'\x00-\x1f\x7f]|\\[\"\\\/bfnrt']))".replace("))", ")")
            return self._rule(f'/"{unit}{{{least},{max(least, most)}}}"/')
        if kind == "array":
            return self._array(schema, root)
        if kind == "object" and schema.get("properties"):
            return self._object(schema, root)
        if kind == "object" and schema.get("additionalProperties", True) in (True, False):
            return self._rule('"{}"') if schema is root else self._compiled(schema, root)
        return self._compiled(schema, root)

    def _array(self, schema: Mapping[str, Any], root: Any) -> str:
        least = int(schema.get("minItems", 0))
        most = max(least, int(schema.get("maxItems", self.max_items)))
        if schema.get("uniqueItems"):
            return self._compiled(schema, root)
        items = schema.get("items", {"anyOf": [{"type": "number"}, {"type": "string"}, {"type": "boolean"}]})
        item = self._value(items, root)
        comma = _literal(SEPARATORS[0])
        more = f'"[" {item} ({comma} {item}){{{max(0, least - 1)},{max(0, most - 1)}}} "]"'
        if most == 0:
            return self._rule('"[]"')
        return self._rule(more if least else f'"[]" | {more}')

    def _object(self, schema: Mapping[str, Any], root: Any) -> str:
        required = set(schema.get("required", ()))
        unknown = required - set(schema["properties"])
        if unknown:
            return self._compiled(schema, root)
        pairs = [
            (f"{_literal(_json(name) + SEPARATORS[1])} {self._value(sub, root)}", name in required)
            for name, sub in schema["properties"].items()
        ]
        comma = _literal(SEPARATORS[0])
        # rest[i][first]: what may follow once the fields before i are decided; `first` while none has been written
        following = {True: "", False: ""}
        for pair, needed in reversed(pairs):
            now = {}
            for first in (True, False):
                written = f"{'' if first else comma} {pair} {following[False]}".strip()
                if needed:
                    now[first] = self._rule(written)
                else:
                    skipped = following[first]
                    now[first] = self._rule(f"{written} | {skipped if skipped else chr(34) * 2}")
            following = now
        return self._rule(f'"{{" {following[True]} "}}"')


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=SEPARATORS).replace("'", "\\'")


def _literal(text: str) -> str:
    """`text` as a Lark string."""
    return json.dumps(text, ensure_ascii=False)
