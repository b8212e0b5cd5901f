from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.embedded_functions import functions
from stagewise.data.embedded_tools import argument_value
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.specialist.call_grammar import CallGrammar
from stagewise.specialist.constrain import CallConstraint, Matcher, StopAtCall
from stagewise.specialist.growth import grow, open_parent
from stagewise.specialist.tool_calls import check_call, first_call, render_call, render_request

WEATHER = {
    "name": "get_weather",
    "parameters": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 6},
            "days": {"type": "integer"},
            "unit": {"enum": ["C", "it's"]},
            "at": {
                "type": "object",
                "properties": {"x": {"type": "number"}, "y": {"type": "number"}},
                "required": ["y"],
            },
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
        },
        "required": ["city", "unit"],
    },
}
CLOCK = {"name": "clock", "parameters": {"type": "object", "properties": {}}}
RANGED = {
    "name": "ranged",
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 3, "maximum": 5}, "k": {"$ref": "#/$defs/k"}},
        "required": ["n", "k"],
        "$defs": {"k": {"type": "string", "pattern": "^[ab]{2}$"}},
    },
}


@pytest.fixture(scope="module")
def model(base_folder, tokenizer):
    return grow(open_parent(base_folder("staged")), 1, tokenizer=tokenizer)


def walk(matcher, tokenizer, rng, most=600):
    """A random text the grammar allows, with rollbacks on the way."""
    ids: list[int] = []
    while len(ids) < most:
        options = matcher.allowed(ids).nonzero()[0].tolist()
        token = rng.choice(options)
        if token == matcher.end:
            return ids
        ids.append(token)
        if rng.random() < 0.1:
            matcher.allowed(ids)
            del ids[-rng.randint(1, 3) :]
    return ids


@pytest.mark.parametrize("seed", range(6))
def test_whatever_the_grammar_allows_is_a_valid_call_and_it_ends(tokenizer, seed):
    tools = [WEATHER, CLOCK, RANGED]
    matcher = Matcher(tokenizer, CallGrammar(tools, max_string=8).lark())
    text = tokenizer.decode_bytes(walk(matcher, tokenizer, random.Random(seed))).decode("utf-8", "replace")
    call = first_call(text)
    assert call is not None and call.source == text
    assert check_call(call, tools).valid, (text, check_call(call, tools))


def reachable(matcher, tokenizer, text):
    ids = tokenizer.encode_ordinary(text)
    return all(matcher.allowed(ids[:i])[token] for i, token in enumerate(ids)) and matcher.allowed(ids)[matcher.end]


def test_every_call_in_the_trained_format_is_allowed(tokenizer):
    matcher = Matcher(tokenizer, CallGrammar([WEATHER, CLOCK], mode="call").lark())
    for arguments in (
        {"city": "Lima", "unit": "C"},
        {"city": "O'\"\\n", "days": -3, "unit": "it's"},
        {"city": "", "unit": "C", "at": {"y": 1.5e-09}, "tags": []},
        {"city": "é漢", "days": 0, "unit": "C", "at": {"x": -0.25, "y": 10}, "tags": ["a", "b'"]},
    ):
        assert reachable(matcher, tokenizer, render_call("get_weather", arguments))
    assert reachable(matcher, tokenizer, render_call("clock", {}))
    for arguments in ({"unit": "C"}, {"city": "Lima", "unit": "F"}, {"city": "Lima", "unit": "C", "country": "Peru"}):
        assert not reachable(matcher, tokenizer, render_call("get_weather", arguments))
    assert not reachable(matcher, tokenizer, render_call("forecast", {}))


def test_embedded_functions_calls_are_allowed(tokenizer):
    rng = random.Random(3)
    for function in functions("held_out")[::5]:
        matcher = Matcher(tokenizer, CallGrammar([function.tool]).lark())
        arguments = {p.name: argument_value(p, rng) for p in function.parameters if p.required or rng.random() < 0.5}
        assert reachable(matcher, tokenizer, render_call(function.name, arguments))


def test_auto_admits_a_refusal_but_no_other_call(tokenizer):
    matcher = Matcher(tokenizer, CallGrammar([CLOCK], mode="auto").lark())
    assert reachable(matcher, tokenizer, "I'm sorry, 3 < 4 but I can't.")
    assert reachable(matcher, tokenizer, render_call("clock", {}))
    assert not reachable(matcher, tokenizer, "Sure: " + render_call("forecast", {}))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 264), max_size=8), st.integers(0, 2**30))
def test_the_mask_depends_on_the_ids_alone(tokenizer, noise, seed):
    grammar = CallGrammar([WEATHER]).lark()
    rng = random.Random(seed)
    used = Matcher(tokenizer, grammar)
    text = walk(used, tokenizer, rng)
    for ids in (text[: rng.randint(0, len(text))] + noise, text[: rng.randint(0, len(text))], noise):
        assert (used.allowed(ids) == Matcher(tokenizer, grammar).allowed(ids)).all()


@pytest.mark.parametrize("mode", ["full", "speculative:3", "wand-verified"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_lossless_mode_writes_the_same_valid_call(model, tokenizer, mode, temperature):
    tools = [WEATHER, CLOCK]
    prompt = tokenizer.render_for_completion([{"role": "user", "content": "Lima?"}])
    constraint = CallConstraint(tokenizer, tools, max_string=4)
    params = SamplingParams(
        max_new_tokens=240 - len(prompt), temperature=temperature, coupling="gumbel", seed=7,
        processors=[constraint], stop_tokens=tokenizer.chat_stop_ids,
    )  # fmt: skip
    extra = {"p99_bounds": (0.5,)} if mode == "wand-verified" else {}

    def text(mode, extra):
        result = decode(model, [prompt], Strategy.parse(mode, **extra), params)
        return tokenizer.decode_bytes(result.tokens[0], skip_special_tokens=True).decode("utf-8", "replace")

    found = text(mode, extra)
    assert check_call(first_call(found), tools).valid
    assert found == text("full", {})


def test_rows_of_a_batch_follow_their_own_tools_in_transformers_generate_too(model, tokenizer):
    prompts = [tokenizer.render_for_completion([{"role": "user", "content": q}]) for q in ("hi", "what time is it")]
    constraint = CallConstraint(tokenizer, {tuple(prompts[0]): [WEATHER], tuple(prompts[1]): [CLOCK]}, max_string=4)
    width = max(map(len, prompts))
    ids = torch.tensor([[tokenizer.bos_token_id] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=200, do_sample=False, logits_processor=[constraint],
        eos_token_id=tokenizer.chat_stop_ids, pad_token_id=tokenizer.bos_token_id,
    )  # fmt: skip
    for row, tools in zip(out.tolist(), ([WEATHER], [CLOCK]), strict=True):
        text = tokenizer.decode_bytes(row[width:], skip_special_tokens=True).decode("utf-8", "replace")
        assert check_call(first_call(text), tools).valid
    with pytest.raises(ValueError, match="knows no tools for this prompt"):
        constraint.allowed(tokenizer.render_for_completion([{"role": "user", "content": "other"}]))
    with pytest.raises(ValueError, match="ends with <|assistant_start|>".replace("|", r"\|")):
        constraint.allowed([1, 2, 3])


def test_generation_stops_at_the_first_complete_call(tokenizer):
    stop = StopAtCall(tokenizer)
    prompt = tokenizer.render_for_completion([{"role": "user", "content": render_request([CLOCK], "time?")}])
    whole = tokenizer.encode_ordinary(render_call("clock", {}))
    assert stop(torch.tensor([prompt + whole])).tolist() == [True]
    assert stop(torch.tensor([prompt + whole[:-1]])).tolist() == [False]


@pytest.mark.parametrize(
    ("tools", "mode", "words"),
    [
        ([], "call", "at least one tool"),
        ([CLOCK], "sometimes", "mode 'sometimes'"),
        (
            [{"name": "f", "parameters": {"type": "object", "properties": {"a": {"pattern": "(?=a)b"}}}}],
            "call",
            "no usable grammar",
        ),
    ],
)
def test_unusable_tools_are_told_at_once(tokenizer, tools, mode, words):
    with pytest.raises(ValueError, match=words):
        CallConstraint(tokenizer, tools, mode)
