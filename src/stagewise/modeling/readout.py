"""Readouts: which boundary states speak for the next token, and how their voices are combined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .pooling import pool


class Experts:
    """Reads the product of some experts of the base."""

    def __init__(self, stages: Sequence[int], weights: Sequence[float] | None = None):
        self.stages, self.weights, self.last = tuple(stages), weights, max(stages)

    def scores(self, model, states: dict[int, Tensor], tap: Tensor | None, known: dict[int, Tensor]) -> Tensor:
        """Scores (B, M, V) from boundary states (B, M, D); `known` holds logits computed before and is added to."""
        missing = [k for k in self.stages if k not in known]
        if missing:
            logits = model.expert_logits(missing, [states[k] for k in missing])
            known.update(zip(missing, logits, strict=True))
        return pool([known[k] for k in self.stages], self.weights)


class Final:
    """Reads the final path: the last state with backout, the path's heads."""

    def __init__(self, last: int, path: str, head_mode: str | None):
        self.last, self.path, self.head_mode, self.stages = last, path, head_mode, (last,)

    def scores(self, model, states: dict[int, Tensor], tap: Tensor | None, known: dict[int, Tensor]) -> Tensor:
        return model.final_logits(states[self.last], tap, self.head_mode, self.path)


def tail(x: Tensor, counts: list[int], wanted: list[int]) -> Tensor:
    """The last `wanted[r]` of the first `counts[r]` positions of every row, left-aligned: (B, max wanted, D)."""
    width = max(wanted)
    first = [c - w for c, w in zip(counts, wanted, strict=True)]
    if len(set(first)) == 1 and first[0] >= 0:
        return x[:, first[0] : first[0] + width]
    index = torch.tensor(first, device=x.device)[:, None] + torch.arange(width, device=x.device)
    return x.take_along_dim(index.clamp(0, x.size(1) - 1)[..., None], dim=1)
