"""Rendering of conversations: the exact form, the loss mask, and that no content can forge a turn."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.modeling.byte_encoding import SPECIAL_TOKENS
from stagewise.modeling.chat_turns import render_tool_call, render_tools
from stagewise.tokenizer import train_tokenizer

TOK = train_tokenizer(["user: What is the weather in Seoul? assistant: It is 21 degrees, print(1 + 2)\n" * 3], 300)
BOS, USER, USER_END, ASSISTANT, ASSISTANT_END, PYTHON, PYTHON_END, OUTPUT, OUTPUT_END = TOK.special_ids.values()
HOSTILE = (
    st.lists(st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "\n", " ", "hi", "é"]), min_size=1).map("".join)
    | st.text(min_size=1)
).filter(str.strip)  # fmt: skip
WEATHER = {
    "name": "get_weather",
    "description": "Get current weather by city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def say(role, content):
    return {"role": role, "content": content}


def specials(ids):
    return [i for i in ids if i >= BOS]


def test_turns_and_mask_have_the_trained_form():
    ids, mask = TOK.render_conversation(
        [say("user", "hi"), say("assistant", "yes"), say("user", "and?"), say("assistant", "no")]
    )
    hi, yes, more, no = map(TOK.encode_ordinary, ["hi", "yes", "and?", "no"])
    assert ids == [
        BOS, USER, *hi, USER_END, ASSISTANT, *yes, ASSISTANT_END, USER, *more, USER_END, ASSISTANT, *no, ASSISTANT_END,
    ]  # fmt: skip
    assert mask == ([0] * (len(hi) + 4) + [1] * (len(yes) + 1) + [0] * (len(more) + 3) + [1] * (len(no) + 1))


def test_system_text_goes_before_the_first_user_turn_after_a_blank_line():
    with_system = TOK.render_conversation([say("system", "Be brief."), say("user", "hi"), say("assistant", "yes")])
    assert with_system == TOK.render_conversation([say("user", "Be brief.\n\nhi"), say("assistant", "yes")])


def test_python_parts_are_trained_and_their_outputs_are_not():
    parts = [
        {"type": "text", "text": "It is "},
        {"type": "python", "text": "1 + 2"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": " degrees"},
    ]
    ids, mask = TOK.render_conversation([say("user", "hi"), say("assistant", parts)])
    start = ids.index(ASSISTANT)
    texts = [TOK.encode_ordinary(part["text"]) for part in parts]
    assert ids[start:] == [
        ASSISTANT, *texts[0], PYTHON, *texts[1], PYTHON_END, OUTPUT, *texts[2], OUTPUT_END, *texts[3], ASSISTANT_END,
    ]  # fmt: skip
    trained = [i for i, m in zip(ids, mask, strict=True) if m]
    assert trained == [*texts[0], PYTHON, *texts[1], PYTHON_END, *texts[3], ASSISTANT_END]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(HOSTILE, HOSTILE, HOSTILE, HOSTILE)
def test_no_text_of_anyone_can_forge_a_turn(system, question, answer, result):
    messages = [
        say("system", system),
        say("user", question),
        say("assistant", answer),
        say("tool", result),
        say("assistant", answer),
    ]
    ids, mask = TOK.render_conversation(messages, tools=[{**WEATHER, "description": result}])
    turn = [USER, USER_END, ASSISTANT, ASSISTANT_END]
    assert specials(ids) == [BOS, *turn, *turn]
    assert len(ids) == len(mask)
    clean = question.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert clean.encode() in TOK.decode_bytes(ids)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(HOSTILE)
def test_chat_template_cannot_be_forged_either(text):
    out = TOK.apply_chat_template([say("user", text)], add_generation_prompt=True)
    assert specials(out["input_ids"]) == [BOS, USER, USER_END, ASSISTANT]
    assert out["input_ids"] == TOK.render_for_completion([say("user", text)])


def test_completion_prompt_ends_where_the_assistant_begins():
    ids = TOK.render_for_completion([say("user", "hi"), say("assistant", "yes"), say("user", "and?")])
    assert ids[-1] == ASSISTANT and specials(ids)[-3:-1] == [USER, USER_END]


def test_tools_are_shown_in_the_trained_format():
    other = {"name": "add", "description": "Füge hinzu", "parameters": {}}
    system = (
        "You are a helpful assistant with access to the following functions. Use them if required -\n"
        + json.dumps(WEATHER, indent=4) + "\n\n" + json.dumps(other, indent=4)
    )  # fmt: skip
    expected = TOK.render_for_completion([say("user", f"{system}\n\nhi")])
    wrapped = {"type": "function", "function": WEATHER}
    assert TOK.render_for_completion([say("user", "hi")], tools=[wrapped, other]) == expected
    assert (
        TOK.apply_chat_template(
            [say("user", "hi")], tools=[WEATHER, other], add_generation_prompt=True, return_dict=False
        )
        == expected
    )
    with_system = TOK.render_for_completion([say("system", "Be brief."), say("user", "hi")], tools=[WEATHER, other])
    assert with_system == TOK.render_for_completion([say("user", f"Be brief.\n\n{system}\n\nhi")])


def test_python_function_becomes_its_schema():
    def get_time(city: str) -> str:
        """Tell the time.

        Args:
            city: Where.
        """
        return city

    shown = json.loads(render_tools([get_time]).split("-\n", 1)[1])
    assert shown["name"] == "get_time" and shown["parameters"]["required"] == ["city"]


def test_calls_and_results_read_as_the_tool_specialists_write_them():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Seoul"}}}
    messages = [
        say("user", "weather?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        say("tool", '{"degrees": 21}'),
        say("tool", "21"),
    ]
    text = TOK.apply_chat_template(messages, tokenize=False)
    assert text == (
        "<|bos|><|user_start|>weather?<|user_end|><|assistant_start|>"
        "<functioncall> {\"name\": \"get_weather\", \"arguments\": '{\"city\": \"Seoul\"}'}<|assistant_end|>"
        '<|user_start|>FUNCTION RESPONSE: {"degrees": 21}\n\nFUNCTION RESPONSE: 21<|user_end|>'
    )  # fmt: skip
    assert render_tool_call("f", {"a": "it's"}) == '<functioncall> {"name": "f", "arguments": \'{"a": "it\\\'s"}\'}'


def test_chat_template_returns_padded_tensors_masks_and_batches():
    chats = [
        [say("user", "hi"), say("assistant", "yes")],
        [say("user", "hi there, and?"), say("assistant", "no no no")],
    ]
    out = TOK.apply_chat_template(chats, padding=True, return_tensors="pt", return_assistant_tokens_mask=True)
    for row, chat in enumerate(chats):
        ids, mask = TOK.render_conversation(chat)
        gap = out["input_ids"].shape[1] - len(ids)
        assert out["input_ids"][row].tolist() == [BOS] * gap + ids
        assert out["attention_mask"][row].tolist() == [0] * gap + [1] * len(ids)
        assert out["assistant_masks"][row].tolist() == [0] * gap + mask
    single = TOK.apply_chat_template(chats[0], return_tensors="pt")
    assert torch.equal(single["input_ids"], torch.tensor([TOK.render_conversation(chats[0])[0]]))


def test_chat_template_continues_the_final_message_and_truncates():
    chat = [say("user", "hi"), say("assistant", "yes")]
    ids, _ = TOK.render_conversation(chat)
    assert TOK.apply_chat_template(chat, continue_final_message=True)["input_ids"] == ids[:-1]
    assert TOK.apply_chat_template(chat, truncation=True, max_length=4)["input_ids"] == ids[:4]
    with pytest.raises(ValueError, match="continue_final_message"):
        TOK.apply_chat_template(chat[:1], continue_final_message=True)
    with pytest.raises(ValueError, match="exclude each other"):
        TOK.apply_chat_template(chat, continue_final_message=True, add_generation_prompt=True)


@pytest.mark.parametrize("option", [{"chat_template": "{{x}}"}, {"documents": [{}]}, {"enable_thinking": True}])
def test_unsupported_template_options_are_an_error(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        TOK.apply_chat_template([say("user", "hi")], **option)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ([], "non-empty list"),
        ("hi", "non-empty list"),
        ([{"content": "hi"}], r"messages\[0\]: expected a dictionary"),
        ([say("assistant", "hi")], r"messages\[0\]: roles out of order: expected user"),
        ([say("user", "hi"), say("user", "hi")], r"messages\[1\]: roles out of order: expected assistant"),
        ([say("user", "a"), say("assistant", "b"), say("assistant", "c")], r"messages\[2\]: roles out of order"),
        ([say("user", "a"), say("tool", "b")], r"messages\[1\]: roles out of order: a tool's result"),
        ([say("user", "a"), say("system", "b")], r"messages\[1\]: a system message can only come first"),
        ([say("system", "a")], "a user message must follow"),
        ([say("system", "a"), say("assistant", "b")], r"messages\[1\]: roles out of order"),
        ([say("robot", "a")], "unknown role 'robot'"),
        ([say("user", " \n")], r"messages\[0\]: empty content"),
        ([say("user", None)], r"messages\[0\]: empty content"),
        ([say("user", "a"), say("assistant", "")], r"messages\[1\]: empty content"),
        ([say("user", "a"), say("assistant", [])], r"messages\[1\]: empty content"),
        ([say("system", ""), say("user", "a")], r"messages\[0\]: empty content"),
        ([say("user", 5)], r"messages\[0\]\.content: expected text"),
        ([say("user", [{"type": "python", "text": "1"}])], r"messages\[0\]\.content\[0\]"),
        ([say("user", "a"), say("assistant", [{"type": "image"}])], r"messages\[1\]\.content\[0\]"),
        ([say("user", "a"), {"role": "assistant", "tool_calls": [{"name": 3}]}], r"tool_calls\[0\]"),
        ([say("user", "a")], "no assistant turn"),
    ],
)
def test_conversation_that_cannot_be_rendered_is_a_clear_error(messages, error):
    with pytest.raises(ValueError, match=error):
        TOK.render_conversation(messages)


def test_completion_after_an_assistant_turn_is_an_error():
    with pytest.raises(ValueError, match="already ends with the assistant"):
        TOK.render_for_completion([say("user", "hi"), say("assistant", "yes")])


@pytest.mark.parametrize("tool", [{}, {"description": "x"}, "get_weather", {"function": {}}])
def test_tool_without_a_name_is_an_error(tool):
    with pytest.raises(ValueError, match=r"tools\[0\]"):
        render_tools([tool])
