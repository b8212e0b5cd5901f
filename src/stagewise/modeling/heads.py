"""Next-token heads: the shared head, one per stage, one per specialist; all additive, softcapped in fp32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)


def wide(x: Tensor) -> Tensor:
    """x in fp32 when it is half precision, else as it is."""
    return x.float() if x.dtype in _HALF else x


def softcap(z: Tensor, cap: float) -> Tensor:
    """`cap * tanh(z / cap)`, z in fp32 or wider."""
    return torch.tanh(z / cap) * cap


def head_logits(x: Tensor, heads, cap: float, vocab_size: int) -> Tensor:
    """Softcapped logits (..., V) of the sum of `heads` on normed hidden states x (..., D).

    Each head is a linear module or a (Vpad, D) matrix. The sum is taken in fp32 or wider; padded vocabulary rows are
    cut off.
    """
    first, *rest = [wide(F.linear(x, head) if isinstance(head, Tensor) else head(x)) for head in heads]
    return softcap(sum(rest, first)[..., :vocab_size], cap)


def fold_heads(weights: list[Tensor]) -> Tensor:
    """One matrix (Vpad, D) equal to the sum of the heads: added in fp32 or wider, stored in their dtype."""
    total = wide(weights[0])
    for w in weights[1:]:
        total = total + wide(w)
    return total.to(weights[0].dtype)
