"""Conversations as turns: what a list of messages means before it becomes token ids.

Design choices:
- Every accepted conversation is one shape, alternating turns that a user begins; the system text and the shown tools
  belong to the first user turn, tool results are user turns. What does not fit is an error that names the message.
- Turns hold plain text. Nothing here knows token ids, so no text can become one.
- The wording of tools and calls is the one the specialists are trained on (model card of stage-tool).
- This file travels with exported models: it imports nothing of the package.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

TOOLS_PREAMBLE = "You are a helpful assistant with access to the following functions. Use them if required -\n"
TOOL_CALL_MARKER = "<functioncall> "
TOOL_RESPONSE_MARKER = "FUNCTION RESPONSE: "

PART_KINDS = ("text", "python", "python_output")  # of an assistant's content; others write text

Message = Mapping[str, Any]
Tool = Mapping[str, Any] | Callable
Part = tuple[str, str]  # (kind, text)


def fold_turns(messages: Sequence[Message], tools: Sequence[Tool] | None = None) -> list[tuple[str, list[Part]]]:
    """Turns of alternating role, user first: the system text and the tools folded into the first user turn.

    Roles are system (first only), user, assistant and tool (results, read by the model as a user turn; neighbouring
    ones are one turn). An assistant's ``tool_calls`` follow its content. Returns (role, parts) with parts (kind,
    text). Raises ValueError naming the message that is out of order, empty or of an unknown shape.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError("messages: expected a non-empty list of {'role': ..., 'content': ...}")
    preamble: list[str] = []
    turns: list[tuple[str, list[Part]]] = []
    previous = None
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or "role" not in message:
            raise ValueError(f"{where}: expected a dictionary with 'role' and 'content'")
        role = message["role"]
        if role == "system":
            if index != 0:
                raise ValueError(f"{where}: a system message can only come first")
            preamble.append(_plain_text(message, where))
        elif role == "tool":
            text = TOOL_RESPONSE_MARKER + _plain_text(message, where)
            if previous == "tool":
                turns[-1][1].append(("text", "\n\n" + text))
            elif previous == "assistant":
                turns.append(("user", [("text", text)]))
            else:
                raise ValueError(f"{where}: roles out of order: a tool's result must follow the assistant's call")
        elif role in ("user", "assistant"):
            expected = "user" if not turns or turns[-1][0] == "assistant" else "assistant"
            if role != expected:
                raise ValueError(
                    f"{where}: roles out of order: expected {expected}, got {role}; turns alternate, the user begins"
                )
            turns.append(
                (
                    role,
                    _assistant_parts(message, where)
                    if role == "assistant"
                    else [("text", _plain_text(message, where))],
                )
            )
        else:
            raise ValueError(f"{where}: unknown role {role!r}; roles are system, user, assistant and tool")
        previous = role
    if tools:
        preamble.append(render_tools(tools))
    if not turns:
        raise ValueError("messages: a system message alone; a user message must follow")
    if preamble:
        turns[0] = ("user", [("text", "\n\n".join([*preamble, turns[0][1][0][1]]))])
    return turns


def render_tools(tools: Sequence[Tool]) -> str:
    """The system text that shows functions in the exact trained format (model card of stage-tool): indented JSON,
    blank lines between.

    Each tool is its dictionary (an OpenAI ``{"type": "function", "function": {...}}`` is unwrapped) or a typed,
    documented function.
    """
    shown = []
    for index, tool in enumerate(tools):
        described = get_json_schema(tool) if callable(tool) else tool
        described = described.get("function", described) if isinstance(described, Mapping) else None
        if not isinstance(described, Mapping) or not described.get("name"):
            raise ValueError(f"tools[{index}]: expected a dictionary with a 'name', or a function")
        shown.append(json.dumps(described, indent=4))
    return TOOLS_PREAMBLE + "\n\n".join(shown)


def render_tool_call(name: str, arguments: Mapping[str, Any] | str) -> str:
    """A call as the tool specialists write it: arguments are JSON inside single quotes, an apostrophe in it escaped."""
    inner = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    inner = inner.replace("'", "\\'")
    return f'{TOOL_CALL_MARKER}{{"name": {json.dumps(name, ensure_ascii=False)}, "arguments": \'{inner}\'}}'


def _content_parts(message: Message, where: str, kinds: Iterable[str]) -> list[Part]:
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, Sequence) and content is not None:
        raise ValueError(f"{where}.content: expected text or a list of parts, got {type(content).__name__}")
    parts: list[Part] = []
    for position, part in enumerate(content or ()):
        kind = str(part.get("type")) if isinstance(part, Mapping) else ""
        if kind not in kinds or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}.content[{position}]: expected {{'type': ..., 'text': ...}} with type {' or '.join(kinds)}, "
                f"got {part!r:.80}"
            )
        parts.append((kind, part["text"]))
    return parts


def _plain_text(message: Message, where: str) -> str:
    text = "".join(text for _, text in _content_parts(message, where, ("text",)))
    if not text.strip():
        raise ValueError(f"{where}: empty content; leave the message out or give it text")
    return text


def _assistant_parts(message: Message, where: str) -> list[Part]:
    parts = _content_parts(message, where, PART_KINDS)
    calls = []
    for position, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(
                f"{where}.tool_calls[{position}]: expected {{'function': {{'name': ..., 'arguments': ...}}}}"
            )
        calls.append(render_tool_call(function["name"], function.get("arguments") or {}))
    if calls:
        parts.append(("text", ("\n" if parts else "") + "\n".join(calls)))
    if not any(text.strip() for _, text in parts):
        raise ValueError(f"{where}: empty content; leave the message out or give it text")
    return parts
