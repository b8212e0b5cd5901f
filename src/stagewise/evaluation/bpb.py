"""Bits per byte of every expert, every prefix product and the final path, in one streaming pass.

Design choices:
- One function, `score_tokens`, turns a batch into per-token figures (never vocabulary-sized); BPB, accuracy,
  agreement, calibration error and bootstrap intervals are all sums over its result.
- Logits exist for a chunk of tokens at a time: K x chunk x V fp32 values, bounded by `CHUNK_VALUES`.
- Per-stage normalisers cancel in a product of experts, so a prefix product is the softmax of the running mean of
  logits.
- Special tokens (no bytes) count neither in nats nor in bytes nor in accuracy.
- Three figures are kept apart: `mean_stage_bpb` (mean of the stages' own BPB), `product_bpb` (renormalised Log-OP of
  all experts) and `final_path_bpb` (the trunk's last layer with backout, what a model trained end to end predicts
  with).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stagewise.modeling.pooling import entropy_weights, pool

CHUNK_VALUES = 1 << 24  # logits alive at once: 64 MiB in fp32, small enough for the last cache to help


@dataclass
class TokenScores:
    """Per-token figures of one batch; M predictors, named in `names`: stages, prefixes 1..K, then optional ones.

    `nll` (M, N) nats in float64, `top1` (M, N) token ids, `confidence` (M, N) the probability of the top token,
    for the N = B*T flattened positions; `counted` (N,) marks the positions whose target is a token with bytes.
    Values at positions that are not counted are zero. With `exits` also, of the running means C_k of the experts'
    log-probabilities: `margin` (K, N), the top one minus the second, and `spread` (K-1, N), max - min over the
    vocabulary of C_{k+1} - C_k: the most by which the next expert can change a margin (Jeong 2026, WAND).
    """

    names: list[str]
    nll: Tensor  # (M, N) float64
    top1: Tensor  # (M, N) int64
    confidence: Tensor  # (M, N) float32
    targets: Tensor  # (N,) int64
    counted: Tensor  # (N,) bool
    token_bytes: Tensor  # (N,) int64, zero where not counted
    margin: Tensor | None = None  # (K, N) float32
    spread: Tensor | None = None  # (K-1, N) float32

    def row(self, name: str) -> int:
        """Index of a predictor; `ValueError` naming those there are."""
        if name not in self.names:
            raise ValueError(f"no predictor {name}; this model has {', '.join(self.names)}")
        return self.names.index(name)


def expert_count(model: Any) -> int:
    """Number of base experts that were trained to predict: K, or 0 for a model trained end to end."""
    return 0 if model.config.poe_mode == "none" else int(model.config.num_stages)


def default_output(model: Any) -> str:
    """What a plain forward of the model predicts with: "product" for a staged base, else "final_path"."""
    return "product" if expert_count(model) and not model.config.is_specialist else "final_path"


@contextmanager
def inference(model: Any):
    """Evaluation mode without gradients; the model's training flag is put back on leaving."""
    training = getattr(model, "training", False)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def boundary_states(
    model: Any, ids: Tensor, *, final: bool = True, stages: int | None = None
) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Run the trunk once: hidden states at every expert's boundary, and the last state and tap of the final path.

    `ids` (B, T) gives K tensors (B, T, D) (none for a model trained end to end), then hidden (B, T, D) and tap (B, T,
    D) of the final path (None, None with `final=False`). A specialist's final path starts from its own overlay of the
    base, so it is a second run.
    """
    states: list[Tensor] = []
    hidden, tap = None, None
    if expert_count(model) and stages != 0:
        states, tap = model.run_path(model.stage_inputs(ids, path="base"), None if final else stages)
        hidden = states[-1]
    if not final:
        return states, None, None
    if not states or model.default_path != "base":
        last, tap = model.run_path(model.stage_inputs(ids, path=model.default_path))
        hidden = last[-1]
    return states, hidden, tap


def chunk_size(model: Any, experts: int) -> int:
    """Tokens whose logits may be alive at once."""
    return max(16, CHUNK_VALUES // (max(experts, 1) * int(model.config.vocab_size)))


def check_byte_lengths(model: Any, token_byte_lengths: Tensor) -> Tensor:
    """The lengths on the model's device; `ValueError` when they belong to another vocabulary."""
    if token_byte_lengths.numel() != model.config.vocab_size:
        raise ValueError(
            f"token_byte_lengths has {token_byte_lengths.numel()} entries, vocab_size is {model.config.vocab_size}: "
            "evaluate a model with its own tokenizer"
        )
    return token_byte_lengths.to(model.device)


def check_finite(value: Tensor, name: str) -> None:
    """`ValueError` when a predictor's normaliser is not finite."""
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} has NaN or infinite logits: the weights are damaged or training diverged")


def predictor_names(experts: int, *, final: bool, entropy_weighted: bool) -> list[str]:
    """Names of the predictors of a model, in the order of `TokenScores`."""
    names = [f"stage_{k}" for k in range(experts)] + [f"prefix_{k + 1}" for k in range(experts)]
    return names + ["entropy_weighted"] * bool(experts and entropy_weighted) + ["final_path"] * final


def score_tokens(
    model: Any,
    inputs: Tensor,
    targets: Tensor,
    token_byte_lengths: Tensor,
    *,
    final: bool = True,
    entropy_tau: float | None = None,
    exits: bool = False,
    alpha: float = 0.0,
    stages: int | None = None,
) -> TokenScores:
    """Score `targets` (B, T) given `inputs` (B, T) with every predictor of the model; -1 marks targets to ignore.

    `entropy_tau` adds the product whose weights follow each expert's entropy, w_k proportional to exp(-H(p_k)/tau),
    per position. Raises `ValueError` on logits that are not finite. Probabilities of prefix k: softmax(k**alpha *
    mean_{j<k} logits_j), alpha the model's `poe_alpha` (Jeong 2026, Log-OP).
    """
    experts = expert_count(model)
    experts = experts if stages is None else min(stages, experts)
    inputs, targets = inputs.to(model.device), targets.to(model.device).reshape(-1)  # (N,)
    states, hidden, tap = boundary_states(model, inputs, final=final, stages=stages)
    states = states[:experts]
    names = predictor_names(experts, final=final, entropy_weighted=entropy_tau is not None)

    valid = targets >= 0
    token_bytes = torch.where(valid, token_byte_lengths.to(targets.device)[targets.clamp_min(0)], 0)  # (N,)
    counted = token_bytes > 0
    where = counted.nonzero().squeeze(1)  # (n,) only these positions pay for a head
    nll = torch.zeros(len(names), targets.numel(), dtype=torch.float64, device=targets.device)
    top1 = torch.zeros(len(names), targets.numel(), dtype=torch.int64, device=targets.device)
    confidence = torch.zeros(len(names), targets.numel(), dtype=torch.float32, device=targets.device)

    margin = spread = None
    if exits:
        margin = torch.zeros(experts, targets.numel(), dtype=torch.float32, device=targets.device)
        spread = torch.zeros(max(experts - 1, 0), targets.numel(), dtype=torch.float32, device=targets.device)

    def record(name: str, logits: Tensor, at: Tensor) -> None:
        row = names.index(name)
        normaliser = logits.logsumexp(-1)  # (n,)
        check_finite(normaliser, name)
        best, index = logits.max(-1)
        nll[row, at] = (normaliser - logits.gather(-1, targets[at, None]).squeeze(-1)).double()
        top1[row, at] = index
        confidence[row, at] = (best - normaliser).exp().float()

    def take(state: Tensor, at: Tensor) -> Tensor:
        return state.reshape(-1, state.shape[-1])[at][None]  # (1, n, D)

    for at in where.split(chunk_size(model, experts)):
        total, stack, earlier = None, [], None
        for k, state in enumerate(states):
            logits = model.stage_logits(k, take(state, at))[0]  # (n, V)
            record(f"stage_{k}", logits, at)
            if entropy_tau is not None:
                stack.append(logits.log_softmax(-1))
            total = logits if total is None else total + logits
            record(f"prefix_{k + 1}", total * (k + 1) ** (alpha - 1.0), at)
            if margin is not None and spread is not None:
                mean = total / (k + 1)  # C_k up to a constant over the vocabulary, which neither figure sees
                best = mean.topk(2, dim=-1).values
                margin[k, at] = (best[:, 0] - best[:, 1]).float()
                if earlier is not None:
                    change = mean - earlier
                    spread[k - 1, at] = (change.amax(-1) - change.amin(-1)).float()
                earlier = mean
        if stack and entropy_tau is not None:
            logp = torch.stack(stack)  # (K, n, V)
            record("entropy_weighted", pool(logp, weights=entropy_weights(logp, entropy_tau), alpha=alpha), at)
        if final:
            assert hidden is not None
            logits = model.final_logits(take(hidden, at), None if tap is None else take(tap, at))[0]
            record("final_path", logits, at)
    return TokenScores(
        names, nll, top1, confidence, targets, counted, torch.where(counted, token_bytes, 0), margin, spread
    )


def bits_per_byte(nats: Any, n_bytes: Any) -> Any:
    """Nats over bytes in bits: nats / (ln 2 * bytes)."""
    return nats / (math.log(2) * n_bytes)


def name_figures(bpb: Mapping[str, Any], accuracy: Mapping[str, Any]) -> dict[str, Any]:
    """The named figures from bits per byte and accuracy per predictor: numbers, or arrays of resampled ones.

    A model trained end to end has only the final path's.
    """
    experts = sum(name.startswith("stage_") for name in bpb)
    result: dict[str, Any] = {}
    if experts:
        result["stage_bpb"] = [bpb[f"stage_{k}"] for k in range(experts)]
        result["prefix_bpb"] = [bpb[f"prefix_{k + 1}"] for k in range(experts)]
        result["mean_stage_bpb"] = sum(result["stage_bpb"]) / experts
        result["product_bpb"] = bpb[f"prefix_{experts}"]
        result["crossover_gap"] = result["product_bpb"] - result["stage_bpb"][-1]
        result["stage_accuracy"] = [accuracy[f"stage_{k}"] for k in range(experts)]
        result["prefix_accuracy"] = [accuracy[f"prefix_{k + 1}"] for k in range(experts)]
        result["product_accuracy"] = accuracy[f"prefix_{experts}"]
    for name in ("entropy_weighted", "final_path"):
        if name in bpb:
            result[f"{name}_bpb"], result[f"{name}_accuracy"] = bpb[name], accuracy[name]
    return result


def evaluate_bpb(
    model: Any,
    rows: Iterable[tuple[Tensor, Tensor]],
    token_byte_lengths: Tensor,
    *,
    max_tokens: int | None = None,
    final: bool = True,
    entropy_tau: float | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Bits per byte and accuracy of a model over rows of tokens.

    `rows` yields (inputs (B, T), targets (B, T)) with -1 for targets to ignore; `token_byte_lengths` (V,) holds raw
    bytes per token, 0 for specials. Stops after the batch that reaches `max_tokens` counted targets. `reduce` sums a
    float64 vector over ranks (distributed evaluation). Returns `mean_stage_bpb`, `product_bpb`, `final_path_bpb`,
    `crossover_gap`, lists `stage_bpb`, `prefix_bpb`, `stage_accuracy`, `prefix_accuracy`, numbers `product_accuracy`,
    `final_path_accuracy`, counts `tokens` and `bytes`, and `default_output` ("product" or "final_path"); a model
    trained end to end has only the final path's. Raises `ValueError` when no target has bytes, or on logits that are
    not finite.
    """
    lengths = check_byte_lengths(model, token_byte_lengths)
    names = predictor_names(expert_count(model), final=final, entropy_weighted=entropy_tau is not None)
    sums = torch.zeros(2 + 2 * len(names), dtype=torch.float64)  # tokens, bytes, nats and hits per predictor
    with inference(model):
        for inputs, targets in rows:
            scores = score_tokens(model, inputs, targets, lengths, final=final, entropy_tau=entropy_tau)
            hits = (scores.top1 == scores.targets) & scores.counted
            sums += torch.cat(
                [
                    torch.stack([scores.counted.sum(), scores.token_bytes.sum()]).double(),
                    scores.nll.sum(1),
                    hits.sum(1).double(),
                ]
            ).cpu()
            if max_tokens is not None and sums[0] >= max_tokens:
                break
    if reduce is not None:
        sums = reduce(sums)
    tokens, n_bytes, *rest = sums.tolist()
    if not n_bytes:
        raise ValueError(
            "the evaluation rows hold no token with bytes (no rows, or only special tokens): give more text"
        )
    bpb = {name: bits_per_byte(nats, n_bytes) for name, nats in zip(names, rest, strict=False)}
    accuracy = {name: hits / tokens for name, hits in zip(names, rest[len(names) :], strict=True)}
    figures = name_figures(bpb, accuracy)
    return {"default_output": default_output(model), **figures, "tokens": int(tokens), "bytes": int(n_bytes)}
