"""What a stage-partitioned model is trained to do: one `Objective`, forward and backward together.

Design choices
- Detached objectives (`flat`, `residual_logop`) run forward and backward one stage at a time, so only one stage's
  activations are alive. `x0` is not detached: a leaf copy collects its gradient from all stages, and the embedding and
  the smear are differentiated once, at the end. The gradients are those of the whole graph.
- `hier` and `none` need the whole graph; their heads still never store logits.
- Gradients accumulate into `.grad`, scaled by `grad_scale`: gradient accumulation and data parallelism need no more.
- Nothing here synchronises with the device; figures come back as tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stagewise.modeling.heads import fold_heads
from stagewise.modeling.trunk import StageInputs, StageOutput, norm
from stagewise.training.head_loss import HeadSettings, chunked_head_loss

MODES = ("none", "flat", "hier", "residual_logop")


@dataclass
class StageLosses:
    """Figures of one forward and backward pass, in nats, without gradient.

    `total` () is the objective's loss; `stage` (K,) the mean CE of every expert (one entry, the final path's, for
    `none`); `combined` (K,) the mean CE of each expert's product with the experts before it, None except for
    `residual_logop`; `tokens` () the number of targets that were not ignored.
    """

    total: Tensor
    stage: Tensor
    combined: Tensor | None
    tokens: Tensor


@dataclass(frozen=True)
class Objective:
    """A training objective (Jeong 2026).

    `none`: cross-entropy of the final path, end to end. `flat`: every expert's own cross-entropy, the residual stream
    detached at each stage start. `hier`: the same without the detach. `residual_logop`: every expert is fitted to what
    the product of the earlier ones leaves, c_k = softmax(mean of log p_j, j <= k, earlier ones constant).

    loss = K**(alpha - 1) * sum_k l_k, with l_k = CE(p_k), or (1 - w) CE(p_k) + w CE(c_k), w `residual_weight`.
    `stage_runner` replaces `model.run_stage` (a compiled one, for example).
    """

    mode: str = "flat"
    alpha: float = 0.0
    residual_weight: float = 0.5
    chunk_tokens: int | None = None
    stage_runner: Callable[[int, Tensor, StageInputs], StageOutput] | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"poe_mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if not 0 <= self.residual_weight <= 1:
            raise ValueError(f"residual_weight must lie in [0, 1], got {self.residual_weight}")

    @classmethod
    def from_config(cls, config: Any, **overrides: Any) -> Objective:
        """The objective a model's configuration names (`poe_mode`, `poe_alpha`, `residual_weight`)."""
        values = {"mode": config.poe_mode, "alpha": config.poe_alpha, "residual_weight": config.residual_weight}
        return cls(**{**values, **overrides})

    @property
    def detached(self) -> bool:
        """Whether no gradient of the residual stream crosses a stage boundary."""
        return self.mode in ("flat", "residual_logop")

    def forward_backward(
        self, model: Any, ids: Tensor, targets: Tensor, grad_scale: float = 1.0, normaliser: float | None = None
    ) -> StageLosses:
        """Losses of `ids` (B, T) against `targets` (B, T), -1 ignored; adds grad_scale * gradient to every `.grad`.

        Cross-entropies are summed over targets and divided by `normaliser` (default: the number of valid targets, at
        the price of a device synchronisation when targets are not on the CPU).
        """
        tokens = (targets >= 0).sum()
        settings = HeadSettings(
            vocab_size=model.config.vocab_size,
            softcap=model.config.logit_softcap,
            normaliser=max(1.0, float(tokens)) if normaliser is None else normaliser,
            residual_weight=self.residual_weight,
            chunk_tokens=self.chunk_tokens,
        )
        run_stage = self.stage_runner or model.run_stage
        if self.mode == "none":
            plain = self._end_to_end(model, run_stage, ids, targets, settings, grad_scale)
            return StageLosses(plain.sum(), plain, None, tokens)
        scale = model.config.num_stages ** (self.alpha - 1.0)
        run = self._stage_by_stage if self.detached else self._whole_graph
        losses, plain, combined = run(model, run_stage, ids, targets, settings, grad_scale * scale)
        return StageLosses(losses.sum() * scale, plain, combined if self.mode == "residual_logop" else None, tokens)

    def _end_to_end(self, model, run_stage, ids, targets, settings, scale) -> Tensor:
        inputs = model.stage_inputs(ids)
        hidden, tap = inputs.x0, None
        for k in range(model.config.num_stages):
            out = run_stage(k, hidden, inputs)
            hidden, tap = out.hidden, tap if out.tap is None else out.tap
        state = model.final_state(hidden, tap)
        loss, plain, _ = chunked_head_loss(state, [model.lm_head.weight], targets, settings)
        (loss * scale).backward()
        return plain[None] / settings.normaliser

    def _stage_by_stage(self, model, run_stage, ids, targets, settings, scale) -> tuple[Tensor, Tensor, Tensor]:
        inputs = model.stage_inputs(ids)
        leaf = inputs.x0.detach().requires_grad_(inputs.x0.requires_grad)
        local = replace(inputs, x0=leaf)
        hidden: Tensor = leaf
        earlier: list[tuple[Tensor, Tensor]] = []
        figures = []
        for k in range(model.config.num_stages):
            hidden, figure = self.train_stage(model, run_stage, k, hidden, local, earlier, targets, settings, scale)
            figures.append(figure)
        if leaf.grad is not None:
            inputs.x0.backward(leaf.grad)
        return _stack(figures, settings)

    def train_stage(
        self,
        model: Any,
        run_stage: Callable[[int, Tensor, StageInputs], StageOutput],
        stage: int,
        hidden: Tensor,
        inputs: StageInputs,
        earlier: list[tuple[Tensor, Tensor]],
        targets: Tensor,
        settings: HeadSettings,
        scale: float,
        hand_on: Callable[[Tensor], None] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Forward and backward of one detached stage from its boundary state `hidden` (B, T, D).

        `inputs.x0` is a leaf that collects its gradient. `earlier` holds the normed boundary states and summed heads of
        the experts before (residual Log-OP) and gets this one's added. `hand_on` is given the new boundary state before
        the backward pass. Returns it, detached, and (loss, CE sum, combined CE sum).
        """
        state = run_stage(stage, hidden, inputs).hidden
        following = state.detach()
        if hand_on is not None:
            hand_on(following)
        normed = norm(state, model.config.rms_norm_eps)
        weights = head_weights(model, stage)
        residual = self.mode == "residual_logop"
        loss, plain, combined = chunked_head_loss(normed, weights, targets, settings, earlier if residual else ())
        (loss * scale).backward()
        if residual:
            earlier.append((normed.detach(), constant_head(weights)))
        return following, (loss.detach(), plain, combined if len(earlier) > 1 else plain)

    def _whole_graph(self, model, run_stage, ids, targets, settings, scale) -> tuple[Tensor, Tensor, Tensor]:
        inputs = model.stage_inputs(ids)
        hidden, figures, losses = inputs.x0, [], []
        for k in range(model.config.num_stages):
            hidden = run_stage(k, hidden, inputs).hidden
            normed = norm(hidden, model.config.rms_norm_eps)
            loss, plain, _ = chunked_head_loss(normed, head_weights(model, k), targets, settings)
            losses.append(loss)
            figures.append((loss.detach(), plain, plain))
        (torch.stack(losses).sum() * scale).backward()
        return _stack(figures, settings)


def head_weights(model: Any, stage: int) -> list[Tensor]:
    """The head matrices (Vpad, D) that add up to expert `stage`'s."""
    return [head.weight for head in model.stage_heads(stage)]


def constant_head(weights: list[Tensor]) -> Tensor:
    """The sum of heads (Vpad, D) without gradient."""
    constant = [weight.detach() for weight in weights]
    return fold_heads(constant) if len(constant) > 1 else constant[0]


def _stack(figures: list[tuple[Tensor, Tensor, Tensor]], settings: HeadSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Per-stage (loss, CE, combined CE), each (K,), the latter two divided by the normaliser."""
    losses, plain, combined = (torch.stack(column) for column in zip(*figures, strict=True))
    return losses.double(), plain / settings.normaliser, combined / settings.normaliser
