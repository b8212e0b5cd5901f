"""A certificate for early exits: P(E[disagreement] <= epsilon) >= 1 - delta over prompts like those calibrated on.

Design choices:
- The prompt is the exchangeable unit, its loss a number in [0, 1]: by default whether WAND's text differs from the
  full model's greedy text at all (`text`), else the share of its tokens that differ given the full model's text
  (`token`). Teacher-forcing loses nothing for `text`: until the first disagreement both texts are the same.
- Safety factors are walked from conservative to aggressive and tested one after the other at level delta
  (fixed-sequence testing: no correction is due); the walk stops at the first that fails, the last that passed is kept.
- p-values are Hoeffding-Bentkus (Bates et al. 2021, Angelopoulos et al. 2021), valid at any n.
- The order of the safety factors and the bounds must not come from the certified prompts.
- No failure among n prompts certifies only about log(1/delta)/n: about 3/n at delta 0.05.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stagewise.calibration.exits import ExitStatistics, exit_thresholds, wand_output
from stagewise.evaluation.provenance import write_json

FILE_NAME = "certificate.json"
LOSSES = ("text", "token")
SAFETY_WALK = (4.0, 3.0, 2.5, 2.0, 1.75, 1.5, 1.25, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05, 0.0)


def binomial_cdf(k: int, n: int, p: float) -> float:
    """P(Bin(n, p) <= k)."""
    if k >= n:
        return 1.0
    if k < 0:
        return 0.0
    if p <= 0 or p >= 1:
        return 1.0 if p <= 0 else 0.0
    i = np.arange(k + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    terms = log_factorial[n] - log_factorial[i] - log_factorial[n - i] + i * math.log(p) + (n - i) * math.log1p(-p)
    top = terms.max()
    return min(1.0, float(np.exp(top) * np.exp(terms - top).sum()))


def hoeffding_bentkus(mean: float, n: int, epsilon: float) -> float:
    """p-value for "the expected loss exceeds epsilon", from the mean of n independent losses in [0, 1].

    `min(exp(-n h(min(mean, eps), eps)), e P(Bin(n, eps) <= ceil(n mean)))` with the binary relative entropy h.
    """
    a = min(mean, epsilon)
    h = (a * math.log(a / epsilon) if a > 0 else 0.0) + ((1 - a) * math.log((1 - a) / (1 - epsilon)) if a < 1 else 0.0)
    count = math.ceil(round(n * mean, 9))  # a sum of k failures is k, whatever its floating-point mean
    return min(1.0, math.exp(-n * h), math.e * binomial_cdf(count, n, epsilon))


def prompts_needed(epsilon: float, delta: float) -> int:
    """Fewest prompts that can certify `epsilon` at `delta`, none of them failing."""
    return math.ceil(math.log(1 / delta) / -math.log1p(-epsilon))


def fixed_sequence(losses: np.ndarray, epsilon: float, delta: float) -> tuple[int, list[float]]:
    """Index of the last setting certified, -1 for none, and the p-values of those tested.

    `losses` (S, n) in [0, 1]: one row per setting, from conservative to aggressive, fixed before the data were seen.
    """
    if not 0 < epsilon < 1 or not 0 < delta < 1:
        raise ValueError(f"epsilon and delta must lie strictly between 0 and 1, got {epsilon} and {delta}")
    n = losses.shape[1]
    p_values: list[float] = []
    for row in losses:
        p_values.append(hoeffding_bentkus(float(row.mean()), n, epsilon))
        if p_values[-1] > delta:
            return len(p_values) - 2, p_values
    return len(p_values) - 1, p_values


def prompt_losses(
    statistics: ExitStatistics, bounds: Sequence[float], safeties: Sequence[float], loss: str = "text"
) -> tuple[np.ndarray, np.ndarray]:
    """Losses (S, n) per safety factor and prompt, and the mean exit depth (S,) in stages."""
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} must be one of {', '.join(LOSSES)}")
    _, index = np.unique(statistics.groups.numpy(), return_inverse=True)
    lengths = np.bincount(index)
    losses, depths = [], []
    for safety in safeties:
        tokens, depth = wand_output(statistics, exit_thresholds(list(bounds), safety))
        wrong = np.bincount(index, weights=(tokens != statistics.prefix_top1[-1]).double().numpy())
        losses.append(wrong / lengths if loss == "token" else (wrong > 0).astype(float))
        depths.append(float(depth.double().mean()) + 1)
    return np.stack(losses), np.array(depths)


def certify(
    statistics: ExitStatistics,
    bounds: Sequence[float],
    *,
    epsilon: float = 0.05,
    delta: float = 0.05,
    loss: str = "text",
    safeties: Sequence[float] = SAFETY_WALK,
) -> dict[str, Any]:
    """Walk the safety factors and certify the most aggressive that passes.

    `statistics` are teacher-forced on the full model's greedy continuations, `groups` numbering the prompts. Returns
    `safety` and `thresholds` (K-1, nats: emit at stage k when the margin exceeds the k-th), `n`, `epsilon`, `delta`,
    `loss`, `disagreement` (mean loss observed), `p_value`, `mean_stages` and the whole `walk`. Raises `ValueError` when
    nothing passes, saying how many prompts can certify `epsilon`.
    """
    if list(safeties) != sorted(safeties, reverse=True):
        raise ValueError("safeties must fall from conservative to aggressive")
    losses, depths = prompt_losses(statistics, bounds, safeties, loss)
    n = losses.shape[1]
    last, p_values = fixed_sequence(losses, epsilon, delta)
    if last < 0:
        raise ValueError(
            f"no certificate: {n} prompts cannot show disagreement <= {epsilon} at delta {delta} even at safety "
            f"{safeties[0]} ({losses[0].mean():.4f} observed); without any failure it takes at least "
            f"{prompts_needed(epsilon, delta)} prompts: give more prompts or a larger epsilon"
        )
    walk = [
        {"safety": safety, "disagreement": float(row.mean()), "p_value": p, "mean_stages": float(depth)}
        for safety, row, p, depth in zip(safeties, losses, p_values, depths, strict=False)
    ]
    return {
        "method": "fixed-sequence testing, Hoeffding-Bentkus p-values, prompts exchangeable",
        "safety": float(safeties[last]),
        "thresholds": exit_thresholds([float(bound) for bound in bounds], float(safeties[last])),
        "p99_bounds": [float(bound) for bound in bounds],
        "n": n,
        "tokens": statistics.tokens,
        "epsilon": epsilon,
        "delta": delta,
        "loss": loss,
        "disagreement": walk[last]["disagreement"],
        "p_value": walk[last]["p_value"],
        "mean_stages": walk[last]["mean_stages"],
        "walk": walk,
    }


def store_certificate(folder: str | Path, certificate: dict[str, Any]) -> Path:
    """Write `certificate.json` into a model folder, atomically; returns its path."""
    path = Path(folder) / FILE_NAME
    write_json(path, certificate)
    return path
