"""Stages of one model trained on different ranks: forward activations travel, gradients do not.

Design choices
- A detached objective sends no gradient of the residual stream across a stage boundary. A rank receives the state at
  its first boundary, hands its last one on before its own backward pass, and so never waits for a later rank.
- x0 is rebuilt from the ids on every rank. What all stages use (wte, smear, the lambdas, the shared head) is kept on
  every rank; its gradients are summed over ranks once a step, after which all ranks make the same update.
- Residual Log-OP needs the earlier experts: their boundary states travel along, and their heads are shared tensors too.
- Blocks and heads of other ranks' stages take no memory; `gather` brings them together to save or evaluate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stagewise.modeling.trunk import norm
from stagewise.training.distributed import Ranks
from stagewise.training.head_loss import HeadSettings
from stagewise.training.objectives import Objective, StageLosses, constant_head, head_weights


def divide_stages(config: Any, world: int) -> list[range]:
    """Consecutive stages for each of `world` ranks, the largest number of layers on a rank made as small as can be.

    Raises ValueError when there are more ranks than stages.
    """
    layers = config.poe_stage_layers
    if world > len(layers):
        raise ValueError(f"{len(layers)} stages cannot be divided among {world} ranks: use at most one rank a stage")
    best: dict[tuple[int, int], tuple[int, list[range]]] = {(0, 0): (0, [])}  # (ranks, stages) used: worst, division
    for ranks in range(1, world + 1):
        for end in range(ranks, len(layers) + 1):
            options = []
            for start in range(ranks - 1, end):
                if (ranks - 1, start) in best:
                    worst, division = best[ranks - 1, start]
                    options.append((max(worst, sum(layers[start:end])), [*division, range(start, end)]))
            best[ranks, end] = min(options, key=lambda option: option[0])
    return best[world, len(layers)][1]


class StageParallel:
    """One rank's part of a model whose stages are divided among ranks; an objective in place of `Objective`.

    Every rank gives every call the same ids and targets. After the micro-batches of a step call `reduce_gradients`,
    then the optimizer over `parameters`. Raises ValueError for objectives that are not detached.
    """

    def __init__(self, model: Any, objective: Objective, ranks: Ranks, division: Sequence[range] | None = None):
        if not objective.detached:
            raise ValueError(
                f"poe_mode={objective.mode!r} sends gradients across stages: only detached objectives divide"
            )
        self.model, self.objective, self.ranks = model, objective, ranks
        self.division = list(division or divide_stages(model.config, ranks.world))
        self.stages = self.division[ranks.rank]
        self.owners = {name: self._owner(name) for name, _ in model.named_parameters()}
        self._release()

    def _owner(self, name: str) -> int | None:
        """The rank whose stage has the tensor `name`, None for what every rank keeps."""
        parts = name.split(".")
        if name.startswith("lm_head_stages."):
            stage = int(parts[1])
            if self.objective.mode == "residual_logop":
                return None  # later experts need it
        elif name.startswith(("transformer.h.", "value_embeds.")):
            layer = int(parts[2] if parts[0] == "transformer" else parts[1])
            ranges = self.model.config.stage_ranges
            stage = next(k for k, (first, last) in enumerate(ranges) if first <= layer < last)
        else:
            return None
        return next(rank for rank, stages in enumerate(self.division) if stage in stages)

    def _release(self) -> None:
        """Free the tensors of other ranks' stages; their shapes stay."""
        for name, parameter in list(self.model.named_parameters()):
            if self.owners[name] not in (None, self.ranks.rank):
                self._put(name, nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad))

    def _put(self, name: str, parameter: nn.Parameter) -> None:
        module, _, last = name.rpartition(".")
        self.model.get_submodule(module).register_parameter(last, parameter)

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Named parameters this rank trains: its stages' and the shared ones."""
        return [(name, p) for name, p in self.model.named_parameters() if self.owners[name] in (None, self.ranks.rank)]

    def forward_backward(
        self, model: Any, ids: Tensor, targets: Tensor, grad_scale: float = 1.0, normaliser: float | None = None
    ) -> StageLosses:
        """As `Objective.forward_backward`; stages of other ranks count 0: summed over ranks, losses are whole."""
        config, objective, residual = model.config, self.objective, self.objective.mode == "residual_logop"
        tokens = (targets >= 0).sum()
        settings = HeadSettings(
            vocab_size=config.vocab_size,
            softcap=config.logit_softcap,
            normaliser=max(1.0, float(tokens)) if normaliser is None else normaliser,
            residual_weight=objective.residual_weight,
            chunk_tokens=objective.chunk_tokens,
        )
        inputs = model.stage_inputs(ids)
        leaf = inputs.x0.detach().requires_grad_()
        local = replace(inputs, x0=leaf)
        rank, first = self.ranks.rank, self.stages[0]
        states = self._receive(first, residual, leaf)  # boundary states before this rank's first stage
        earlier = [
            (norm(state, config.rms_norm_eps), constant_head(head_weights(model, k))) for k, state in states if residual
        ]
        hidden = states[-1][1] if states else leaf
        boundaries = [state for _, state in states]
        sends: list[Any] = []
        scale = config.num_stages ** (objective.alpha - 1.0)
        losses = torch.zeros(3, config.num_stages, dtype=torch.float64)
        for k in self.stages:

            def hand_on(state: Tensor, k: int = k) -> None:
                boundaries.append(state)
                if k == self.stages[-1] and rank + 1 < self.ranks.world:
                    sends.extend(dist.isend(s.contiguous(), rank + 1) for s in (boundaries if residual else [state]))

            hidden, figure = objective.train_stage(
                model, model.run_stage, k, hidden, local, earlier, targets, settings, grad_scale * scale, hand_on
            )
            losses[:, k] = torch.stack([value.double() for value in figure])
        if leaf.grad is not None:
            inputs.x0.backward(leaf.grad)
        for send in sends:
            send.wait()
        plain, combined = losses[1] / settings.normaliser, losses[2] / settings.normaliser
        return StageLosses(losses[0].sum() * scale, plain, combined if residual else None, tokens)

    def _receive(self, first: int, residual: bool, like: Tensor) -> list[tuple[int, Tensor]]:
        """(stage, boundary state) pairs from the rank before: the last one, or all of them."""
        wanted = range(first) if residual else range(max(0, first - 1), first)
        states = []
        for stage in wanted:
            state = torch.empty_like(like, requires_grad=False)
            dist.recv(state, self.ranks.rank - 1)
            states.append((stage, state))
        return states

    def reduce_gradients(self) -> None:
        """Sum the gradients of shared tensors over ranks: once a step."""
        for name, parameter in self.model.named_parameters():
            if self.owners[name] is not None:
                continue
            used = torch.tensor(float(parameter.grad is not None))
            if self.ranks.sum(used) == 0:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        """All tensors of the model on every rank: each broadcast by its owner."""
        full = {}
        for name, parameter in self.model.named_parameters():
            owner = self.owners[name]
            mine = owner in (None, self.ranks.rank)
            full[name] = parameter.detach().clone() if mine else torch.empty(parameter.shape, dtype=parameter.dtype)
            if owner is not None:
                dist.broadcast(full[name], owner)
        return full
