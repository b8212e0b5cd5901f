from __future__ import annotations

import pytest
import torch

from stagewise.modeling import load
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.specialist.composition import RULES, Composition, combination_rule, parse_members
from stagewise.specialist.delta import write_delta
from stagewise.specialist.growth import grow, open_parent, trainable_names

IDS = torch.randint(0, 265, (2, 40), generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def model(base_folder, tokenizer, tmp_path_factory):
    root = tmp_path_factory.mktemp("composition")
    parent = open_parent(base_folder("staged"))
    loaded = load(base_folder("staged"), dtype=torch.float64)
    for seed, name in enumerate(("chat", "tool", "cold")):
        specialist = grow(parent, 1 + seed % 2, tokenizer=tokenizer if name != "cold" else None, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in trainable_names(specialist):
                parameter = specialist.get_parameter(tensor)
                part = parameter[4:] if tensor.endswith("lambdas") else parameter
                part.add_(0.1 * torch.randn(part.shape, generator=generator))
        loaded.attach(name, write_delta(root / name, specialist, tokenizer, parent))
    return loaded


def last(model, ids, name):
    """A member's log-probabilities after `ids`, uncached."""
    if name == "base":
        return model.forward_aggregated(ids)[:, -1]
    if name.startswith("stage:"):
        return model.forward_stage(ids, int(name[6:]))[:, -1].log_softmax(-1)
    return model(ids, path=name).logits[:, -1].log_softmax(-1)


@pytest.mark.parametrize("members", ["chat + 0.5 tool", "chat - 0.3*base", "base + stage:0 + 2 cold", "tool"])
def test_a_log_pool_is_the_weighted_sum_of_the_members_log_probabilities(model, members):
    weights = parse_members(members)
    expected = sum(w * last(model, IDS, name) for name, w in weights.items()).log_softmax(-1)
    torch.testing.assert_close(Composition(model, members).log_probabilities(IDS), expected.detach())


def test_rules_do_what_they_say(model):
    one, two = last(model, IDS, "chat").detach(), last(model, IDS, "tool").detach()
    mixed = Composition(model, {"chat": 3, "tool": 1}, "mixture").log_probabilities(IDS)
    torch.testing.assert_close(mixed, (0.75 * one.exp() + 0.25 * two.exp()).log())
    certain = Composition(model, "chat + tool", "most_certain").log_probabilities(IDS)
    entropy = [-(p.exp() * p).sum(-1) for p in (one, two)]
    expected = torch.where((entropy[0] <= entropy[1])[:, None], one, two)
    torch.testing.assert_close(certain, expected)


def test_a_rule_is_a_function_under_a_decorator(model):
    @combination_rule("first")
    def first(logp, weights):
        return logp[0]

    try:
        found = Composition(model, "tool + chat", "first").log_probabilities(IDS)
        torch.testing.assert_close(found, last(model, IDS, "tool").detach())
    finally:
        del RULES["first"]


@pytest.mark.parametrize("members", ["chat + 0.5 tool", "base + cold"])
def test_cached_decoding_of_a_composition_equals_the_uncached_one(model, members):
    prompts = [IDS[0, :25].tolist(), IDS[1].tolist()]
    composition = Composition(model, members)
    found = composition.decode(prompts, SamplingParams(max_new_tokens=8, stop_tokens=[]))
    for prompt, tokens in zip(prompts, found.tokens, strict=True):
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(composition.log_probabilities(torch.tensor([ids]))[0].argmax()))
        assert tokens == ids[len(prompt) :]
    assert found.finish == ["length", "length"]


def test_a_composition_of_one_is_that_member(model):
    params = SamplingParams(max_new_tokens=8, stop_tokens=[])
    alone = decode(model, IDS.tolist(), Strategy(path="chat"), params)
    assert Composition(model, "chat").decode(IDS.tolist(), params).tokens == alone.tokens


def test_members_with_equal_overlays_share_the_bases_work(model, monkeypatch):
    runs = []
    plain = type(model).run_stage

    def counting(self, stage, hidden, inputs, cache=None):
        runs.append(stage)
        return plain(self, stage, hidden, inputs, cache)

    monkeypatch.setattr(type(model), "run_stage", counting)
    Composition(model, "chat + tool").log_probabilities(IDS)
    assert sorted(runs) == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("members", "rule", "words"),
    [
        ("chat + nobody", "log_op", "unknown path 'nobody'"),
        ("chat + stage:9", "log_op", "stage=9"),
        ("chat +* tool", "log_op", "cannot read"),
        ("chat + chat", "log_op", "named twice"),
        ("", "log_op", "cannot read"),
        ("chat", "vote", "unknown combination rule"),
    ],
)
def test_unusable_compositions_are_told(model, members, rule, words):
    with pytest.raises(ValueError, match=words):
        Composition(model, members, rule)
    with pytest.raises(ValueError, match="no negative weights"):
        Composition(model, "chat - tool", "mixture").log_probabilities(IDS)
