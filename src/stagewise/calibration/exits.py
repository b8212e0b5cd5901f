"""What every exit decision could have been, token by token: one streaming pass that all calibrations read.

For N tokens and K experts: margins of the running product C_k (top one minus second), the spread of each step from
C_k to C_{k+1}, and the top tokens of every stage and every prefix. A few numbers a token, never vocabulary-sized.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagewise.evaluation.bpb import expert_count, inference, score_tokens


@dataclass
class ExitStatistics:
    """Per-token figures of K experts over N tokens; `groups` (N,) says which document or prompt a token is of."""

    margin: Tensor  # (K, N) of C_1..C_K, nats
    spread: Tensor  # (K-1, N) max - min over the vocabulary of C_{k+1} - C_k, nats
    stage_top1: Tensor  # (K, N)
    prefix_top1: Tensor  # (K, N); the last row is the full product's
    targets: Tensor  # (N,)
    groups: Tensor  # (N,)

    @property
    def experts(self) -> int:
        return self.margin.shape[0]

    @property
    def tokens(self) -> int:
        return self.margin.shape[1]

    def where(self, keep: Tensor) -> ExitStatistics:
        """The same figures for some of the tokens: a boolean mask or indices."""
        return ExitStatistics(
            self.margin[:, keep],
            self.spread[:, keep],
            self.stage_top1[:, keep],
            self.prefix_top1[:, keep],
            self.targets[keep],
            self.groups[keep],
        )


def require_experts(model: Any) -> int:
    """K; `ValueError` for a model whose intermediate stages predict nothing."""
    experts = expert_count(model)
    if experts == 0:
        raise ValueError("poe_mode is none: this model has no stages that predict, so there is nothing to calibrate")
    if experts == 1:
        raise ValueError("poe_stage_layers has one stage: an early exit needs at least two")
    return experts


def exit_statistics(
    model: Any,
    rows: Iterable[tuple[Tensor, Tensor, Tensor]],
    token_byte_lengths: Tensor | None = None,
    *,
    max_tokens: int | None = None,
) -> ExitStatistics:
    """Collect exit figures over rows of (inputs (B, T), targets (B, T), groups (B,)); targets of -1 are left out.

    With `token_byte_lengths` (V,) targets without bytes (special tokens) are left out too. Stops at `max_tokens`
    exactly. Raises `ValueError` for a model without stages, on logits that are not finite, and when nothing is left.
    """
    experts = require_experts(model)
    if token_byte_lengths is None:
        token_byte_lengths = torch.ones(int(model.config.vocab_size), dtype=torch.long)
    parts: list[tuple[Tensor, ...]] = []
    total = 0
    with inference(model):
        for inputs, targets, groups in rows:
            scores = score_tokens(model, inputs, targets, token_byte_lengths, final=False, exits=True)
            keep = scores.counted
            assert scores.margin is not None and scores.spread is not None
            row_of = torch.arange(inputs.shape[0]).repeat_interleave(inputs.shape[1])
            part = (
                scores.margin[:, keep].cpu(),
                scores.spread[:, keep].cpu(),
                scores.top1[:experts, keep].cpu(),
                scores.top1[experts : 2 * experts, keep].cpu(),
                scores.targets[keep].cpu(),
                groups[row_of[keep.cpu()]],
            )
            parts.append(part)
            total += part[4].numel()
            if max_tokens is not None and total >= max_tokens:
                break
    if not total:
        raise ValueError("the calibration text holds no token to predict (no rows, or only special tokens)")
    statistics = ExitStatistics(*(torch.cat(part, dim=-1) for part in zip(*parts, strict=True)))
    return statistics if max_tokens is None or total <= max_tokens else statistics.where(torch.arange(max_tokens))


def exit_thresholds(bounds: list[float], safety: float = 1.0) -> list[float]:
    """Margins above which WAND emits at stage k: `safety * sum_{j >= k} b_j`, K-1 numbers (model card, WAND)."""
    return [safety * sum(bounds[k:]) for k in range(len(bounds))]


def exit_depth(margin: Tensor, thresholds: list[float]) -> Tensor:
    """Index (N,) of the stage that emits: the first whose margin exceeds its threshold, else the last."""
    open_door = margin[:-1] > torch.tensor(thresholds, dtype=margin.dtype)[:, None]  # (K-1, N)
    last = torch.ones_like(open_door[:1])
    return torch.cat([open_door, last]).int().argmax(0)


def wand_output(statistics: ExitStatistics, thresholds: list[float]) -> tuple[Tensor, Tensor]:
    """Tokens WAND would emit (N,) and the stages that emit them (N,), given the true text before each."""
    depth = exit_depth(statistics.margin, thresholds)
    return statistics.prefix_top1.gather(0, depth[None])[0], depth
