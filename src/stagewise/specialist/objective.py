"""What a specialist is trained to do, and how well it does it: cross-entropy of its path over assistant tokens.

Design choices:
- The frozen part runs without gradients and its outputs are constants: x, x0 and the backout tap are detached at the
  freeze boundary. Only positions with a target reach the heads.
- The plain loss is the chunked head loss all training uses. Label smoothing and a weight on the end token, both
  optional, take a second, equally chunked route.
- Two validation figures, never mixed up: bits per assistant token (what the cards call "val bpb") and bits per byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from stagewise.modeling.heads import head_logits
from stagewise.training.head_loss import HeadSettings, chunked_head_loss
from stagewise.training.objectives import StageLosses

PATH = "specialist"
CHUNK_VALUES = 1 << 22  # logits of one chunk


def boundary_state(model: Any, ids: Tensor, run_stage: Callable[..., Any] | None = None) -> Tensor:
    """The normed state (B, T, D) that a specialist's heads read; gradients reach its newest stage and no further."""
    run_stage = run_stage or model.run_stage
    *frozen, newest = model.path_stages(PATH)
    with torch.no_grad():
        inputs = model.stage_inputs(ids, path=PATH)
        hidden, tap = inputs.x0, None
        for stage in frozen:
            out = model.run_stage(stage, hidden, inputs)
            hidden, tap = out.hidden, tap if out.tap is None else out.tap
    if torch.is_grad_enabled():
        pairs = zip(model.resid_lambdas.unbind(), model.x0_lambdas.unbind(), strict=True)
        inputs = replace(inputs, lambdas=list(pairs))
    out = run_stage(newest, hidden, inputs)
    return model.final_state(out.hidden, tap if out.tap is None else out.tap, PATH)


@dataclass(frozen=True)
class SpecialistObjective:
    """Cross-entropy over assistant tokens; plugs into `training.loop.Trainer`.

    `end_token` and `end_token_weight` weigh the token that ends a turn; `label_smoothing` spreads that share of every
    target over the vocabulary. `stage_runner` replaces `model.run_stage` for the trained stage (a compiled one).
    """

    end_token: int = -1
    end_token_weight: float = 1.0
    label_smoothing: float = 0.0
    stage_runner: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing must lie in [0, 1), not {self.label_smoothing}")
        if self.end_token_weight < 0:
            raise ValueError(f"end_token_weight must not be negative, not {self.end_token_weight}")

    def forward_backward(
        self, model: Any, ids: Tensor, targets: Tensor, grad_scale: float = 1.0, normaliser: float | None = None
    ) -> StageLosses:
        """Loss of `ids` (B, T) against `targets` (B, T), -1 ignored; adds grad_scale times its gradient to `.grad`."""
        valid = targets >= 0
        tokens = valid.sum()
        count = max(1.0, float(tokens)) if normaliser is None else normaliser
        state = boundary_state(model, ids, self.stage_runner)[valid]  # (N, D)
        weights = [head.weight for head in model.path_heads(PATH)]
        config = model.config
        if self.end_token_weight == 1.0 and not self.label_smoothing:
            settings = HeadSettings(config.vocab_size, config.logit_softcap, normaliser=count)
            loss, plain, _ = chunked_head_loss(state, weights, targets[valid], settings)
        else:
            loss, plain = self._weighted(state, weights, targets[valid], config)
            loss = loss / count
        (loss * grad_scale).backward()
        return StageLosses(loss.detach(), (plain / count)[None], None, tokens)

    def _weighted(
        self, state: Tensor, weights: Sequence[Tensor], targets: Tensor, config: Any
    ) -> tuple[Tensor, Tensor]:
        """Summed weighted loss, and the summed plain cross-entropy without gradient."""

        def piece(x: Tensor, target: Tensor, *heads: Tensor) -> tuple[Tensor, Tensor]:
            logits = head_logits(x, heads, config.logit_softcap, config.vocab_size)
            smoothed = F.cross_entropy(logits, target, reduction="none", label_smoothing=self.label_smoothing)
            weight = torch.where(target == self.end_token, self.end_token_weight, 1.0)
            return (smoothed * weight).sum(), F.cross_entropy(logits.detach(), target, reduction="sum")

        chunk = max(16, CHUNK_VALUES // config.vocab_size)
        parts = [
            checkpoint(piece, state[i : i + chunk], targets[i : i + chunk], *weights, use_reentrant=False)
            for i in range(0, len(state), chunk)
        ]
        if not parts:
            return state.sum() * 0.0, state.new_zeros(())
        return torch.stack([p[0] for p in parts]).sum(), torch.stack([p[1] for p in parts]).sum()


@torch.no_grad()
def measure(
    model: Any,
    batches: Sequence[tuple[Tensor, Tensor]],
    token_bytes: Tensor,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, float]:
    """Bits per assistant token and bits per byte of the specialist's path on (inputs, targets) batches.

    Bits per token counts every trained token, the end token included; bits per byte leaves special tokens out on both
    sides. `token_bytes` (V,) is 0 for special tokens. `reduce` sums over ranks.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # nats, tokens, nats of text, bytes, hits
    config = model.config
    heads = model.path_heads(PATH)
    chunk = max(16, CHUNK_VALUES // config.vocab_size)
    for ids, targets in batches:
        ids, targets = ids.to(model.device), targets.to(model.device)
        valid = targets >= 0
        state, goal = boundary_state(model, ids)[valid], targets[valid]
        lengths = token_bytes.to(goal.device)[goal]
        for i in range(0, len(goal), chunk):
            logits = head_logits(state[i : i + chunk], heads, config.logit_softcap, config.vocab_size)
            nats = F.cross_entropy(logits, goal[i : i + chunk], reduction="none").double()
            size = lengths[i : i + chunk]
            hits = (logits.argmax(-1) == goal[i : i + chunk]).sum()
            figures = (nats.sum(), torch.tensor(len(nats)), nats[size > 0].sum(), size.sum(), hits)
            sums += torch.stack([figure.double().cpu() for figure in figures])
    if reduce is not None:
        sums = reduce(sums).cpu()
    nats, tokens, text_nats, length, hits = sums.tolist()
    return {
        "bits_per_assistant_token": nats / max(tokens, 1) / math.log(2),
        "final_path_bpb": text_nats / max(length, 1) / math.log(2),
        "assistant_accuracy": hits / max(tokens, 1),
        "assistant_tokens": int(tokens),
        "assistant_bytes": int(length),
        "default_output": "final_path",
    }
