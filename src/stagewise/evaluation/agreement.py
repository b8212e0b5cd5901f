"""How far predictors agree with each other and with their own confidence: streaming counts over token scores.

`Agreement` counts how often each pair of predictors names the same top token. `Calibration` bins the confidence of
each predictor; the expected calibration error is the mean over bins of |accuracy - confidence|, weighted by tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stagewise.evaluation.bpb import TokenScores


class Agreement:
    """Share of tokens on which each pair of the named predictors has the same top token."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.same = torch.zeros(len(names), len(names), dtype=torch.int64)
        self.tokens = 0

    def add(self, scores: TokenScores) -> None:
        rows = [scores.names.index(name) for name in self.names]
        top1 = scores.top1[rows][:, scores.counted]  # (E, n)
        self.same += torch.stack([(top1 == row).sum(1) for row in top1]).cpu()
        self.tokens += top1.shape[1]

    def matrix(self) -> list[list[float]]:
        """(E, E) shares in the order of `names`; the diagonal is 1."""
        return (self.same.double() / max(self.tokens, 1)).tolist()


class Calibration:
    """Expected calibration error of every predictor over equal-width confidence bins."""

    def __init__(self, bins: int = 15) -> None:
        self.bins = bins
        self.names: list[str] = []
        self.counts = self.hits = self.confidence = torch.zeros(0)  # (M, bins)

    def add(self, scores: TokenScores) -> None:
        confidence = scores.confidence[:, scores.counted].double()  # (M, n)
        hits = (scores.top1 == scores.targets)[:, scores.counted].double()
        place = (confidence * self.bins).long().clamp(0, self.bins - 1)

        def binned(values: Tensor) -> Tensor:
            empty = torch.zeros(len(scores.names), self.bins, dtype=torch.float64, device=values.device)
            return empty.scatter_add(1, place, values).cpu()

        parts = binned(torch.ones_like(confidence)), binned(hits), binned(confidence)
        if not self.names:
            self.names = scores.names
            self.counts, self.hits, self.confidence = (torch.zeros_like(part) for part in parts)
        self.counts += parts[0]
        self.hits += parts[1]
        self.confidence += parts[2]

    def error(self) -> dict[str, float]:
        """Expected calibration error by predictor name."""
        gaps = (self.hits - self.confidence).abs().sum(1) / self.counts.sum(1)
        return dict(zip(self.names, gaps.tolist(), strict=True))
