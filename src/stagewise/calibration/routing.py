"""Routing probe: how many positions the first stage could answer alone, at a cap on what that costs in accuracy.

Positions are routed to stage 0 when its margin reaches a threshold. A regression is a position the full product gets
right and stage 0 gets wrong. The probe finds the largest routed share whose regression rate stays within the cap, once
with the rate taken over the routed positions (the stricter reading) and once over all positions; the net change of
accuracy stands beside both. Projected speed-up: `1 / (1 - r (1 - f))`, r the share, f the cost of stage 0 with its
head as a share of the full model (model card).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stagewise.calibration.exits import ExitStatistics

DEFAULT_CAPS = (0.005, 0.010, 0.020, 0.050)


def projected_speedup(share: float, early_cost: float) -> float:
    """`1 / (1 - r (1 - f))`."""
    return 1.0 / (1.0 - share * (1.0 - early_cost))


def largest_share(margin: np.ndarray, regression: np.ndarray, cap: float, over: str) -> tuple[int, float | None]:
    """Number of positions routed and the threshold (routed: margin >= threshold; None when no position may be).

    `margin` (N,), `regression` (N,) boolean; `over` is "routed" or "all", what the rate is a share of. Positions of
    equal margin are routed together.
    """
    order = np.argsort(-margin, kind="stable")
    sorted_margin, regressions = margin[order], np.cumsum(regression[order])
    routed = np.arange(1, margin.size + 1)
    rate = regressions / (routed if over == "routed" else margin.size)
    ends_tie = np.append(sorted_margin[1:] < sorted_margin[:-1], True)
    allowed = np.flatnonzero((rate <= cap) & ends_tie)
    if not allowed.size:
        return 0, None
    return int(allowed[-1]) + 1, float(sorted_margin[allowed[-1]])


def routing_probe(
    statistics: ExitStatistics, early_cost: float, caps: tuple[float, ...] = DEFAULT_CAPS
) -> list[dict[str, Any]]:
    """For every cap and both readings of the rate: `routed_share`, `threshold` in nats, the regression rates over
    routed and over all positions, the net accuracy change over routed and over all, and `projected_speedup`."""
    margin = statistics.margin[0].double().numpy()
    first = (statistics.prefix_top1[0] == statistics.targets).numpy()
    full = (statistics.prefix_top1[-1] == statistics.targets).numpy()
    regression = full & ~first
    rows = []
    for cap in caps:
        if not 0 <= cap <= 1:
            raise ValueError(f"caps must lie in [0, 1], got {cap}")
        for over in ("routed", "all"):
            count, threshold = largest_share(margin, regression, cap, over)
            routed = margin >= threshold if threshold is not None else np.zeros(margin.shape, bool)
            lost, net = int(regression[routed].sum()), int(full[routed].sum()) - int(first[routed].sum())
            share = count / margin.size
            rows.append(
                {
                    "cap": cap,
                    "rate_over": over,
                    "routed_share": share,
                    "threshold": threshold,
                    "regression_over_routed": lost / count if count else 0.0,
                    "regression_over_all": lost / margin.size,
                    "accuracy_loss_over_routed": net / count if count else 0.0,
                    "accuracy_loss_over_all": net / margin.size,
                    "projected_speedup": projected_speedup(share, early_cost),
                }
            )
    return rows
