"""MuonAdamW: Muon for the matrices of the blocks, AdamW for embeddings, heads and scalars.

Design choices
- A parameter's group follows from its tensor name alone (`parameter_groups`), so an appended layer or head lands in the
  right group without being registered anywhere; a name no rule covers is an error.
- Matrices of one shape are stacked and orthogonalised as one batch: a model of any depth takes a handful of matmuls.
- State lives in fp32 beside fp32 parameters; only the orthogonalisation may run narrower (`orthogonalise_dtype`).
- Learning rates, momentum and weight decay are plain group entries: a schedule multiplies `initial_lr` and
  `initial_weight_decay`, which never change.
- AdamW's arithmetic is torch's fused kernel; Muon's is here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

# Quintic coefficients (a, b, c) of X <- aX + (bA + cA^2)X with A = XX^T, one triple a step (Polar Express).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
REFERENCE_WIDTH = 768


@dataclass(frozen=True)
class Rates:
    """Learning rates and decays of every kind of tensor, as used at this batch size (`Recipe.scaled_rates`).

    The width factor sqrt(768 / D) of embeddings and heads is applied by `parameter_groups`, not stored here.
    """

    matrix_lr: float = 0.02
    embedding_lr: float = 0.3
    unembedding_lr: float = 0.008
    scalar_lr: float = 0.5
    smear_lr: float = 0.2
    weight_decay: float = 0.28
    head_weight_decay: float = 0.01
    embedding_weight_decay: float = 0.001
    value_embedding_weight_decay: float = 0.01
    resid_weight_decay: float = 0.05


def _kind_of(name: str) -> str:
    """Kind of the tensor `name`, by the reference naming."""
    if name == "transformer.wte.weight":
        return "embedding"
    if re.fullmatch(r"value_embeds\.\d+\.weight", name):
        return "value_embedding"
    if re.fullmatch(r"lm_head(_stage|_stages\.\d+|_ancestors\.\d+)?\.weight", name):
        return "head"
    if re.fullmatch(r"transformer\.h\.\d+\..+\.weight", name):
        return "matrix"
    kinds = {"resid_lambdas": "resid", "x0_lambdas": "x0"}
    kinds |= {name: "smear" for name in ("smear_gate.weight", "smear_lambda", "backout_lambda")}
    if name in kinds:
        return kinds[name]
    raise ValueError(f"no optimizer group for tensor {name!r}: give its group by hand or rename it")


def parameter_groups(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]], hidden_size: int, rates: Rates | None = None
) -> list[dict[str, Any]]:
    """Groups for `MuonAdamW`: one per AdamW kind present, one per matrix shape for Muon (frozen tensors are left out).

    `hidden_size` is D: heads, `wte` and value embeddings take their learning rate times sqrt(768 / D).
    Each group carries `names`, aligned with `params`. Raises ValueError for a name outside the naming scheme.
    """
    rates = rates or Rates()
    width = math.sqrt(REFERENCE_WIDTH / hidden_size)
    adamw_kinds: dict[str, tuple[float, tuple[float, float], float]] = {  # kind: lr, betas, weight decay
        "head": (rates.unembedding_lr * width, (0.8, 0.96), rates.head_weight_decay),
        "embedding": (rates.embedding_lr * width, (0.8, 0.995), rates.embedding_weight_decay),
        "value_embedding": (rates.embedding_lr * width / 2, (0.8, 0.995), rates.value_embedding_weight_decay),
        "resid": (rates.scalar_lr * 0.01, (0.8, 0.95), rates.resid_weight_decay),
        "x0": (rates.scalar_lr, (0.96, 0.95), 0.0),
        "smear": (rates.smear_lr, (0.8, 0.95), 0.0),
    }
    by_kind: dict[str, list[tuple[str, torch.nn.Parameter]]] = {kind: [] for kind in adamw_kinds}
    by_shape: dict[tuple[int, ...], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in named_parameters:
        if not parameter.requires_grad:
            continue
        kind = _kind_of(name)
        if kind == "matrix":
            by_shape.setdefault(tuple(parameter.shape), []).append((name, parameter))
        else:
            by_kind[kind].append((name, parameter))
    groups: list[dict[str, Any]] = []
    for kind, members in by_kind.items():
        if members:
            lr, betas, decay = adamw_kinds[kind]
            group: dict[str, Any] = {"kind": "adamw", "label": kind, "lr": lr, "betas": betas, "weight_decay": decay}
            groups.append(group | {"names": [n for n, _ in members], "params": [p for _, p in members]})
    for shape in sorted(by_shape):
        members = by_shape[shape]
        group = {"kind": "muon", "label": "matrix", "lr": rates.matrix_lr, "weight_decay": rates.weight_decay}
        groups.append(group | {"names": [n for n, _ in members], "params": [p for _, p in members]})
    return groups


def orthogonalise(update: Tensor, *, dtype: torch.dtype = torch.bfloat16, renormalise: bool = False) -> Tensor:
    """Nearest semi-orthogonal matrices to `update` (..., m, n), by five Polar Express steps on the shorter side.

    Computed in `dtype`, returned in it. `renormalise` rescales each result to the Frobenius norm sqrt(min(m, n)) of
    an exactly semi-orthogonal matrix.
    """
    x = update.to(dtype)
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-6)
    for a, b, c in POLAR_EXPRESS:
        gram = x @ x.mT  # (..., s, s), s the shorter side
        x = torch.add(a * x, torch.add(b * gram, gram @ gram, alpha=c) @ x)
    if renormalise:
        x = x * (math.sqrt(x.size(-2)) / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-10))
    return x.mT if tall else x


def equilibrate_rows(update: Tensor) -> Tensor:
    """Rows of `update` (..., m, n) rescaled to one norm, the root mean square Frobenius / sqrt(m) of their norms."""
    target = update.norm(dim=(-2, -1), keepdim=True) / math.sqrt(update.size(-2))
    return update * (target / update.norm(dim=-1, keepdim=True).clamp_min(1e-10))


def reduce_variance(update: Tensor, second_moment: Tensor, beta2: float) -> Tensor:
    """NorMuon: `update` (n, r, c) divided by a running root mean square per row or column, its total norm kept.

    `second_moment` is (n, r, 1) for tall or square matrices, (n, 1, c) for wide ones, and is updated in place.
    """
    along = -1 if update.size(-2) >= update.size(-1) else -2
    mean_square = update.square().mean(dim=along, keepdim=True)
    second_moment.lerp_(mean_square, 1 - beta2)
    scale = second_moment.clamp_min(1e-10).rsqrt()
    before = mean_square.sum(dim=(-2, -1), keepdim=True).sqrt()
    after = (mean_square * scale.square()).sum(dim=(-2, -1), keepdim=True).sqrt()
    return update * (scale * (before / after.clamp_min(1e-10)))


def muon_update(gradients: Tensor, momentum_buffer: Tensor, second_moment: Tensor, group: dict[str, Any]) -> Tensor:
    """Muon's step direction for stacked `gradients` (n, r, c), before the learning rate; both buffers move in place.

    Nesterov momentum, then (optional) row equilibration, orthogonalisation, (optional) renormalisation, NorMuon.
    """
    momentum = group["momentum"]
    momentum_buffer.lerp_(gradients, 1 - momentum)
    update = torch.lerp(gradients, momentum_buffer, momentum)
    if group["row_equilibration"]:
        update = equilibrate_rows(update)
    update = orthogonalise(update, dtype=group["orthogonalise_dtype"], renormalise=group["renormalise"])
    return reduce_variance(update.to(momentum_buffer.dtype), second_moment, group["beta2"])


def apply_muon(parameter: Tensor, update: Tensor, lr: float, weight_decay: float) -> None:
    """`p -= lr*g + lr*wd*p` in place, the decay only where it and the step `g` pull the same way (g*p >= 0).

    Matrices `parameter` and `update` (..., r, c); lr is multiplied by sqrt(max(1, r / c)).
    """
    lr = lr * max(1.0, parameter.size(-2) / parameter.size(-1)) ** 0.5
    if weight_decay:
        decay = parameter * (update * parameter >= 0)
        update = torch.add(update, decay, alpha=weight_decay)
    parameter.sub_(update, alpha=lr)


def apply_adamw(parameters: list[Tensor], gradients: list[Tensor], states: list[dict], group: dict[str, Any]) -> None:
    """One AdamW step in place; `states` hold `step`, `exp_avg` and `exp_avg_sq` of each parameter."""
    adamw(
        parameters,
        gradients,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )


def adamw_state(parameter: Tensor) -> dict[str, Tensor]:
    """Fresh AdamW state for one parameter (or one rank's slice of it)."""
    step = torch.zeros((), dtype=torch.float32, device=parameter.device)
    return {"step": step, "exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}


def muon_state(count: int, like: Tensor) -> dict[str, Tensor]:
    """Fresh Muon state for `count` matrices shaped as `like` (r, c): momentum and NorMuon's second moment."""
    rows, columns = like.shape
    second = (count, rows, 1) if rows >= columns else (count, 1, columns)
    return {"momentum_buffer": like.new_zeros(count, rows, columns), "second_moment": like.new_zeros(second)}


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer over the groups of `parameter_groups` (Jordan 2024 for Muon).

    A group needs `params` and `kind` ("muon" or "adamw"); lr, betas, eps, weight_decay, momentum, beta2 are optional.
    Parameters without a gradient are left untouched, decay included; in a Muon group they stay so from the first step
    on (their rows of the stacked state are zero). Muon's state is stacked and belongs to its group's first parameter.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        row_equilibration: bool = False,
        renormalise: bool = False,
        orthogonalise_dtype: torch.dtype = torch.bfloat16,
    ):
        defaults = {
            "lr": 0.02,
            "betas": (0.8, 0.95),
            "eps": 1e-10,
            "weight_decay": 0.0,
            "momentum": 0.95,
            "beta2": 0.9,
            "row_equilibration": row_equilibration,
            "renormalise": renormalise,
            "orthogonalise_dtype": orthogonalise_dtype,
        }
        super().__init__([dict(group) for group in groups], defaults)
        for group in self.param_groups:
            if group.get("kind") not in ("muon", "adamw"):
                raise ValueError(f"optimizer group kind must be 'muon' or 'adamw', got {group.get('kind')!r}")
            if group["kind"] == "muon" and len({p.shape for p in group["params"]}) != 1:
                raise ValueError("a muon group holds matrices of one shape: make one group per shape")
            group.setdefault("initial_lr", group["lr"])
            group.setdefault("initial_weight_decay", group["weight_decay"])

    @torch.no_grad()
    def step(self, closure=None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns the closure's loss, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if group["kind"] == "muon":
                self._muon_step(group)
            else:
                self._adamw_step(group)
        return loss

    def _adamw_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        if not parameters:
            return
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(adamw_state(parameter))
        apply_adamw(parameters, [p.grad for p in parameters], [self.state[p] for p in parameters], group)

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        if all(p.grad is None for p in parameters):
            return
        state = self.state[parameters[0]]
        if not state:
            state.update(muon_state(len(parameters), parameters[0]))
        gradients = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        update = muon_update(gradients, state["momentum_buffer"], state["second_moment"], group)
        for parameter, direction in zip(parameters, update.unbind(), strict=True):
            if parameter.grad is not None:
                apply_muon(parameter, direction, group["lr"], group["weight_decay"])

    def _owners(self) -> Iterator[tuple[str, Tensor, str, int]]:
        """(name, parameter, kind, first dimension of its state) of every parameter that may own state."""
        for index, group in enumerate(self.param_groups):
            names = group.get("names") or [f"group{index}.{i}" for i in range(len(group["params"]))]
            if group["kind"] == "muon":
                yield f"{names[0]}.stack", group["params"][0], "muon", len(group["params"])
            else:
                for name, parameter in zip(names, group["params"], strict=True):
                    yield name, parameter, "adamw", parameter.size(0)

    def named_state(self) -> dict[str, Tensor]:
        """All state as flat tensors: "<tensor name>.exp_avg", or "<first name of a shape>.stack.momentum_buffer"."""
        return {
            f"{name}.{key}": value
            for name, parameter, _, _ in self._owners()
            for key, value in self.state[parameter].items()
        }

    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `named_state` gave. Raises ValueError for state of tensors this optimizer does not have."""
        left = dict(tensors)
        for name, parameter, kind, _ in self._owners():
            keys = ("momentum_buffer", "second_moment") if kind == "muon" else ("step", "exp_avg", "exp_avg_sq")
            found = {key: left.pop(f"{name}.{key}") for key in keys if f"{name}.{key}" in left}
            self.state[parameter].clear()
            self.state[parameter].update({key: value.clone().to(parameter.device) for key, value in found.items()})
        if left:
            raise ValueError(f"optimizer state of unknown tensors: {', '.join(sorted(left))}")
