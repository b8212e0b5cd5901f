"""The text of tool calling: foreign function schemas made standard, requests, calls and responses as they are trained.

Design choices:
- The wording itself lives in `modeling.chat_turns` and travels with every model: there is one format, the one the tool
  specialists are trained on (stage-tool card). Small models are template matchers: another layout is another task.
- Arguments are a JSON text between single quotes. An apostrophe inside it is written ``\\'``; nothing else is
  escaped a second time.
- Foreign schemas (``dict``, ``float``, ``str, optional``, OpenAI wrappers, bare parameter tables) become plain JSON
  Schema once, here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stagewise.modeling.chat_turns import TOOL_CALL_MARKER, TOOL_RESPONSE_MARKER, render_tool_call, render_tools

__all__ = [
    "CALL_MARKER",
    "TOOL_RESPONSE_MARKER",
    "render_call",
    "render_request",
    "render_response",
    "render_tools",
    "standard_schema",
    "standard_tool",
]

CALL_MARKER = TOOL_CALL_MARKER.strip()

TYPE_NAMES = {
    "dict": "object",
    "float": "number",
    "double": "number",
    "long": "integer",
    "int": "integer",
    "str": "string",
    "char": "string",
    "bool": "boolean",
    "list": "array",
    "tuple": "array",
    "set": "array",
    "none": "null",
    "nonetype": "null",
}
STANDARD_TYPES = {"object", "array", "string", "number", "integer", "boolean", "null"}


def standard_schema(schema: Any) -> Any:
    """A JSON Schema equal to `schema` with Python's and other languages' type names replaced by the standard ones
    (``any`` drops out).
    """
    if isinstance(schema, Mapping):
        out: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "type":
                if isinstance(value, str):
                    out.update(_standard_type(value))
                elif isinstance(value, Sequence):
                    out["type"] = [_standard_type(v).get("type", v) if isinstance(v, str) else v for v in value]
                else:
                    out["type"] = value
            elif key in ("properties", "$defs", "definitions", "patternProperties") and isinstance(value, Mapping):
                out[key] = {name: standard_schema(sub) for name, sub in value.items()}
            elif key in ("enum", "const", "default", "examples", "required"):
                if not (key == "required" and isinstance(value, bool)):  # draft-3 style flags say nothing here
                    out[key] = value
            else:
                out[key] = standard_schema(value)
        return out
    if isinstance(schema, list):
        return [standard_schema(item) for item in schema]
    return schema


def _standard_type(name: str) -> dict[str, Any]:
    text = name.strip()
    lowered = text.lower()
    for suffix in (", optional", ",optional"):
        if lowered.endswith(suffix):
            text, lowered = text[: -len(suffix)].strip(), lowered[: -len(suffix)].strip()
    if lowered.startswith("optional[") and lowered.endswith("]"):
        return _standard_type(text[len("optional[") : -1])
    if lowered in STANDARD_TYPES:
        return {"type": lowered}
    if lowered in TYPE_NAMES:
        return {"type": TYPE_NAMES[lowered]}
    outer, bracket, inner = text.partition("[")
    kind = TYPE_NAMES.get(outer.strip().lower())
    if bracket and kind == "array":
        items = (
            _standard_type(inner.rstrip("]").split(",")[0])
            if inner.count("[") == 0
            else _standard_type(inner[: inner.rfind("]")])
        )
        return {"type": "array", "items": items} if items else {"type": "array"}
    if bracket and kind == "object":
        return {"type": "object"}
    return {}  # "any" and names nobody defined: no constraint


def standard_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The function `tool` describes as ``{"name", "description", "parameters"}`` with a standard object schema.

    Reads OpenAI's ``{"type": "function", "function": {...}}`` wrapper and bare tables of parameters (xlam). A property
    whose type ends in ``, optional`` or that has a default is not required. Raises ValueError when there is no usable
    name.
    """
    if isinstance(tool.get("function"), Mapping):
        tool = tool["function"]
    name = tool.get("name")
    if not isinstance(name, str) or not name.strip():
        raise ValueError(
            f"tool without a name: {json.dumps(dict(tool), default=str)[:120]}; every function needs a 'name'"
        )
    parameters = tool.get("parameters") or {}
    if not isinstance(parameters, Mapping):
        raise ValueError(f"tool {name!r}: 'parameters' must be an object schema, not {type(parameters).__name__}")
    kind = parameters.get("type")
    wrapped = (isinstance(kind, str) and _standard_type(kind).get("type") == "object") or "properties" in parameters
    if wrapped:
        schema = standard_schema(parameters)
        schema["type"] = "object"
        schema.setdefault("properties", {})
    else:
        required = [
            key
            for key, value in parameters.items()
            if isinstance(value, Mapping)
            and "default" not in value
            and "optional" not in str(value.get("type", "")).lower()
        ]
        schema = {
            "type": "object",
            "properties": {k: standard_schema(v) for k, v in parameters.items()},
            "required": required,
        }
    return {"name": name, "description": str(tool.get("description") or ""), "parameters": schema}


def render_request(tools: Sequence[Mapping[str, Any]], query: str) -> str:
    """The user turn of a tool request: the functions, a blank line, the query."""
    return f"{render_tools(tools)}\n\n{query}"


def render_call(name: str, arguments: Mapping[str, Any]) -> str:
    """The assistant's text that calls `name` with `arguments`."""
    return render_tool_call(name, arguments)


def render_response(result: Any) -> str:
    """The user turn that hands a function's result back to the model."""
    return TOOL_RESPONSE_MARKER + (result if isinstance(result, str) else json.dumps(result, ensure_ascii=False))
