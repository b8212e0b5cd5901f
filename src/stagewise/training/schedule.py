"""How learning rate, Muon's momentum and weight decay move over a run.

Design choices
- Pure functions of the step: a resumed run needs no schedule state.
- One `Schedule` object sets all groups of an optimizer; groups keep their own `initial_lr`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.optim import Optimizer


@dataclass(frozen=True)
class Schedule:
    """Linear warmup, constant, linear warmdown; momentum and weight decay alongside.

    `steps` is the length of the run. The warmdown takes the last `warmdown_ratio` of it and ends at `final_lr_frac` of
    the peak. Muon's momentum rises from `momentum_start` to `momentum_peak` over `momentum_warmup_steps`, and falls to
    `momentum_end` over the warmdown. Weight decay follows half a cosine to zero.
    """

    steps: int
    warmup_steps: int = 40
    warmdown_ratio: float = 0.65
    final_lr_frac: float = 0.05
    momentum_start: float = 0.85
    momentum_peak: float = 0.97
    momentum_end: float = 0.90
    momentum_warmup_steps: int = 400
    weight_decay_cosine: bool = True

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.warmdown_ratio <= 1:
            raise ValueError(f"warmdown_ratio must lie in [0, 1], got {self.warmdown_ratio}")

    @property
    def warmdown_steps(self) -> int:
        """Steps of the final decline."""
        return round(self.warmdown_ratio * self.steps)

    def _warmdown_progress(self, step: int) -> float:
        """0 before the warmdown, 1 at the end of the run."""
        left = self.steps - step
        return 0.0 if left >= self.warmdown_steps else 1 - max(0, left) / self.warmdown_steps

    def lr_factor(self, step: int) -> float:
        """Multiple of the peak learning rate at `step` (0-based)."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = self._warmdown_progress(step)
        return 1 - progress + progress * self.final_lr_frac

    def momentum(self, step: int) -> float:
        """Muon's momentum at `step` (0-based)."""
        rise = min(1.0, step / self.momentum_warmup_steps) if self.momentum_warmup_steps else 1.0
        level = self.momentum_start + rise * (self.momentum_peak - self.momentum_start)
        progress = self._warmdown_progress(step)
        return level + progress * (self.momentum_end - level)

    def weight_decay_factor(self, step: int) -> float:
        """Multiple of the initial weight decay of Muon's matrices at `step` (0-based)."""
        return 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps))) if self.weight_decay_cosine else 1.0

    def apply(self, optimizer: Optimizer, step: int) -> float:
        """Set lr of every group, momentum and weight decay of the Muon groups; returns the learning-rate factor."""
        factor = self.lr_factor(step)
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
            if group["kind"] == "muon":
                group["momentum"] = self.momentum(step)
                group["weight_decay"] = group["initial_weight_decay"] * self.weight_decay_factor(step)
        return factor
