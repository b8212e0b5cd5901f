"""Sharded data parallelism over `torchrun` ranks, ZeRO-2 style, without a model wrapper.

Design choices
- Every rank holds all parameters and its own gradients; optimizer state is divided. A step is reduce_scatter of the
  gradients, an update of the owned slice, all_gather of the result.
- AdamW tensors are sliced along their first dimension, zero-padded to a multiple of the ranks, so a vocabulary need not
  divide. Muon owns whole matrices: the stack of one shape is padded to a multiple of the ranks.
- Tensors under 1024 elements are summed with all_reduce and updated by every rank alike.
- State is gathered on save and sliced on load: a checkpoint says nothing about how many ranks wrote it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from stagewise.training.optimizer import (
    MuonAdamW,
    adamw_state,
    apply_adamw,
    apply_muon,
    muon_state,
    muon_update,
)

SMALL = 1024  # elements below which a tensor is not divided


@dataclass(frozen=True)
class Ranks:
    """This process among all of a run; `world` 1 means no process group."""

    rank: int = 0
    world: int = 1
    device: torch.device = torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this rank writes files and talks to the user."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The tensor summed over ranks."""
        if self.world > 1:
            tensor = tensor.to(self.device)
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag))))

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            dist.barrier()


def open_ranks(device: str | torch.device | None = None, timeout: float = 600.0) -> Ranks:
    """Join the process group `torchrun` describes (nccl on GPUs, gloo elsewhere), or stand alone without one.

    `timeout` seconds without an answer from another rank end the run with an error.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    local = int(os.environ.get("LOCAL_RANK", "0"))
    place = torch.device("cuda", local) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(place)
    if world == 1:
        return Ranks(device=place)
    dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(seconds=timeout))
    return Ranks(dist.get_rank(), world, place)


def close_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """`tensor` with zero rows appended until its first dimension divides by `multiple`."""
    missing = -tensor.size(0) % multiple
    return tensor if not missing else torch.cat([tensor, tensor.new_zeros(missing, *tensor.shape[1:])])


class ShardedMuonAdamW(MuonAdamW):
    """`MuonAdamW` whose state and work are divided among ranks; gradients are summed over ranks by `step`.

    Every rank must have gradients for the same tensors. Construct it with the same groups on every rank.
    """

    def __init__(self, groups: list[dict[str, Any]], *, ranks: Ranks, **options: Any):
        super().__init__(groups, **options)
        self.ranks = ranks

    def _scatter(self, full: Tensor) -> Tensor:
        """This rank's slice of `full`, whose first dimension divides, summed over ranks."""
        own = full.new_empty(full.size(0) // self.ranks.world, *full.shape[1:])
        dist.reduce_scatter_tensor(own, full.contiguous())
        return own

    def _gather(self, own: Tensor) -> Tensor:
        """All ranks' slices, one after the other."""
        full = own.new_empty(own.size(0) * self.ranks.world, *own.shape[1:])
        dist.all_gather_into_tensor(full, own.contiguous())
        return full

    def _own(self, full: Tensor) -> Tensor:
        """This rank's slice of a tensor every rank has, padded."""
        return _padded(full, self.ranks.world).chunk(self.ranks.world)[self.ranks.rank].clone()

    def _divided(self, parameter: Tensor) -> bool:
        return parameter.numel() >= SMALL

    def _adamw_step(self, group: dict[str, Any]) -> None:
        parameters = [p for p in group["params"] if p.grad is not None]
        slices, gradients = [], []
        for parameter in parameters:
            if self._divided(parameter):
                slices.append(self._own(parameter.detach()))
                gradients.append(self._scatter(_padded(parameter.grad, self.ranks.world)))
            else:
                slices.append(parameter.detach())
                gradients.append(self.ranks.sum(parameter.grad.clone()))
            if not self.state[parameter]:
                self.state[parameter].update(adamw_state(slices[-1]))
        if parameters:
            apply_adamw(slices, gradients, [self.state[p] for p in parameters], group)
        for parameter, own in zip(parameters, slices, strict=True):
            if self._divided(parameter):
                parameter.copy_(self._gather(own)[: parameter.size(0)])

    def _muon_step(self, group: dict[str, Any]) -> None:
        parameters = group["params"]
        if all(p.grad is None for p in parameters):
            return
        stacked = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in parameters])
        gradients = self._scatter(_padded(stacked, self.ranks.world))  # (n / world, r, c)
        own = gradients.size(0)
        state = self.state[parameters[0]]
        if not state:
            state.update(muon_state(own, parameters[0]))
        update = muon_update(gradients, state["momentum_buffer"], state["second_moment"], group)
        update = self._gather(update)
        for parameter, direction in zip(parameters, update, strict=False):  # beyond the last: padding
            if parameter.grad is not None:
                apply_muon(parameter, direction, group["lr"], group["weight_decay"])

    def named_state(self) -> dict[str, Tensor]:
        """State as `MuonAdamW.named_state` gives it, gathered from all ranks (all must call)."""
        full = {}
        for name, parameter, kind, count in self._owners():
            for key, value in self.state[parameter].items():
                if value.dim() == 0 or (kind == "adamw" and not self._divided(parameter)):
                    full[f"{name}.{key}"] = value
                else:
                    full[f"{name}.{key}"] = self._gather(value)[:count]
        return full

    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """Take this rank's share of a state that `named_state` gave, on any number of ranks."""
        super().load_named_state(tensors)
        for _, parameter, kind, _ in self._owners():
            for key, value in self.state[parameter].items():
                if value.dim() and (kind == "muon" or self._divided(parameter)):
                    self.state[parameter][key] = self._own(value)
