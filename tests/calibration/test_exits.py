from __future__ import annotations

import pytest
import torch

from stagewise.calibration.exits import exit_depth, exit_statistics, exit_thresholds, wand_output


def rows_of(ids, groups=None):
    groups = torch.arange(ids.shape[0]) if groups is None else groups
    return [(ids[:, :-1], ids[:, 1:], groups)]


IDS = torch.randint(0, 7, (5, 21), generator=torch.Generator().manual_seed(4))


def test_statistics_are_those_of_the_running_mean_of_log_probabilities(random_stages):
    model = random_stages()
    got = exit_statistics(model, rows_of(IDS))
    logp = model.tables[:, IDS[:, :-1].reshape(-1)].log_softmax(-1)
    means = torch.stack([logp[: k + 1].mean(0) for k in range(3)])
    top = means.topk(2).values
    assert torch.allclose(got.margin, (top[..., 0] - top[..., 1]).float(), atol=1e-6)
    change = means[1:] - means[:-1]
    assert torch.allclose(got.spread, (change.amax(-1) - change.amin(-1)).float(), atol=1e-6)
    assert torch.equal(got.stage_top1, logp.argmax(-1))
    assert torch.equal(got.prefix_top1, means.argmax(-1))
    assert torch.equal(got.targets, IDS[:, 1:].reshape(-1))
    assert got.groups.tolist() == [row for row in range(5) for _ in range(20)]


def test_batches_add_up_and_max_tokens_is_exact(random_stages):
    model = random_stages()
    whole = exit_statistics(model, rows_of(IDS))
    parts = exit_statistics(model, rows_of(IDS[:2]) + rows_of(IDS[2:], torch.arange(2, 5)))
    assert torch.equal(whole.margin, parts.margin) and torch.equal(whole.groups, parts.groups)
    assert torch.equal(exit_statistics(model, rows_of(IDS), max_tokens=33).margin, whole.margin[:, :33])


def test_thresholds_are_suffix_sums_times_safety():
    assert exit_thresholds([3.0, 2.0, 1.0], 0.5) == [3.0, 1.5, 0.5]


def test_wand_emits_at_the_first_stage_whose_margin_exceeds_its_threshold(statistics_of):
    margin = [[5.0, 1.0, 1.0, 2.0], [0.0, 3.0, 1.0, 9.0], [0.0, 0.0, 0.0, 0.0]]
    statistics = statistics_of(margin, [[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]])
    assert exit_depth(statistics.margin, [2.0, 1.0]).tolist() == [0, 1, 2, 1]  # a margin equal to it does not exceed it
    assert wand_output(statistics, [2.0, 1.0])[0].tolist() == [10, 21, 32, 23]


def test_models_without_stages_and_text_without_tokens_are_refused(random_stages):
    with pytest.raises(ValueError, match="no stages that predict"):
        exit_statistics(random_stages(poe_mode="none"), rows_of(IDS))
    with pytest.raises(ValueError, match="at least two"):
        exit_statistics(random_stages(stages=1), rows_of(IDS))
    with pytest.raises(ValueError, match="only special tokens"):
        exit_statistics(random_stages(), rows_of(IDS), torch.zeros(7, dtype=torch.long))


def test_nan_logits_are_named(random_stages):
    model = random_stages()
    model.tables[2, 3] = float("nan")
    with pytest.raises(ValueError, match="stage_2 has NaN"):
        exit_statistics(model, rows_of(IDS))
