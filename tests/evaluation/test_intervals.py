from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from stagewise.evaluation import intervals
from stagewise.evaluation.intervals import interval, resampled_ratios

RNG = np.random.default_rng(7)
BYTES = RNG.integers(50, 500, 40).astype(float)
NATS = np.stack([BYTES * RNG.normal(0.7, 0.1, 40), BYTES * RNG.normal(0.6, 0.1, 40)])


def test_percentile_intervals_equal_scipys_bootstrap_draw_for_draw():
    ours = interval(resampled_ratios(NATS, BYTES, resamples=500, seed=3)[0])
    theirs = stats.bootstrap(
        (NATS[0], BYTES),
        lambda nats, count, axis: nats.sum(axis) / count.sum(axis),
        n_resamples=500,
        paired=True,
        method="percentile",
        vectorized=True,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), rel=1e-12)


def test_chunked_draws_equal_whole_draws(monkeypatch):
    whole = resampled_ratios(NATS, BYTES, resamples=50, seed=1)
    monkeypatch.setattr(intervals, "CHUNK", 120)
    assert np.allclose(resampled_ratios(NATS, BYTES, resamples=50, seed=1), whole, rtol=1e-12)


def test_an_interval_covers_the_truth_at_about_its_rate():
    covered = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        count = generator.integers(50, 500, 60).astype(float)
        nats = count * 0.7 + generator.normal(0, 20, 60)
        low, high = interval(resampled_ratios(nats[None], count, resamples=200, seed=trial)[0])
        covered += low <= 0.7 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_document_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 documents"):
        resampled_ratios(np.ones((1, 1)), np.ones(1))
