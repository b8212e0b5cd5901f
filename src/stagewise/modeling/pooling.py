"""Logarithmic opinion pooling: experts' distributions combined by a normalised geometric mean.

Per-expert normalisers cancel: pooling logits and pooling log-probabilities give scores that differ by a constant over
the vocabulary, so nothing here normalises before it must.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def expert_weights(count: int, weights: Sequence[float] | Tensor | None, like: Tensor) -> Tensor:
    """Weights of `count` experts, normalised to sum 1 (uniform when None): (count,) in the dtype of `like`."""
    if weights is None:
        return like.new_full((count,), 1.0 / count)
    w = torch.as_tensor(weights, dtype=like.dtype, device=like.device)
    if w.shape != (count,):
        raise ValueError(f"stage_weights has {w.numel()} entries for {count} experts")
    if bool((w < 0).any()) or not bool(w.sum() > 0):
        raise ValueError(f"stage_weights={w.tolist()} must be non-negative and not all zero")
    return w / w.sum()


def pool(experts: Tensor | Sequence[Tensor], weights=None, alpha: float = 0.0) -> Tensor:
    """Scores `K**alpha * sum_k w_k e_k` of the product of K experts.

    Args:
        experts: K tensors (..., V), or one (K, ..., V): log-probabilities, or logits where only ranking or a later
            `normalise` matters.
        weights: K non-negative numbers, normalised here; a tensor (K, ...) gives weights per position.
        alpha: 0 for the geometric mean, 1 for the plain product.
    Returns: scores (..., V); `normalise` turns them into log-probabilities.
    """
    count = len(experts)
    if isinstance(weights, Tensor) and weights.ndim > 1:
        w = (weights / weights.sum(0, keepdim=True)).unsqueeze(-1)
    else:
        w = expert_weights(count, weights, experts[0])
    score = experts[0] * w[0]
    for k in range(1, count):
        score = score + experts[k] * w[k]
    return score if alpha == 0 or count == 1 else score * float(count) ** alpha


def normalise(scores: Tensor) -> Tensor:
    """Log-probabilities (..., V) of scores or logits (..., V)."""
    return torch.log_softmax(scores, dim=-1)


def entropy_weights(log_probs: Tensor | Sequence[Tensor], tau: float = 1.0) -> Tensor:
    """Per-position weights proportional to `exp(-H(p_k) / tau)`: confident experts count more. Returns (K, ...)."""
    if tau <= 0:
        raise ValueError(f"tau={tau} must be positive")
    entropy = torch.stack([-(lp.exp() * lp).sum(-1) for lp in log_probs])
    return torch.softmax(-entropy / tau, dim=0)
