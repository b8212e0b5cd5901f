"""What the stage heads have in common: singular directions, shared span, tokens they load on, and what dropping or
scaling them costs.

Design choices:
- A head is `W_k` (V, D), the matrix added to the shared head at boundary k. Singular triples come from the D x D Gram
  matrix in float64: the leading ones to full precision, without a V x V anything.
- The sign of a singular vector is arbitrary: it is fixed so that its largest entry is positive, and `joint_cosine`, the
  inner product of the rank-one maps u v', does not depend on it.
- Unique share of head k: the part of `W_k`, as a vector, outside the span of heads 0..k-1 (Gram-Schmidt), as a share of
  its squared norm; `unique_norm` is the same as a share of its norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

DEFAULT_BETAS = (0.0, 0.5, 1.0, 1.5, 2.0)


def stage_head_matrices(model: Any) -> list[Tensor]:
    """The K matrices (V, D) that belong to one stage each; `ValueError` when the model has only its shared head."""
    if not model.config.per_stage_head:
        raise ValueError("per_stage_head is false: this model has one shared head, so there are no heads to compare")
    return [head.weight.detach()[: model.config.vocab_size] for head in model.lm_head_stages]


def top_singular(matrix: Tensor, count: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triples of `matrix` (V, D): u (V, n), s (n,), v (D, n) in float64.

    Directions of a zero matrix are zero. Each u has its largest entry positive.
    """
    wide = matrix.double()
    values, vectors = torch.linalg.eigh(wide.T @ wide)  # ascending
    count = min(count, values.numel())
    v = vectors.flip(1)[:, :count]  # (D, n)
    u = wide @ v
    s = u.norm(dim=0)
    u = torch.where(s > 0, u / s.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    sign = torch.where(u.gather(0, u.abs().argmax(0, keepdim=True)) < 0, -1.0, 1.0)  # (1, n)
    return u * sign, s, v * sign


def singular_report(heads: Sequence[Tensor], count: int = 8) -> dict[str, Any]:
    """Leading singular values and energy of each head, and the cosines between their dominant directions (K, K).

    `energy` is the share of a head's squared norm in its dominant direction, `left_cosine` compares directions over the
    vocabulary, `right_cosine` over the hidden size, `joint_cosine` is their product.
    """
    triples = [top_singular(head, count) for head in heads]
    left = torch.stack([u[:, 0] for u, _, _ in triples])
    right = torch.stack([v[:, 0] for _, _, v in triples])
    norms = [float(head.double().square().sum()) for head in heads]
    return {
        "singular_values": [s.tolist() for _, s, _ in triples],
        "energy": [float(s[0] ** 2) / norm if norm else 0.0 for (_, s, _), norm in zip(triples, norms, strict=True)],
        "left_cosine": (left @ left.T).tolist(),
        "right_cosine": (right @ right.T).tolist(),
        "joint_cosine": ((left @ left.T) * (right @ right.T)).tolist(),
    }


def unique_shares(heads: Sequence[Tensor]) -> dict[str, list[float]]:
    """Gram-Schmidt over heads: `unique` (share of the squared norm) and `unique_norm` (share of the norm)."""
    gram = torch.stack([torch.stack([(a.double() * b.double()).sum() for b in heads]) for a in heads])  # (K, K)
    shares = []
    for k in range(len(heads)):
        own = float(gram[k, k])
        inside = 0.0
        if k and own > 0:
            earlier = torch.linalg.pinv(gram[:k, :k], hermitian=True)
            inside = float(gram[k, :k] @ earlier @ gram[:k, k])
        shares.append(min(1.0, max(0.0, 1.0 - inside / own)) if own > 0 else 0.0)
    return {"unique": shares, "unique_norm": [share**0.5 for share in shares]}


def loading_tokens(
    heads: Sequence[Tensor], decode: Callable[[int], str], count: int = 12
) -> list[dict[str, list[dict[str, Any]]]]:
    """Tokens with the largest entries of each head's dominant left direction, on its positive and negative side."""
    result = []
    for head in heads:
        u = top_singular(head)[0][:, 0]
        sides = {}
        for side, signed in (("positive", u), ("negative", -u)):
            top = signed.topk(min(count, u.numel()))
            sides[side] = [
                {"id": int(i), "token": decode(int(i)), "loading": float(value)}
                for value, i in zip(top.values, top.indices, strict=True)
            ]
        result.append(sides)
    return result


def lambdas_by_layer(model: Any) -> list[dict[str, float]]:
    """Residual and embedding factors of every layer: `{"layer", "resid", "x0"}`."""
    resid, x0 = model.resid_lambdas.tolist(), model.x0_lambdas.tolist()
    return [{"layer": i, "resid": a, "x0": b} for i, (a, b) in enumerate(zip(resid, x0, strict=True))]


@contextmanager
def scaled_heads(model: Any, betas: Sequence[float]) -> Iterator[None]:
    """The model with stage head k multiplied by `betas[k]` for the time of the block; the weights come back bit by
    bit.
    """
    originals = [head.weight.data for head in model.lm_head_stages]
    try:
        for head, original, beta in zip(model.lm_head_stages, originals, betas, strict=True):
            head.weight.data = original * beta
        yield
    finally:
        for head, original in zip(model.lm_head_stages, originals, strict=True):
            head.weight.data = original


def beta_sweep(model: Any, product_bpb: Callable[[], float], betas: Sequence[float] = DEFAULT_BETAS) -> dict[str, Any]:
    """Product BPB with heads scaled: `all` scales every head by beta, `without` drops one head (beta_k = 0).

    `product_bpb()` measures the model as it stands. Differences are against beta = 1.
    """
    stage_head_matrices(model)
    count = model.config.num_stages
    trained = product_bpb()

    def measured(factors: list[float]) -> float:
        with scaled_heads(model, factors):
            return product_bpb()

    sweep = []
    for beta in betas:
        bpb = trained if beta == 1.0 else measured([beta] * count)
        sweep.append({"beta": beta, "product_bpb": bpb, "difference": bpb - trained})
    without = []
    for k in range(count):
        bpb = measured([0.0 if j == k else 1.0 for j in range(count)])
        without.append({"stage": k, "product_bpb": bpb, "difference": bpb - trained})
    return {"product_bpb": trained, "all": sweep, "without": without}


def head_report(model: Any, decode: Callable[[int], str] | None = None) -> dict[str, Any]:
    """The whole analysis of a model's stage heads that needs no text."""
    heads = stage_head_matrices(model)
    report = {
        "norms": [float(head.double().norm()) for head in heads],
        **singular_report(heads),
        **unique_shares(heads),
    }
    if decode is not None:
        report["loading_tokens"] = loading_tokens(heads, decode)
    return report
