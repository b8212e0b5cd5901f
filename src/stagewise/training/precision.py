"""bf16 compute beside fp32 master weights.

Design choices
- A second model holds bf16 copies of the matrices, refreshed after each optimizer step: no cast in any forward pass.
- Embedding tables are not copied: rows are looked up in the fp32 master and rounded after, so their gradients, sums
  over many equal ids, also add up in fp32.
- Every gradient is added to its fp32 master the moment it is complete, and freed.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MasterEmbedding(nn.Module):
    """An embedding that reads a table kept elsewhere and returns its rows in another dtype."""

    def __init__(self, table: nn.Parameter, dtype: torch.dtype):
        super().__init__()
        self._table = (table,)  # in a tuple: the table belongs to the master model
        self.dtype = dtype

    def forward(self, ids: Tensor) -> Tensor:
        """Rows of the table in `dtype`: (...) -> (..., D)."""
        return F.embedding(ids, self._table[0]).to(self.dtype)


class ComputeModel:
    """The model that forward and backward run on: `model`, kept in step with its fp32 `master` by `refresh`.

    With dtype float32 (or the master's own) it is the master itself and nothing is copied.
    """

    def __init__(self, master: nn.Module, dtype: torch.dtype):
        self.master, self.model = master, master
        self._pairs: list[tuple[Tensor, Tensor]] = []  # (copy, master)
        if dtype == next(master.parameters()).dtype:
            return
        self.model = self._copy(master, dtype)
        self.refresh()

    def _copy(self, master: Any, dtype: torch.dtype) -> Any:
        with torch.device("meta"):
            copy = type(master)(master.config)
        for name, module in list(copy.named_modules()):
            if isinstance(module, nn.Embedding):
                parent, _, last = name.rpartition(".")
                table = master.get_submodule(name).weight
                copy.get_submodule(parent)._modules[last] = MasterEmbedding(table, dtype)
        for name, _ in list(copy.named_parameters()):
            source = master.get_parameter(name)
            own = nn.Parameter(torch.empty_like(source, dtype=dtype), requires_grad=source.requires_grad)
            if own.requires_grad:
                own.register_post_accumulate_grad_hook(_GradientTo(source))
            module_name, _, last = name.rpartition(".")
            copy.get_submodule(module_name).register_parameter(last, own)
            self._pairs.append((own, source))
        for name, buffer in master.named_buffers():
            module_name, _, last = name.rpartition(".")
            copy.get_submodule(module_name)._buffers[last] = buffer
        return copy.train(master.training)

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the master's weights into the copy; call after every optimizer step."""
        if self._pairs:
            torch._foreach_copy_([copy for copy, _ in self._pairs], [source for _, source in self._pairs])


class _GradientTo:
    """Moves a finished gradient into the master's fp32 one."""

    def __init__(self, master: Tensor):
        self.master = master

    def __call__(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        if self.master.grad is None:
            self.master.grad = gradient.to(self.master.dtype)
        else:
            self.master.grad.add_(gradient)
