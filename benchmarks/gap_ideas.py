"""What `gap.py` compares: the objectives, ideas that keep stages independent, and how the ideas are trained.

Design choices
- An idea is a `Variant` with one or two fields set; everything else stays that of residual Log-OP, w 0.5, per-stage
  heads.
- `LocalObjective` stores logits and builds one graph: easy to change, for tiny vocabularies only. `check` holds it to
  `stagewise.training.objectives.Objective`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.training.objectives import Objective, StageLosses


@dataclass(frozen=True)
class Variant:
    """An objective, and what an idea changes about it; tuples have one entry a stage."""

    name: str
    mode: str = "residual_logop"
    residual_weight: float = 0.5
    per_stage_head: bool = True
    layout: tuple[int, ...] = ()  # instead of the cell's
    stage_weights: tuple[float, ...] = ()  # residual weight w of every stage
    loss_shares: tuple[float, ...] = ()  # weight of every stage's loss: moves only what stages share
    stage_rates: tuple[float, ...] = ()  # multiples of the matrices' learning rate
    soft_target: float = 0.0  # share of the final product as a soft target of the earlier stages
    final_path: float = 0.0  # weight of the final path's cross-entropy, added to the last stage's loss
    detach_x0: bool = False  # embedding and smear learn from the first stage only
    x0_lambda: float | None = None  # initial value of all x0_lambdas

    @property
    def local(self) -> dict[str, Any]:
        """What only `LocalObjective` can do."""
        names = ("stage_weights", "loss_shares", "soft_target", "final_path", "detach_x0")
        return {name: getattr(self, name) for name in names if getattr(self, name)}


def _objectives() -> list[Variant]:
    found = [Variant("end to end", "none", per_stage_head=False)]
    for own in (True, False):
        heads = "per-stage heads" if own else "shared head"
        found += [Variant(f"{mode}, {heads}", mode, per_stage_head=own) for mode in ("flat", "hier")]
        found += [Variant(f"residual w {w:g}, {heads}", "residual_logop", w, own) for w in (0.5, 1.0)]
    return found


OBJECTIVES = _objectives()
END_TO_END, FLAT = OBJECTIVES[0], OBJECTIVES[1]
BASELINE = OBJECTIVES[3]
IDEAS = [
    Variant("product as soft target of earlier stages, 0.5", soft_target=0.5),
    Variant("w rising over stages 0, 1/3, 2/3, 1", stage_weights=(0.0, 1 / 3, 2 / 3, 1.0)),
    Variant("w 1 for the last stage, 0 before", stage_weights=(0.0, 0.0, 0.0, 1.0)),
    Variant("w 0.25", residual_weight=0.25),
    Variant("w 0.75", residual_weight=0.75),
    Variant("x0 detached after the first stage", detach_x0=True),
    Variant("x0_lambdas start at 0.5", x0_lambda=0.5),
    Variant("matrix rates rising 0.7 .. 1.4", stage_rates=(0.7, 0.9, 1.1, 1.4)),
    Variant("matrix rates falling 1.4 .. 0.7", stage_rates=(1.4, 1.1, 0.9, 0.7)),
    Variant("final path's loss added to the last stage, 0.5", final_path=0.5),
    Variant("shared tensors learn mostly from the last stage", loss_shares=(0.4, 0.4, 0.4, 2.8)),
    Variant("layout 4,2,1,1", layout=(4, 2, 1, 1)),
    Variant("layout 5,1,1,1", layout=(5, 1, 1, 1)),
    Variant("layout 1,1,2,4", layout=(1, 1, 2, 4)),
    Variant("layout 4,4", layout=(4, 4)),
]


@dataclass(frozen=True)
class LocalObjective(Objective):
    """Detached stages with what `Variant` describes. With nothing set it is `Objective`, which `check` holds it to.

    Logits of all stages are stored: for tiny vocabularies only.
    """

    stage_weights: tuple[float, ...] = ()
    loss_shares: tuple[float, ...] = ()
    soft_target: float = 0.0
    final_path: float = 0.0
    detach_x0: bool = False

    def forward_backward(
        self, model: Any, ids: Tensor, targets: Tensor, grad_scale: float = 1.0, normaliser: float | None = None
    ) -> StageLosses:
        """As `Objective.forward_backward`; `total` is the loss with the ideas' terms."""
        count = model.config.num_stages
        tokens = (targets >= 0).sum()
        norm = max(1.0, float(tokens)) if normaliser is None else normaliser
        goal = targets.reshape(-1)

        def entropy(logits: Tensor) -> Tensor:
            return F.cross_entropy(logits, goal, ignore_index=-1, reduction="sum") / norm

        inputs = model.stage_inputs(ids)
        leaf = inputs.x0.detach().requires_grad_()
        hidden, tap, outputs = leaf, None, []
        for k in range(count):
            x0 = leaf.detach() if self.detach_x0 and k else leaf
            out = model.run_stage(k, hidden, replace(inputs, x0=x0))
            outputs.append(out.hidden)
            hidden, tap = out.hidden.detach(), tap if out.tap is None else out.tap.detach()
        logits = [model.stage_logits(k, state).flatten(0, 1) for k, state in enumerate(outputs)]  # (N, V)
        fixed = [each.detach() for each in logits]
        product = (sum(fixed) / count).softmax(-1)  # type: ignore[attr-defined]
        plain, combined, losses = [], [], []
        base = self.residual_weight if self.mode == "residual_logop" else 0.0
        for k, own in enumerate(logits):
            plain.append(entropy(own))
            combined.append(entropy((sum(fixed[:k]) + own) / (k + 1)) if k else plain[0])
            w = self.stage_weights[k] if self.stage_weights else base
            loss = (1 - w) * plain[k] + w * combined[k]
            if self.soft_target and k < count - 1:
                soft = -(product * own.log_softmax(-1)).sum(-1)[goal >= 0].sum() / norm
                loss = (1 - self.soft_target) * loss + self.soft_target * soft
            losses.append(loss * (self.loss_shares[k] if self.loss_shares else 1.0))
        if self.final_path:
            final = model.final_logits(outputs[-1], tap).flatten(0, 1)
            losses[-1] = losses[-1] + self.final_path * entropy(final)
        total = torch.stack(losses).sum() * count ** (self.alpha - 1.0)
        (total * grad_scale).backward()
        if leaf.grad is not None:
            inputs.x0.backward(leaf.grad)
        figures = (torch.stack(column).detach().double() for column in (plain, combined))
        return StageLosses(total.detach().double(), *figures, tokens)


def check() -> None:
    """Hold `LocalObjective` without ideas to `Objective`: losses and gradients of a small model."""
    for mode in ("flat", "residual_logop"):
        config = PoEConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=2, vocab_size=300, max_position_embeddings=32,
            poe_stage_layers=[2, 1, 1], poe_mode=mode, residual_weight=0.5, per_stage_head=True,
        )  # fmt: skip
        model = PoEForCausalLM(config).init_weights(0)
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.05)
        ids = torch.randint(0, 300, (2, 17), generator=draw)
        found = []
        for kind in (Objective, LocalObjective):
            model.zero_grad(set_to_none=True)
            losses = kind.from_config(config).forward_backward(model, ids[:, :-1], ids[:, 1:])
            grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            found.append((losses, grads))
        (one, first), (two, second) = found
        assert first.keys() == second.keys()
        torch.testing.assert_close(one.stage.double(), two.stage, rtol=1e-5, atol=1e-6)
        for name, gradient in first.items():
            torch.testing.assert_close(gradient, second[name], rtol=1e-3, atol=1e-6, msg=name)


def staged_groups(groups: list[dict[str, Any]], config: PoEConfig, factors: tuple[float, ...]) -> Iterator[dict]:
    """Optimizer groups with every group of matrices divided by stage, its rate multiplied by the stage's factor."""
    for group in groups:
        if group["kind"] != "muon":
            yield group
            continue
        layers = [int(name.split(".")[2]) for name in group["names"]]
        for (first, last), factor in zip(config.stage_ranges, factors, strict=True):
            chosen = [i for i, layer in enumerate(layers) if first <= layer < last]
            parts = {key: [group[key][i] for i in chosen] for key in ("names", "params")}
            if chosen:
                yield group | parts | {"lr": group["lr"] * factor}
