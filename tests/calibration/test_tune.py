"""The cost model on scripted numbers, the choice it leads to, and the file that mode auto reads."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from stagewise.calibration.cost_model import Costs, Trace, candidates, choose, interpolate, predict, replay
from stagewise.calibration.speculation import speculate
from stagewise.calibration.tune import agreement_traces, measure_costs, store_tuning, tune_command, tune_model
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy


def flat_costs(shallow=1.0, deep=(3.0,), head=0.5, growth=0.0, overhead=0.0):
    """Costs in ms: stage 0, deeper stages growing by `growth` of themselves with every further position, heads."""
    ns = (1, 2, 4, 9)
    stages = [{n: shallow for n in ns}] + [{n: d * (1 + growth * (n - 1)) for n in ns} for d in deep]
    return Costs(stages, {c: {n: c * head for n in ns} for c in range(1, len(stages) + 1)}, overhead=overhead)


def texts(*agreements):
    return [Trace(list(a), [True] * len(a)) for a in agreements]


def config(bounds=None, experts=2):
    return SimpleNamespace(num_stages=experts, poe_wand_p99_bounds_per_stage_head=bounds, per_stage_head=True)


def test_a_round_costs_what_the_formula_says():
    costs = flat_costs(shallow=1.0, deep=(2.0, 4.0), head=0.5, growth=0.1)
    assert costs.full() == pytest.approx(1 + 2 + 4 + 3 * 0.5)
    f, one = costs.share(0), costs.full()
    assert f == pytest.approx(1.5 / 8.5)
    for m in (1, 3, 8):
        v = interpolate(costs.pass_costs(0), m + 1)
        assert costs.round(m + 1, 0, 1) == pytest.approx(one * ((m + 1) * f + (1 - f) * v))
    assert costs.round(2, 1, 2) == pytest.approx(2 * (1 + 2 * 1.1**0 + 1.0) + 4 * 1.1 + 0.5)


def test_costs_between_measurements_are_linear_and_go_on_beyond_them():
    assert interpolate({1: 2.0, 3: 4.0}, 2) == 3.0
    assert interpolate({1: 2.0, 3: 4.0}, 5) == 6.0
    assert interpolate({2: 3.0}, 4) == 6.0


def test_replayed_rounds_keep_what_speculation_keeps():
    import numpy as np

    agree = (torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.8).tolist()
    for length in (1, 3, 8):
        rounds = list(replay(texts(agree), length))
        accepted, drafted, count = speculate(np.array(agree), length)
        assert (sum(r[3] for r in rounds), sum(r[2] for r in rounds), len(rounds)) == (accepted, drafted, count)
        assert sum(r[1] for r in rounds) == 200


def test_the_replay_is_what_the_decoder_does(tiny_model):
    """Tokens, rounds, drafts and acceptance of the model's real decoding, for fixed lengths and for verified WAND."""
    model = tiny_model(dtype=torch.float64)
    with torch.no_grad():  # experts that agree now and then
        for block in model.transformer["h"][2:]:
            block.attn.c_proj.weight.mul_(0.3)
            block.mlp.c_proj.weight.mul_(0.3)
        for head in model.lm_head_stages[1:]:
            noise = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
            head.weight.copy_(model.lm_head_stages[0].weight + 0.4 * noise)
    prompts = [[87, 5, 9, 33], [87, 12]]
    params = SamplingParams(16, stop_tokens=())
    full = [decode(model, [p], "full", params).tokens[0] for p in prompts]
    agreement, margins = agreement_traces(model, prompts, full)
    assert set(agreement) == {(0, 1), (1, 1), (1, 2)}
    for stage, drafters, length in ((0, 1, 3), (1, 1, 2), (1, 2, 5)):
        strategy = Strategy("speculative", draft_stage=stage, draft_prefix=drafters > 1, k_draft=length)
        for prompt, trace in zip(prompts, agreement[stage, drafters], strict=True):
            result = decode(model, [prompt], strategy, params)
            rounds = list(replay([trace], length))
            assert (len(rounds), sum(r[2] for r in rounds), sum(r[3] for r in rounds)) == (
                result.rounds, result.drafted, result.accepted,
            )  # fmt: skip
    least = sorted(margins[0])[len(margins[0]) // 2]
    strategy = Strategy("wand", verified=True, thresholds=(least, 0.0))
    result = decode(model, prompts, strategy, params)
    traces = [Trace(t.agree, [m > least for m in row]) for t, row in zip(agreement[0, 1], margins, strict=True)]
    rounds = list(replay(traces, strategy.max_pending))
    assert (len(rounds), sum(r[3] for r in rounds)) == (result.rounds, result.accepted)
    assert 0 < result.accepted < result.drafted


def test_predicted_speed_follows_measured_acceptance():
    costs = flat_costs(shallow=1.0, deep=(8.0,), head=0.5)
    always, never = texts([True] * 40), texts([False] * 40)
    assert predict(costs, [always], 3, 0, 1)["tokens_per_second"] == pytest.approx(1000 * 4 / (4 * 1.5 + 8.5))
    assert predict(costs, [never], 3, 0, 1)["tokens_per_round"] == 1
    a, m = 0.8, 3
    agree = (torch.rand(60000, generator=torch.Generator().manual_seed(1)) < a).tolist()
    assert predict(costs, [texts(agree)], m, 0, 1)["tokens_per_round"] == pytest.approx(
        (1 - a ** (m + 1)) / (1 - a), rel=0.02
    )


def test_the_best_length_grows_with_acceptance_and_shrinks_with_the_cost_of_wide_passes():
    generator = torch.Generator().manual_seed(2)

    def best(rate, growth):
        agree = (torch.rand(2000, generator=generator) < rate).tolist()
        costs = flat_costs(shallow=0.5, deep=(8.0,), head=0.2, growth=growth)
        return candidates(costs, {(0, 1): texts(agree)}, [], config(), 1)[0]["strategy"]

    assert best(0.95, 0.0).k_draft > best(0.6, 0.0).k_draft
    assert best(0.9, 0.0).k_draft > best(0.9, 0.3).k_draft


def test_speculation_is_off_where_it_would_lose():
    slow_draft = flat_costs(shallow=6.0, deep=(2.0,))
    ranked = candidates(slow_draft, {(0, 1): texts([True, False, False] * 30)}, [], config(), 1)
    assert ranked[0]["strategy"].mode == "full"
    entry, speed, full_speed = choose(ranked, lambda strategy: 50.0)
    assert (entry["strategy"].mode, speed, full_speed) == ("full", 50.0, 50.0)


def test_a_prediction_that_the_measurement_contradicts_is_not_believed():
    ranked = candidates(flat_costs(deep=(20.0,)), {(0, 1): texts([True] * 50)}, [], config(), 1)
    assert ranked[0]["strategy"].mode == "speculative" and ranked[0]["speedup"] > 2
    entry, *_ = choose(ranked, lambda strategy: 100.0)
    assert entry["strategy"].mode == "full"
    entry, speed, full_speed = choose(ranked, lambda strategy: 100.0 if strategy.mode == "full" else 190.0)
    assert (entry["strategy"].mode, speed, full_speed) == ("speculative", 190.0, 100.0)


def test_verified_wand_is_tried_with_bounds_and_wins_where_margins_tell_hits_from_misses():
    agree = ([True] * 7 + [False]) * 25
    margins = [[5.0 if a else 0.1 for a in agree]]
    costs = flat_costs(shallow=2.0, deep=(6.0,))
    traces = {(0, 1): texts(agree)}
    assert all(e["strategy"].mode != "wand" for e in candidates(costs, traces, margins, config(), 1))
    best = candidates(costs, traces, margins, config(bounds=[1.0]), 1)[0]
    assert best["strategy"].mode == "wand" and best["strategy"].verified and best["acceptance"] == 1.0
    assert best["strategy"].p99_bounds == (1.0,)


def test_rows_of_a_batch_wait_for_the_longest_draft():
    rounds = list(replay(texts([True] * 4, [False] * 4), 3))
    assert rounds[0] == (4, 5, 6, 3)
    assert sum(r[1] for r in rounds) == 8


def test_measured_costs_are_positive_for_every_stage_head_and_width(tiny_model):
    rows = [[87] + [5] * 20, [87] + [6] * 11]
    for changes in ({}, {"poe_mode": "none"}):
        model = tiny_model(**changes)
        costs = measure_costs(model, rows, widths=(1, 3), repeats=1)
        assert [set(s) for s in costs.stages] == [{1, 3}] * 3
        assert all(ms > 0 for s in costs.stages for ms in s.values())
        assert set(costs.heads) == (set() if changes else {1, 2, 3})
        assert bool(costs.target) == bool(changes)
        assert math.isfinite(costs.full())


def test_an_end_to_end_model_is_tuned_to_full(tiny_model):
    result = tune_model(tiny_model(poe_mode="none"), [[87, 3, 4]], max_new_tokens=12, repeats=1)
    assert result["strategy"]["mode"] == "full" and len(result["candidates"]) == 1


def test_the_file_is_what_mode_auto_decodes_with(tiny_model, tmp_path):
    model = tiny_model(poe_wand_p99_bounds_per_stage_head=[0.5, 0.2])
    result = tune_model(model, [[87, 3, 4], [87, 9]], max_new_tokens=12, repeats=1)
    assert {e["strategy"]["mode"] for e in result["candidates"]} == {"full", "speculative", "wand"}
    chosen = next(e["strategy"] for e in result["candidates"] if e["strategy"]["mode"] == "wand")
    store_tuning(tmp_path, {**result, "strategy": chosen})
    model.config._name_or_path = str(tmp_path)
    resolved = Strategy("auto").resolve(model)
    assert resolved == Strategy("wand", verified=True, safety=chosen["safety"], p99_bounds=(0.5, 0.2))
    params = SamplingParams(8, stop_tokens=())
    assert decode(model, [[87, 3]], "auto", params).tokens == decode(model, [[87, 3]], "full", params).tokens


def test_the_command_stores_predictions_measurements_and_where_they_come_from(small_model_folder, tmp_path, capsys):
    folder = small_model_folder(tmp_path / "model")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The expert\n", encoding="utf-8")
    tune_command(str(folder), prompts=prompts, max_new_tokens=12, repeats=1, dry_run=True)
    assert not (folder / "elastic.json").exists()
    tune_command(str(folder), prompts=prompts, max_new_tokens=12, repeats=1)
    shown = capsys.readouterr().out
    assert "predicted" in shown and "measured" in shown
    stored = json.loads((folder / "elastic.json").read_text(encoding="utf-8"))
    assert Strategy(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored["strategy"].items()}).lossless
    for name in ("predicted_tokens_per_second", "measured_tokens_per_second", "full_measured_tokens_per_second"):
        assert stored[name] > 0
    assert stored["batch"] == 1 and stored["dtype"] == "float32" and stored["hardware"]["cores"]
    assert stored["measured"]["stage_ms"] and stored["measured"]["acceptance"]
    assert [f.name for f in folder.iterdir() if f.name.endswith(".tmp")] == []
