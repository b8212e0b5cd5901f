from __future__ import annotations

import numpy as np
import pytest
import torch

from stagewise.evaluation.agreement import Agreement, Calibration
from stagewise.evaluation.bpb import score_tokens


def scores_of(bigram_stages, seed=0, vocab=11, stages=3):
    generator = torch.Generator().manual_seed(seed)
    model = bigram_stages(
        2 * torch.randn(stages, vocab, vocab, generator=generator), torch.randn(vocab, vocab, generator=generator)
    )
    ids = torch.randint(0, vocab, (4, 65), generator=generator)
    targets = ids[:, 1:].clone()
    targets[0, :5] = -1
    return score_tokens(model, ids[:, :-1], targets, torch.ones(vocab, dtype=torch.long))


def test_agreement_is_the_share_of_equal_top_tokens(bigram_stages):
    names = ["stage_0", "stage_1", "stage_2", "prefix_3"]
    agreement = Agreement(names)
    batches = [scores_of(bigram_stages, seed) for seed in (0, 1)]
    for scores in batches:
        agreement.add(scores)
    top1 = np.concatenate([s.top1[[s.names.index(n) for n in names]][:, s.counted].numpy() for s in batches], axis=1)
    expected = [[float((a == b).mean()) for b in top1] for a in top1]
    assert np.allclose(agreement.matrix(), expected)
    assert agreement.tokens == top1.shape[1] == 2 * (4 * 64 - 5)


def test_calibration_error_equals_binning_by_hand(bigram_stages):
    scores, bins = scores_of(bigram_stages), 10
    calibration = Calibration(bins)
    calibration.add(scores)
    confidence = scores.confidence[:, scores.counted].numpy()
    hits = (scores.top1 == scores.targets)[:, scores.counted].numpy()
    for row, name in enumerate(scores.names):
        gap = 0.0
        for b in range(bins):
            inside = (confidence[row] * bins).astype(int).clip(0, bins - 1) == b
            if inside.any():
                gap += inside.mean() * abs(hits[row][inside].mean() - confidence[row][inside].mean())
        assert calibration.error()[name] == pytest.approx(gap, abs=1e-6)


def test_an_expert_that_is_always_sure_and_half_right_is_off_by_a_half(bigram_stages):
    table = torch.full((2, 2), -60.0)
    table[:, 1] = 60.0  # certain of token 1
    model = bigram_stages(table[None], table)
    inputs, targets = torch.zeros(1, 10, dtype=torch.long), torch.tensor([[0, 1] * 5])
    calibration = Calibration()
    calibration.add(score_tokens(model, inputs, targets, torch.ones(2, dtype=torch.long)))
    assert calibration.error()["stage_0"] == pytest.approx(0.5)
