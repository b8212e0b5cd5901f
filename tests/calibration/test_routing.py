from __future__ import annotations

import numpy as np
import pytest

from stagewise.calibration.routing import largest_share, projected_speedup, routing_probe


def brute_force(margin, regression, cap, over):
    best = (0, None)
    for threshold in np.unique(margin):
        routed = margin >= threshold
        rate = regression[routed].sum() / (routed.sum() if over == "routed" else margin.size)
        if rate <= cap and routed.sum() > best[0]:
            best = (int(routed.sum()), float(threshold))
    return best


@pytest.mark.parametrize("over", ["routed", "all"])
def test_the_share_is_the_largest_any_threshold_allows(over):
    generator = np.random.default_rng(0)
    for trial in range(60):
        margin = generator.integers(0, 12, 40) / 4  # many ties
        regression = generator.random(40) < 0.1 + 0.3 * (margin < 1)
        for cap in (0.0, 0.05, 0.2):
            assert largest_share(margin, regression, cap, over) == brute_force(margin, regression, cap, over), trial


def test_a_probe_reports_rates_over_routed_and_over_all_positions(statistics_of):
    # by falling margin: both right, both right, full right only, stage 0 right only
    statistics = statistics_of([[4.0, 3.0, 2.0, 1.0], [0.0] * 4], [[1, 1, 2, 1], [1, 1, 1, 2]], targets=[1, 1, 1, 1])
    routed, over_all = routing_probe(statistics, early_cost=0.5, caps=(0.25,))
    assert routed["rate_over"] == "routed" and over_all["rate_over"] == "all"
    assert routed["routed_share"] == 1.0 and routed["threshold"] == 1.0
    assert routed["regression_over_routed"] == routed["regression_over_all"] == 0.25
    assert routed["accuracy_loss_over_all"] == 0.0  # one lost, one gained
    strict = routing_probe(statistics, early_cost=0.5, caps=(0.2,))[0]
    assert strict["routed_share"] == 0.5 and strict["regression_over_routed"] == 0.0
    assert strict["projected_speedup"] == pytest.approx(1 / 0.75)


def test_no_position_is_routed_when_the_surest_one_regresses(statistics_of):
    statistics = statistics_of([[2.0, 1.0], [0.0, 0.0]], [[2, 2], [1, 1]], targets=[1, 1])
    probe = routing_probe(statistics, 0.5, caps=(0.1,))[0]
    assert (probe["routed_share"], probe["threshold"], probe["projected_speedup"]) == (0.0, None, 1.0)


def test_the_projection_is_the_cards():
    assert projected_speedup(0.8505, 1 - 0.490) == pytest.approx(1.715, abs=5e-4)


def test_a_cap_outside_its_range_is_refused(statistics_of):
    with pytest.raises(ValueError, match="caps"):
        routing_probe(statistics_of([[1.0], [1.0]], [[0], [0]]), 0.5, caps=(2.0,))
