"""Lossless modes say, token by token, what an uncached oracle says; sampled ones have exactly its distribution."""

from __future__ import annotations

import itertools

import pytest
import torch

from stagewise.modeling.decoding import Decoder, decode
from stagewise.modeling.pooling import normalise, pool
from stagewise.modeling.sampling import Chooser, SamplingParams
from stagewise.modeling.strategy import Strategy

BOUNDS = (0.5, 0.2)
PROMPTS = [[87, 5, 9, 33, 12, 60, 2], [87], [87, 7, 7, 8, 20, 1, 3, 9, 30, 31, 32], [87, 40, 41]]


@torch.no_grad()
def oracle_scores(model, ids, experts=None, weights=None):
    """Scores after `ids`, recomputed from scratch: the mean log-probability of the experts, or the final path."""
    states, tap = model.run_path(model.stage_inputs(torch.tensor([ids]), path=model.default_path))
    if experts is None and (model.config.poe_mode == "none" or model.config.is_specialist):
        return model.final_logits(states[-1], tap)[0, -1]
    experts = range(model.config.num_stages) if experts is None else experts
    return pool([normalise(model.stage_logits(k, states[k])[0, -1]) for k in experts], weights)


def oracle(model, prompt, count, stop=(), **kwargs):
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(oracle_scores(model, ids, **kwargs).argmax()))
        if ids[-1] in stop:
            break
    return ids[len(prompt) :]


def agreeable(model):
    """Make the stages agree often: later stages add little to the first, as in a trained model."""
    with torch.no_grad():
        for block in model.transformer["h"][model.config.stage_ranges[0][1] :]:
            block.attn.c_proj.weight.mul_(0.3)
            block.mlp.c_proj.weight.mul_(0.3)
        for head in model.lm_head_stages[1:]:
            head.weight.copy_(model.lm_head_stages[0].weight + 0.2 * torch.randn_like(head.weight))
    return model


STRATEGIES = {
    "full": Strategy(),
    "speculative": Strategy(mode="speculative", k_draft=3),
    "speculative-1": Strategy(mode="speculative", k_draft=1, draft_stage=1),
    "speculative-prefix": Strategy(mode="speculative", draft_stage=1, draft_prefix=True, k_draft=5),
    "speculative-confident": Strategy(mode="speculative", k_draft=6, draft_confidence=0.3),
    "verified-wand": Strategy(mode="wand", verified=True, p99_bounds=BOUNDS),
    "verified-wand-eager": Strategy(mode="wand", verified=True, p99_bounds=BOUNDS, safety=0.0, max_pending=4),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("kind", ["random", "agreeable", "shared-head"])
def test_lossless_modes_equal_the_uncached_oracle_in_ragged_batches(tiny_model, dtype, name, kind):
    torch.manual_seed(0)
    model = tiny_model(dtype=dtype, per_stage_head=kind != "shared-head")
    if kind == "agreeable":
        agreeable(model)
    result = decode(model, PROMPTS, STRATEGIES[name], SamplingParams(max_new_tokens=24, stop_tokens=()))
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
        assert tokens == oracle(model, prompt, 24)
    if kind == "agreeable" and name == "speculative":
        assert 0.3 < result.acceptance < 1


@pytest.mark.parametrize("name", ["full", "speculative", "verified-wand-eager"])
def test_lossless_modes_equal_the_oracle_beyond_the_short_window(tiny_model, name):
    torch.manual_seed(0)
    model = agreeable(tiny_model(dtype=torch.float64, max_position_embeddings=512, scale=0.7))
    assert model.config.layer_windows[0] == 128
    prompts = [(PROMPTS[0] * 40)[:260], (PROMPTS[2] * 40)[:100]]
    result = decode(model, prompts, STRATEGIES[name], SamplingParams(max_new_tokens=60, stop_tokens=()))
    for prompt, tokens in zip(prompts, result.tokens, strict=True):
        assert tokens == oracle(model, prompt, 60)


def test_every_draft_rejected_and_every_draft_accepted_are_lossless(tiny_model):
    stubborn = tiny_model(dtype=torch.float64)
    with torch.no_grad():  # the first expert always favours one token, far above what the product lets through
        for head in stubborn.lm_head_stages[1:]:
            head.weight.mul_(3.0)
        stubborn.lm_head_stages[0].weight.copy_(-stubborn.lm_head.weight - stubborn.lm_head_stages[1].weight)
    echo = tiny_model(dtype=torch.float64)
    with torch.no_grad():  # later layers do nothing and every head is the same
        for block in echo.transformer["h"][2:]:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        echo.resid_lambdas[2:] = 1
        echo.x0_lambdas[2:] = 0
        for head in echo.lm_head_stages:
            head.weight.copy_(echo.lm_head_stages[0].weight)
    for model, low, high in ((stubborn, 0.0, 0.2), (echo, 1.0, 1.0)):
        result = decode(model, PROMPTS, Strategy(mode="speculative", k_draft=4), SamplingParams(21, stop_tokens=()))
        assert low <= result.acceptance <= high
        for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
            assert tokens == oracle(model, prompt, 21)


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_stop_token_inside_a_draft_and_the_length_limit_inside_a_draft(tiny_model, name):
    torch.manual_seed(0)
    model = agreeable(tiny_model(dtype=torch.float64))
    plain = [oracle(model, p, 30) for p in PROMPTS]
    for stop in {plain[0][4], plain[2][7]}:
        result = decode(model, PROMPTS, STRATEGIES[name], SamplingParams(30, stop_tokens=[stop]))
        for prompt, tokens, finish in zip(PROMPTS, result.tokens, result.finish, strict=True):
            expected = oracle(model, prompt, 30, stop=[stop])
            assert tokens == expected
            assert finish == ("stop" if expected[-1] == stop else "length")
    for limit in range(1, 8):
        result = decode(model, PROMPTS, STRATEGIES[name], SamplingParams(limit, stop_tokens=()))
        assert result.tokens == [p[:limit] for p in plain]
        assert [len(s) for s in result.stages_used] == [limit] * len(PROMPTS)


@pytest.mark.parametrize("mode, experts, weights", [
    (Strategy(mode="prefix", max_stages=2), [0, 1], None),
    (Strategy(mode="stage", stage=1), [1], None),
    (Strategy(mode="composition", stages=(0, 2), weights=(0.5, 1.0)), [0, 2], [0.5, 1.0]),
])  # fmt: skip
def test_shallow_and_composed_modes_equal_their_oracles(tiny_model, mode, experts, weights):
    model = tiny_model(dtype=torch.float64)
    result = decode(model, PROMPTS, mode, SamplingParams(16, stop_tokens=()))
    for prompt, tokens in zip(PROMPTS, result.tokens, strict=True):
        assert tokens == oracle(model, prompt, 16, experts=experts, weights=weights)
    assert result.stage_runs[max(experts) + 1 :] == [0] * (2 - max(experts))


def test_plain_wand_emits_from_the_first_stage_whose_margin_clears_its_threshold(tiny_model):
    model = tiny_model(dtype=torch.float64)
    bounds = (0.3, 0.3)
    result = decode(model, PROMPTS, Strategy(mode="wand", p99_bounds=bounds), SamplingParams(20, stop_tokens=()))
    seen = set()
    for prompt, tokens, used in zip(PROMPTS, result.tokens, result.stages_used, strict=True):
        ids = list(prompt)
        for token, stage in zip(tokens, used, strict=True):
            for k in range(3):
                scores = oracle_scores(model, ids, experts=range(k + 1))
                top = scores.topk(2).values
                if k == 2 or top[0] - top[1] > sum(bounds[k:]):
                    break
            assert (stage, token) == (k, int(scores.argmax()))
            seen.add(stage)
            ids.append(token)
    assert seen == {0, 1, 2}
    assert result.stage_runs[0] > result.stage_runs[2]


def test_modes_switch_in_the_middle_of_a_sequence_without_recomputing(tiny_model):
    model = tiny_model(dtype=torch.float64)
    cache, ids = None, list(PROMPTS[0])
    plan = [
        (Strategy(mode="prefix", max_stages=1), [0]),
        (Strategy(), None),
        (Strategy(mode="wand", p99_bounds=BOUNDS, verified=True), None),
        (Strategy(mode="stage", stage=1), [1]),
        (Strategy(mode="speculative"), None),
    ]
    ran = [0, 0, 0]
    for strategy, experts in plan:
        decoder = Decoder(
            model, [ids if cache is None else []], strategy, SamplingParams(6, stop_tokens=()), cache=cache
        )
        list(decoder.run())
        expected = oracle(model, ids, 6, experts=experts)
        assert decoder.result().tokens[0] == expected
        ids += expected
        cache = decoder.cache
        ran = [a + b for a, b in zip(ran, decoder.stage_runs, strict=True)]
    assert cache.ids[0] == ids
    assert cache.frontier(0)[0] >= len(ids) - 1


# -- sampling

SMALL = {"vocab_size": 12, "hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3, "smear_channels": 12}


def sequence_probabilities(model, prompt, length, params):
    """Exact joint distribution over all sequences of `length` tokens under the full model's processed scores."""
    chooser = Chooser(params, 1, "cpu")
    joint = {(): 1.0}
    for _ in range(length):
        longer = {}
        for past, p in joint.items():
            scores = normalise(oracle_scores(model, [*prompt, *past]))
            probs = torch.softmax(chooser.process(scores[None], [[*prompt, *past]])[0].double(), -1)
            for token, q in enumerate(probs.tolist()):
                if p * q > 0:
                    longer[(*past, token)] = p * q
        joint = longer
    return joint


def chi_square_p(counts, probabilities, total):
    """p-value of observed counts; rare outcomes are pooled so that every cell expects at least five."""
    from scipy.stats import chisquare

    cells = sorted(probabilities, key=probabilities.get, reverse=True)
    observed, expected, rest_o, rest_e = [], [], 0.0, 0.0
    for cell in cells:
        e = probabilities[cell] * total
        if e >= 5:
            observed.append(counts.get(cell, 0))
            expected.append(e)
        else:
            rest_o += counts.get(cell, 0)
            rest_e += e
    if rest_e > 0:
        observed.append(rest_o)
        expected.append(rest_e)
    assert sum(counts.get(c, 0) for c in cells) == total, "a sequence of probability zero was sampled"
    scale = sum(observed) / sum(expected)
    return chisquare(observed, [e * scale for e in expected]).pvalue


def sample_counts(model, prompt, strategy, params, batch, batches):
    counts: dict[tuple, int] = {}
    for i in range(batches):
        params.seed = i * batch
        for tokens in decode(model, [prompt] * batch, strategy, params).tokens:
            counts[tuple(tokens)] = counts.get(tuple(tokens), 0) + 1
    return counts


SAMPLED = [
    (Strategy(mode="speculative", k_draft=2), {"temperature": 1.0}, 400),
    (Strategy(mode="speculative", k_draft=1, draft_stage=1), {"temperature": 0.7, "top_k": 4}, 250),
    (
        Strategy(mode="speculative", k_draft=3, draft_prefix=True, draft_stage=1),
        {"temperature": 1.3, "top_p": 0.8},
        400,
    ),
    (Strategy(mode="speculative", k_draft=3), {"temperature": 1.0, "repetition_penalty": 1.5, "min_p": 0.05}, 100),
    (Strategy(mode="wand", verified=True, p99_bounds=BOUNDS), {"temperature": 1.0}, 400),
    (Strategy(mode="wand", verified=True, p99_bounds=BOUNDS, safety=0.0), {"temperature": 0.8, "top_p": 0.9}, 250),
]


@pytest.fixture(scope="module")
def sampler(tiny_model):
    torch.manual_seed(0)
    return tiny_model(scale=0.25, **SMALL)


@pytest.mark.parametrize("strategy, settings, batch", SAMPLED)
def test_sampled_lossless_modes_have_the_exact_joint_distribution(sampler, strategy, settings, batch):
    params = SamplingParams(max_new_tokens=3, stop_tokens=(), **settings)
    exact = sequence_probabilities(sampler, [3, 1], 3, params)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-6)
    total = 4000
    counts = sample_counts(sampler, [3, 1], strategy, params, batch, total // batch)
    assert chi_square_p(counts, exact, total) > 1e-3


def test_the_same_test_rejects_a_wrong_draft_distribution(sampler, monkeypatch):
    params = SamplingParams(max_new_tokens=3, stop_tokens=(), temperature=1.0)
    exact = sequence_probabilities(sampler, [3, 1], 3, params)
    right = Chooser.verify

    def wrong(self, draft, draft_scores, scores, row, position):
        return right(self, draft, draft_scores.flip(-1), scores, row, position)

    monkeypatch.setattr(Chooser, "verify", wrong)
    counts = sample_counts(sampler, [3, 1], Strategy(mode="speculative", k_draft=2), params, 400, 10)
    assert chi_square_p(counts, exact, 4000) < 1e-6


def test_gumbel_coupling_gives_the_same_text_in_every_lossless_mode(tiny_model):
    torch.manual_seed(0)
    model = agreeable(tiny_model(dtype=torch.float64))
    params = SamplingParams(20, temperature=0.9, top_p=0.95, seed=11, coupling="gumbel", stop_tokens=())
    texts = [decode(model, PROMPTS, s, params).tokens for s in STRATEGIES.values()]
    assert all(t == texts[0] for t in texts)
    other = decode(
        model, PROMPTS, "full", SamplingParams(20, temperature=0.9, seed=12, coupling="gumbel", stop_tokens=())
    )
    assert other.tokens != texts[0]


@pytest.mark.parametrize("strategy", ["full", "speculative:3"])
def test_a_row_is_sampled_by_its_own_seed_whatever_else_is_in_the_batch(tiny_model, strategy):
    model = tiny_model(dtype=torch.float64)
    params = SamplingParams(10, temperature=1.0, seed=[5, 6, 7, 8], stop_tokens=())
    batch = decode(model, PROMPTS, strategy, params).tokens
    for prompt, seed, tokens in zip(PROMPTS, [5, 6, 7, 8], batch, strict=True):
        alone = decode(model, [prompt], strategy, SamplingParams(10, temperature=1.0, seed=seed, stop_tokens=())).tokens
        assert alone[0] == tokens


def test_n_samples_from_one_prefill_equal_n_rows(tiny_model):
    model = tiny_model(dtype=torch.float64)
    for strategy in ("full", "speculative:2"):
        params = SamplingParams(8, temperature=1.0, seed=3, n=3, stop_tokens=())
        forked = decode(model, PROMPTS[:2], strategy, params).tokens
        rows = [p for p in PROMPTS[:2] for _ in range(3)]
        repeated = decode(model, rows, strategy, SamplingParams(8, temperature=1.0, seed=3, stop_tokens=())).tokens
        assert forked == repeated
        assert len(set(map(tuple, forked))) > 2


def test_log_probabilities_are_the_targets_before_temperature(tiny_model):
    model = tiny_model(dtype=torch.float64)
    params = SamplingParams(6, temperature=0.5, top_k=3, seed=1, logprobs=True, stop_tokens=())
    result = decode(model, PROMPTS[:1], "speculative", params)
    ids = list(PROMPTS[0])
    for token, logp in zip(result.tokens[0], result.logprobs[0], strict=True):
        assert logp == pytest.approx(float(normalise(oracle_scores(model, ids))[token]), abs=1e-8)
        ids.append(token)


def test_provisional_events_are_replaced_by_committed_ones(tiny_model):
    torch.manual_seed(0)
    model = agreeable(tiny_model(dtype=torch.float64))
    decoder = Decoder(model, PROMPTS, Strategy(mode="speculative", k_draft=3), SamplingParams(12, stop_tokens=()))
    committed = [[] for _ in PROMPTS]
    provisional = 0
    for event in decoder.run():
        if event.committed:
            committed[event.row] += event.tokens
        else:
            provisional += 1
    assert committed == decoder.result().tokens
    assert provisional == decoder.result().drafted


def test_bf16_with_fp32_attention_repeats_the_oracle_for_two_hundred_tokens(tiny_model):
    model = tiny_model(dtype=torch.bfloat16, fp32_attention=True, max_position_embeddings=512)
    result = decode(model, PROMPTS[:1], "full", SamplingParams(200, stop_tokens=()))
    ids = list(PROMPTS[0])
    for token in result.tokens[0]:
        scores = oracle_scores(model, ids)
        gap = float(scores.max() - scores[token])
        assert gap <= 0.05, f"not a tie: {gap}"
        ids.append(token)


@pytest.mark.parametrize("prompts, message", [
    ([[]], "prompt is empty"),
    ([[1, 400]], "outside the vocabulary"),
    ([[1] * 257], "the context 256"),
    ([[1] * 250], "exceed the context"),
])  # fmt: skip
def test_a_bad_row_gets_one_clear_error_and_spoils_no_other(tiny_model, prompts, message):
    model = tiny_model(dtype=torch.float64)
    params = SamplingParams(10, stop_tokens=())
    with pytest.raises(ValueError, match=message):
        decode(model, prompts, "full", params)
    result = decode(model, [PROMPTS[0], prompts[0]], "full", params, raise_errors=False)
    assert message in result.errors[1] and result.finish == ["length", "error"]
    assert result.tokens[0] == oracle(model, PROMPTS[0], 10)


def test_nan_logits_are_an_error_of_their_row(tiny_model):
    model = tiny_model()
    with torch.no_grad():
        model.transformer["wte"].weight[5] = float("nan")
    result = decode(
        model, [PROMPTS[1], PROMPTS[0]], "speculative", SamplingParams(3, stop_tokens=()), raise_errors=False
    )
    assert result.errors[0] is None and "NaN" in result.errors[1]


@pytest.mark.parametrize("strategy, message", [
    (Strategy(mode="stage", stage=3), "stage=3 is out of range"),
    (Strategy(mode="prefix", max_stages=0), "out of range"),
    (Strategy(mode="wand"), "stagewise calibrate"),
    (Strategy(mode="wand", p99_bounds=(1.0,)), "1 entries; 3 stages need 2"),
    (Strategy(mode="composition", stages=(0, 0)), "each once"),
    (Strategy(mode="speculative", draft_stage=7), "draft_stage=7"),
])  # fmt: skip
def test_impossible_strategies_are_refused(tiny_model, strategy, message):
    with pytest.raises(ValueError, match=message):
        decode(tiny_model(), PROMPTS, strategy)


def test_unknown_modes_and_end_to_end_models_are_refused(tiny_model):
    with pytest.raises(ValueError, match="unknown mode 'fast'"):
        decode(tiny_model(), PROMPTS, "fast")
    model = tiny_model(poe_mode="none")
    for mode in ("prefix:1", "stage:0", "wand", "speculative"):
        with pytest.raises(ValueError, match="no valid intermediate experts"):
            decode(model, PROMPTS, mode)
    assert decode(model, PROMPTS, "full", SamplingParams(5, stop_tokens=())).tokens[0] == oracle(model, PROMPTS[0], 5)


def test_all_pairs_of_lengths_survive_batching(tiny_model):
    """Two rows of every combination of short lengths: ragged arithmetic has no special cases left."""
    model = tiny_model(dtype=torch.float64)
    base = [87, 4, 9, 1, 30, 22]
    for a, b in itertools.product((1, 2, 5), repeat=2):
        prompts = [base[:a], base[::-1][:b]]
        result = decode(model, prompts, "speculative:2", SamplingParams(5, stop_tokens=()))
        assert result.tokens == [oracle(model, p, 5) for p in prompts]
