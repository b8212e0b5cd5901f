from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.specialist.tool_calls import (
    CALL_MARKER,
    ToolCall,
    ToolCallParser,
    check_call,
    first_call,
    parse_stream,
    render_call,
    render_request,
    render_tools,
    standard_tool,
)

WEATHER = {
    "name": "get_weather",
    "description": "Get current weather by city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "description": "City name"}},
        "required": ["city"],
    },
}

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(st.text(max_size=8), json_values, max_size=4)
names = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=12)


def test_the_prompt_is_the_trained_one_to_the_character():
    assert render_request([WEATHER], "Weather in Seoul?") == (
        "You are a helpful assistant with access to the following functions. Use them if required -\n"
        + json.dumps(WEATHER, indent=4)
        + "\n\nWeather in Seoul?"
    )
    assert render_tools([WEATHER, WEATHER]).count('    "name": "get_weather"') == 2


def test_the_emission_printed_on_the_tool_card_parses():
    text = '<functioncall> {"name": "get_weather", "arguments": \'{"city": "Seoul", "country": "South Korea"}\'}'
    call = first_call(text)
    assert call == ToolCall("get_weather", {"city": "Seoul", "country": "South Korea"}, text)
    report = check_call(call, [WEATHER])
    assert not report.valid and report.invented == ["country"] and report.missing == [] and report.errors == []


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "f", "arguments": \'{"a": "it\\\'s \\"x\\""}\'}',
        '{"name": "f", "arguments": {"a": "it\'s \\"x\\""}}',
        '{"arguments": {"a": "it\'s \\"x\\""}, "name": "f"}',
        json.dumps({"name": "f", "arguments": json.dumps({"a": 'it\'s "x"'})}),
        "{'name': 'f', 'arguments': {'a': 'it\\'s \"x\"'}}",
        '\n  {"name" : "f",\n "arguments": \' {"a": "it\'s \\"x\\""} \'}',
    ],
)
@pytest.mark.parametrize("tail", ["", "]}]}]}]}", " and more", "<functioncall> {}", "<|endoftext|>"])
def test_every_way_of_writing_a_call_gives_the_same_arguments_whatever_follows(body, tail):
    call = first_call(f"Sure. {CALL_MARKER} {body}{tail}")
    assert call is not None and call.name == "f" and call.arguments == {"a": 'it\'s "x"'}
    assert call.source == f"{CALL_MARKER} {body}"


@pytest.mark.parametrize(
    "text",
    [
        '<functioncall> {"name": "f", "arguments": \'{"a": 1}}\'}',
        '<functioncall> {"name": "f", "arguments": \'{"a": 1',
        '<functioncall> {"name": "f", "arguments": [1]}',
        '<functioncall> {"name": "", "arguments": {}}',
        '<functioncall> {"arguments": {}}',
        '<functioncall> {"name": "f", "arguments": {"a": NaN}}',
        '<functioncall> {"name": "f", "arguments": {"a": 1, "a": 2}}',
        '<functioncall> {"name": "f", "arguments": {"a": 1]}',
        '<functioncall> {"name": "f", "arguments": {' + '"a": {' * 100 + "}" * 102,
        '<functioncall> "f"',
        "<functioncall",
    ],
)
def test_what_is_no_call_is_kept_as_text(text):
    parser = ToolCallParser()
    parser.feed(text)
    assert parser.close() is None
    assert parser.text == text


def test_a_broken_call_does_not_hide_the_next_one():
    parser = ToolCallParser()
    parser.feed('<functioncall> {"name": <functioncall> {"name": "g", "arguments": \'{}\'} rest')
    assert parser.call is not None and parser.call.name == "g" and len(parser.rejected) == 1


def test_reading_stops_at_the_end_of_the_first_call():
    def pieces():
        yield "Let me see. <funct"
        yield 'ioncall> {"name": "f", "arguments": \'{"a": 1}\''
        yield "}]}]}"
        raise AssertionError("read on after the call")

    assert list(parse_stream(pieces())) == [
        "Let me see. ",
        ToolCall("f", {"a": 1}, '<functioncall> {"name": "f", "arguments": \'{"a": 1}\'}'),
    ]


@settings(max_examples=150, deadline=None)
@given(names, arguments, st.text(max_size=10), st.lists(st.integers(1, 7), max_size=30))
def test_rendered_calls_are_read_back_from_any_chunking(name, values, tail, sizes):
    rendered = render_call(name, values)
    text, parser, start = rendered + tail, ToolCallParser(), 0
    for size in sizes:
        parser.feed(text[start : start + size])
        start += size
    parser.feed(text[start:])
    assert parser.call is not None
    assert (parser.call.name, parser.call.arguments, parser.call.source) == (name, values, rendered)


call_pieces = st.sampled_from(
    [
        CALL_MARKER,
        "<func",
        " ",
        "{",
        "}",
        "[",
        "]",
        '"',
        "'",
        "\\",
        ",",
        ":",
        '"name"',
        '"f"',
        '"arguments"',
        '{"a": 1}',
        "1",
        "é",
        "\n",
        "x",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.lists(call_pieces, max_size=40), st.integers(1, 9))
def test_no_text_breaks_the_parser_and_chunking_never_matters(parts, size):
    text = "".join(parts)
    whole, pieces = ToolCallParser(), ToolCallParser()
    whole.feed(text)
    for start in range(0, len(text), size):
        pieces.feed(text[start : start + size])
    assert whole.close() == pieces.close()
    assert whole.text == pieces.text and whole.rejected == pieces.rejected
    if whole.call is None:
        assert whole.text == text  # nothing is swallowed
    else:
        assert text.startswith(whole.text + whole.call.source)


@settings(max_examples=60, deadline=None)
@given(json_values)
def test_any_arguments_are_checked_without_an_exception(value):
    report = check_call(ToolCall("get_weather", {"city": value}, ""), [WEATHER])
    assert report.valid == isinstance(value, str)


def test_missing_nested_and_invented_fields_are_named():
    tool = {
        "name": "f",
        "parameters": {
            "type": "dict",
            "properties": {
                "at": {"type": "dict", "properties": {"x": {"type": "float"}}, "required": ["x"]},
                "free": {"type": "object"},
                "rows": {"type": "array", "items": {"type": "object", "properties": {"k": {"type": "integer"}}}},
            },
            "required": ["at"],
        },
    }
    report = check_call(ToolCall("f", {"at": {"y": 1}, "free": {"any": 1}, "rows": [{"k": "1", "z": 0}]}, ""), [tool])
    assert report.invented == ["at.y", "rows.0.z"]
    assert report.missing == ["at.x"]
    assert len(report.errors) == 1 and report.errors[0].startswith("rows.0.k")
    assert check_call(ToolCall("f", {}, ""), [tool]).missing == ["at"]
    assert check_call(ToolCall("g", {}, ""), [tool]).known is False


def test_closed_objects_report_an_invented_field_once():
    tool = {
        "name": "f",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
    }
    report = check_call(ToolCall("f", {"a": 1, "b": 2}, ""), [tool])
    assert report.invented == ["b"] and report.errors == []


def test_a_function_without_parameters_takes_none():
    assert check_call(ToolCall("f", {}, ""), [{"name": "f"}]).valid
    assert check_call(ToolCall("f", {"a": 1}, ""), [{"name": "f"}]).invented == ["a"]


def test_foreign_schemas_become_standard_ones():
    bare = {
        "name": "f",
        "parameters": {
            "n": {"type": "int"},
            "names": {"type": "List[str]", "default": ""},
            "q": {"type": "str, optional"},
        },
    }
    assert standard_tool(bare)["parameters"] == {
        "type": "object",
        "properties": {
            "n": {"type": "integer"},
            "names": {"type": "array", "items": {"type": "string"}, "default": ""},
            "q": {"type": "string"},
        },
        "required": ["n"],
    }
    assert standard_tool({"type": "function", "function": WEATHER}) == WEATHER


@pytest.mark.parametrize(
    ("tool", "words"),
    [
        ({"description": "x"}, "needs a 'name'"),
        ({"name": "f", "parameters": [1]}, "'parameters' must be an object"),
        (
            {"name": "f", "parameters": {"type": "object", "properties": {"a": {"minimum": "low"}}}},
            "no valid JSON Schema",
        ),
        (
            {"name": "f", "parameters": {"type": "object", "properties": {"a": {"$ref": "http://example.invalid/s"}}}},
            "cannot be used",
        ),
    ],
)
def test_unusable_tools_are_named(tool, words):
    with pytest.raises(ValueError, match=words):
        check_call(ToolCall("f", {"a": 1}, ""), [tool])
