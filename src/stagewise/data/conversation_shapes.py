"""Records of common data sets as conversations: a conversation is a list of ``{"role", "content"}`` turns.

Design choices:
- One function a shape, registered by a decorator; `detect_shape` looks at a record's keys, so users rarely name a
  shape.
- Contents are plain text, or a list of parts ``{"type": "text" | "python" | "python_output", "text": ...}`` for an
  assistant that uses a calculator.
- `check_messages` is the single place that says what a conversation must look like; everything behind it relies on
  that.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .tool_format import TOOL_RESPONSE_MARKER, render_call, render_tools, standard_tool

Message = dict[str, Any]
Messages = list[Message]

SHAPES: dict[str, Callable[[Mapping[str, Any]], Messages]] = {}
PART_TYPES = ("text", "python", "python_output")
ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "response",
    "function": "response",
    "observation": "response",
    "function_response": "response",
}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CALCULATOR = re.compile(r"<<([^<>]*)>>")
GLAIVE_TURN = re.compile(r"(?:^|\n)\s*(USER|ASSISTANT|FUNCTION RESPONSE):")


class ConversationError(ValueError):
    """A record that is no usable conversation; the message says why."""


def shape(name: str) -> Callable[[Callable[[Mapping[str, Any]], Messages]], Callable[[Mapping[str, Any]], Messages]]:
    """Register a function that turns one record of shape `name` into messages."""

    def register(function: Callable[[Mapping[str, Any]], Messages]) -> Callable[[Mapping[str, Any]], Messages]:
        SHAPES[name] = function
        return function

    return register


def read_record(record: Mapping[str, Any], shape_name: str = "auto") -> Messages:
    """The checked conversation in `record`. Raises ConversationError (a ValueError) when there is none."""
    name = detect_shape(record) if shape_name == "auto" else shape_name
    if name not in SHAPES:
        raise ValueError(f"unknown conversation shape {name!r}; known: auto, {', '.join(sorted(SHAPES))}")
    try:
        messages = SHAPES[name](record)
    except KeyError as error:
        fields = ", ".join(map(str, record))
        raise ConversationError(f"shape {name!r} needs the field {error}; the record has: {fields}") from None
    except (TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ConversationError(f"the record is not of shape {name!r}: {error}") from None
    check_messages(messages)
    return messages


def detect_shape(record: Mapping[str, Any]) -> str:
    """The name of the shape `record` seems to have. Raises ConversationError when no shape fits."""
    keys = set(record)
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt"
    if "chat" in keys:
        return "glaive"
    if "query" in keys and {"tools", "answers"} <= keys:
        return "xlam"
    if "choices" in keys or (set(keys) == {"train"} and isinstance(record["train"], Mapping)):
        return "choice"
    if {"question", "answer"} <= keys:
        return "gsm8k" if CALCULATOR.search(str(record["answer"])) else "question"
    if "instruction" in keys:
        return "instruction"
    if keys & set(QUESTION_KEYS) and keys & set(ANSWER_KEYS):
        return "question"
    raise ConversationError(f"no conversation shape fits a record with the fields: {', '.join(map(str, record))}")


def check_messages(messages: Any) -> None:
    """Raise ConversationError unless `messages` is an optional system turn, then user and assistant turns in turn."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ConversationError("a conversation is a non-empty list of messages")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ConversationError(f"message {index} needs 'role' and 'content'")
        _check_content(index, message)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if "assistant" not in turns:
        raise ConversationError("no assistant turn, so nothing to learn from")
    for index, role in enumerate(turns):
        expected = "user" if index % 2 == 0 else "assistant"
        if role != expected:
            order = ", ".join(map(str, roles))
            raise ConversationError(f"roles out of order ({order}): turn {index} should be {expected}, not {role}")


def _check_content(index: int, message: Mapping[str, Any]) -> None:
    content, role = message["content"], message["role"]
    if isinstance(content, str):
        if not content.strip():
            raise ConversationError(f"empty content in message {index} ({role})")
        return
    if not isinstance(content, Sequence) or not content:
        raise ConversationError(f"content of message {index} ({role}) must be text or a list of parts")
    if role != "assistant":
        raise ConversationError(f"message {index} ({role}): only an assistant turn may consist of parts")
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") not in PART_TYPES or not isinstance(part.get("text"), str):
            raise ConversationError(f"message {index}: a part is {{'type': {' | '.join(PART_TYPES)}, 'text': ...}}")
    if not any(part["text"].strip() for part in content):
        raise ConversationError(f"empty content in message {index} ({role})")


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):  # a list of {"type": "text", "text"} parts
        return "".join(part if isinstance(part, str) else str(part.get("text", "")) for part in value)
    return str(value)


def _json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def join_turns(messages: Messages) -> Messages:
    """Neighbouring text turns of one role become one, separated by a blank line."""
    out: Messages = []
    for message in messages:
        last = out[-1] if out else None
        if (
            last
            and last["role"] == message["role"]
            and isinstance(last["content"], str)
            and isinstance(message["content"], str)
        ):
            last["content"] = f"{last['content']}\n\n{message['content']}"
        else:
            out.append(dict(message))
    return out


def _turns(items: Sequence[Mapping[str, Any]], role_key: str, content_key: str, tools: Any) -> Messages:
    out: Messages = []
    tools = _json(tools) if tools else None
    if tools:
        out.append({"role": "system", "content": render_tools([standard_tool(tool) for tool in tools])})
    for item in items:
        name = str(item[role_key])
        role = ROLES.get(name.lower())
        if role is None:
            raise ConversationError(f"unknown role {name!r}; known: {', '.join(ROLES)}")
        content: Any = item.get(content_key)
        parts = isinstance(content, list) and any(isinstance(p, Mapping) and p.get("type") != "text" for p in content)
        if not parts:
            content = _text(content)
        if role == "response":
            role, content = "user", TOOL_RESPONSE_MARKER + content.removeprefix(TOOL_RESPONSE_MARKER)
        calls = item.get("tool_calls")
        if role == "assistant" and calls:
            content = "\n".join(([content] if content else []) + [_render_openai_call(call) for call in calls])
        elif name.lower() == "function_call":
            content = _render_openai_call(_json(content))
        out.append({"role": role, "content": content})
    if tools and len(out) > 1 and out[1]["role"] == "system":
        out = join_turns(out)
    return out


def _render_openai_call(call: Mapping[str, Any]) -> str:
    function = call.get("function", call)
    return render_call(function["name"], _json(function.get("arguments") or {}))


@shape("messages")
def _messages(record: Mapping[str, Any]) -> Messages:
    return _turns(_json(record["messages"]), "role", "content", record.get("tools"))


@shape("sharegpt")
def _sharegpt(record: Mapping[str, Any]) -> Messages:
    items = _json(record["conversations"])
    if items and "role" in items[0]:
        messages = _turns(items, "role", "content", record.get("tools"))
    else:
        messages = _turns(items, "from", "value", record.get("tools"))
    if record.get("system") and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(record["system"])})
    return messages


QUESTION_KEYS = ("question", "prompt", "query", "problem", "input")
ANSWER_KEYS = ("answer", "response", "completion", "solution", "output")


def _first(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    for key in keys:
        if record.get(key) is not None:
            return _text(record[key])
    raise KeyError(" or ".join(keys))


def _exchange(record: Mapping[str, Any], user: str, assistant: Any) -> Messages:
    messages = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    if record.get("system"):
        messages.insert(0, {"role": "system", "content": _text(record["system"])})
    return messages


@shape("instruction")
def _instruction(record: Mapping[str, Any]) -> Messages:
    user, extra = _text(record["instruction"]), _text(record.get("input"))
    if extra.strip():
        user = f"{user}\n\n{extra}"
    return _exchange(record, user, _first(record, ("output", "response", "answer", "completion")))


@shape("question")
def _question(record: Mapping[str, Any]) -> Messages:
    return _exchange(record, _first(record, QUESTION_KEYS), _first(record, ANSWER_KEYS))


@shape("gsm8k")
def _gsm8k(record: Mapping[str, Any]) -> Messages:
    return _exchange(record, _text(record["question"]), calculator_parts(_text(record["answer"])))


def calculator_parts(text: str) -> str | list[dict[str, str]]:
    """`text` with every ``<<a=b>>`` as a python part ``a`` and an output part ``b``; plain text when there is none."""
    parts: list[dict[str, str]] = []
    end = 0
    for match in CALCULATOR.finditer(text):
        if match.start() > end:
            parts.append({"type": "text", "text": text[end : match.start()]})
        expression, equals, result = match[1].rpartition("=")
        parts.append({"type": "python", "text": expression if equals else match[1]})
        if equals:
            parts.append({"type": "python_output", "text": result})
        end = match.end()
    if not parts:
        return text
    if end < len(text):
        parts.append({"type": "text", "text": text[end:]})
    return parts


@shape("choice")
def _choice(record: Mapping[str, Any]) -> Messages:
    if set(record) == {"train"}:  # how one hub data set nests its rows
        record = record["train"]
    choices = record["choices"]
    if isinstance(choices, Mapping):  # {"text": [...], "label": [...]}
        choices = choices["text"]
    answer = record["answer"] if "answer" in record else record["answerKey"]
    if not 2 <= len(choices) <= len(LETTERS):
        raise ConversationError(f"a multiple choice needs 2 to {len(LETTERS)} choices, not {len(choices)}")
    letters = LETTERS[: len(choices)]
    if isinstance(answer, str) and answer.strip().upper() in letters and answer.strip():
        letter = answer.strip().upper()
    else:
        index = int(answer) if not isinstance(answer, str) or answer.strip().isdigit() else -1
        if not 0 <= index < len(choices):
            raise ConversationError(f"the answer {answer!r} names none of the {len(choices)} choices")
        letter = letters[index]
    listed = "\n".join(f"{mark}. {_text(choice)}" for mark, choice in zip(letters, choices, strict=True))
    question = f"{_text(record['question'])}\n\n{listed}\n\nAnswer with one letter."
    return _exchange(record, question, letter)


@shape("glaive")
def _glaive(record: Mapping[str, Any]) -> Messages:
    messages: Messages = []
    system = _text(record.get("system")).strip().removeprefix("SYSTEM:").strip()
    if system:
        messages.append({"role": "system", "content": system})
    pieces = GLAIVE_TURN.split(_text(record["chat"]))
    for name, content in zip(pieces[1::2], pieces[2::2], strict=True):
        content = content.replace("<|endoftext|>", "").strip()
        if name == "FUNCTION RESPONSE":
            content = TOOL_RESPONSE_MARKER + content
        messages.append({"role": "assistant" if name == "ASSISTANT" else "user", "content": content})
    return join_turns(messages)


@shape("xlam")
def _xlam(record: Mapping[str, Any]) -> Messages:
    tools = [standard_tool(tool) for tool in _json(record["tools"])]
    calls = [render_call(call["name"], _json(call.get("arguments") or {})) for call in _json(record["answers"])]
    messages = [{"role": "user", "content": _text(record["query"])}, {"role": "assistant", "content": "\n".join(calls)}]
    if tools:
        messages.insert(0, {"role": "system", "content": render_tools(tools)})
    return messages
