"""Bootstrap intervals over documents for ratios such as bits per byte.

Design choices:
- The document is the unit that is resampled: tokens of one document are not independent.
- A figure is a ratio of sums (nats over bytes, hits over tokens); each resample sums the same documents in both.
- Two models on the same documents share every resample, so the interval of their difference is paired.
- Percentile intervals, one seeded generator: the same seed gives the same interval.
"""

from __future__ import annotations

import numpy as np

CHUNK = 1 << 22  # indices drawn at once


def resampled_ratios(
    numerators: np.ndarray, denominator: np.ndarray, *, resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Ratios of sums under resampling of documents.

    `numerators` (M, n) and `denominator` (n,) hold one value per document; gives (M, resamples).
    """
    numerators, denominator = np.asarray(numerators, np.float64), np.asarray(denominator, np.float64)
    n = denominator.shape[0]
    if n < 2:
        raise ValueError(f"an interval over documents needs at least 2 documents, got {n}")
    generator = np.random.default_rng(seed)
    stacked = np.concatenate([numerators, denominator[None]])  # (M + 1, n)
    parts = []
    rows = max(1, CHUNK // n)
    for start in range(0, resamples, rows):
        draws = generator.integers(0, n, (min(rows, resamples - start), n))  # (R, n)
        counts = np.stack([np.bincount(draw, minlength=n) for draw in draws])  # (R, n)
        parts.append(stacked @ counts.T)  # (M + 1, R)
    sums = np.concatenate(parts, axis=1)
    return sums[:-1] / sums[-1]


def interval(samples: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """The central percentile interval of bootstrap samples."""
    tail = (1 - confidence) / 2
    low, high = np.quantile(samples, [tail, 1 - tail])
    return float(low), float(high)
