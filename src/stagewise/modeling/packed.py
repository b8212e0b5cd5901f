"""Packed weights: linear layers stored once, in the form in which they are read fastest. Inference only.

Design choices:
- `F.linear` reorders its weight on every call and at a few rows spends most of its time there. oneDNN's prepacked
  product reads the same weight two to five times faster. Those operators are private to torch: only this file names
  them, and where they are missing weights stay as they are.
- Where `native`'s own product can be had it is faster still: less overhead on small matrices, more of the memory's
  bandwidth on large ones.
- Below four rows the input is padded to four: that reads memory faster, and it makes every output row independent of
  how many rows are computed with it, bit for bit. A token verified in a batch of drafts gets the logits it would have
  got alone.
- A packed layer keeps its Parameter objects (emptied), so optimisers and names survive packing and unpacking, and
  there is one copy of every weight in memory. `state_dict()` of a packed model holds the plain weights.
- Layers that read the same input (`packs_together` of their owner) become one product; heads that are added
  (`head_groups()` of the model) get their sum, added in fp32 and stored in their dtype, besides the originals.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native import blocked, kernels, unblocked

LEAST_ROWS = 4  # see above
SMALL = 1 << 20  # bytes up to which a weight stays in a core's cache


def packing_supported(dtype: torch.dtype, device: torch.device | str) -> bool:
    """Whether weights of this kind can be kept in oneDNN's own layout here."""
    if torch.device(device).type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


class PackedWeight:
    """One (out, in) matrix, reordered where that is supported; calling it computes `x @ weight.T`.

    layout: "blocked" (for `native`), "reordered" (oneDNN's) or "plain".
    """

    def __init__(self, weight: Tensor):
        weight = weight.detach()
        self.shape, self.dtype = weight.shape, weight.dtype
        self.layout, self.least_rows = "plain", 1
        if not packing_supported(weight.dtype, weight.device):
            self.store = weight.contiguous()
            return
        native = kernels()
        if native is not None and (weight.nbytes <= SMALL or weight.dtype == torch.float32 or native.bf16_products):
            self.layout, self.store = "blocked", blocked(weight)
            return
        self.layout = "reordered"
        self.store = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), LEAST_ROWS)
        self._apply = torch.ops.mkldnn._linear_pointwise.default
        if weight.nbytes > SMALL or not self.rows_agree():
            self.least_rows = LEAST_ROWS

    def rows_agree(self) -> bool:
        """Whether one to three rows give the bits they have among four, on a random input."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(LEAST_ROWS, self.shape[1], generator=generator).to(self.dtype)
        whole = self.product(x)
        return all(torch.equal(self.product(x[:n]), whole[:n]) for n in range(1, LEAST_ROWS))

    def product(self, x: Tensor) -> Tensor:
        return self._apply(x, self.store, None, "none", [], "")

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        if self.layout == "plain":
            return F.linear(x, self.store)
        rows = x.numel() // self.shape[1]
        if self.layout == "blocked":
            native = kernels()
            assert native is not None, "blocked weights are made only where the kernels compile"
            return native.linear(x, self.store, self.shape[0])
        if rows >= self.least_rows:
            return self.product(x)
        if rows == 1:
            y = self.product(x.reshape(1, -1).expand(LEAST_ROWS, -1))
        else:
            y = self.product(F.pad(x.reshape(rows, -1), (0, 0, 0, LEAST_ROWS - rows)))
        return y[:rows].view(*x.shape[:-1], self.shape[0])

    def dense(self) -> Tensor:
        """The plain matrix; the bits it was made from."""
        if self.layout == "blocked":
            return unblocked(self.store, self.shape)
        return self.store.to_dense() if self.layout == "reordered" else self.store

    def nbytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize

    def __deepcopy__(self, memo) -> PackedWeight:
        memo[id(self)] = copy = PackedWeight(self.dense().clone())
        return copy


class PackedLinear(nn.Linear):
    """A bias-free linear layer whose weight lives in a PackedWeight, perhaps as a range of a larger one's rows."""

    packed: PackedWeight
    rows: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        refuse_gradients(x)
        first, last = self.rows
        y = self.packed(x)
        return y if last - first == y.size(-1) else y[..., first:last]

    def dense(self) -> Tensor:
        first, last = self.rows
        weight = self.packed.dense()
        return weight if last - first == weight.size(0) else weight[first:last].clone()

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.dense()

    def _load_from_state_dict(self, *args, **kwargs):
        raise RuntimeError("this model is packed for inference: call unpack(model) before loading weights into it")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, packed"


def refuse_gradients(x: Tensor) -> None:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "this model is packed for inference and cannot compute gradients: call model.train() or unpack(model), "
            "or run it under torch.no_grad()"
        )


def linear_together(x: Tensor, *layers: nn.Linear) -> Tensor:
    """The outputs of several linear layers on the same input, joined (..., sum of sizes): one product where packed."""
    packed: Any = getattr(layers[0], "packed", None)
    if packed is None or getattr(layers[-1], "packed", None) is not packed:
        return torch.cat([layer(x) for layer in layers], dim=-1)
    refuse_gradients(x)
    return packed(x)  # type: ignore[misc]


def _modules(model: Any):
    """Every module of the model, those of attached paths included."""
    yield from model.modules()
    for path in getattr(model, "paths", {}).values():
        for module in (*path.blocks, *path.heads):
            yield from module.modules()


def _pack_layers(layers: list[Any]) -> None:
    packed = PackedWeight(layers[0].weight if len(layers) == 1 else torch.cat([m.weight for m in layers]))
    first = 0
    for layer in layers:
        layer.__class__ = PackedLinear
        layer.packed, layer.rows = packed, (first, first + layer.out_features)
        first += layer.out_features
        layer.weight.data = layer.weight.data.new_empty(0)


@torch.inference_mode(False)  # parameters must stay usable in training, whoever packs
@torch.no_grad()
def pack(model: Any, fold: bool = True) -> Any:
    """Pack every linear layer of a model in place, for inference; what is packed already stays as it is.

    Args:
        fold: also keep the sum of heads that are added. That is a rounding of its own in half precision.
    Returns the model, its `is_packed` set. Half precision other than bfloat16, fp64 and accelerators keep the plain
    layout, in which only joining layers and folding heads pay.
    """
    groups = model.head_groups() if fold and hasattr(model, "head_groups") else {}
    folded = getattr(model, "folded_heads", {})
    for key, heads in groups.items():
        if key not in folded:
            total = torch.zeros((), dtype=torch.promote_types(heads[0].weight.dtype, torch.float32))
            for head in heads:
                weight = head.dense() if type(head) is PackedLinear else head.weight
                total = weight.to(total.dtype) + total.to(weight.device)
            folded[key] = PackedWeight(total.to(heads[0].weight.dtype))
    plain = {id(head) for heads in groups.values() for head in heads[1:]}  # used in sums only
    for module in _modules(model):
        plain.update(id(getattr(module, name, None)) for name in getattr(module, "stays_plain", ()))
        names = getattr(module, "packs_together", ())
        if names and type(getattr(module, names[0])) is nn.Linear:
            _pack_layers([getattr(module, name) for name in names])
    for module in _modules(model):
        if type(module) is nn.Linear and module.bias is None and id(module) not in plain:
            _pack_layers([module])
    model.is_packed = True
    return model


@torch.inference_mode(False)
@torch.no_grad()
def unpack(model: Any) -> Any:
    """Give every packed layer its plain weight back, in the Parameter it had; returns the model."""
    for module in _modules(model):
        if type(module) is PackedLinear:
            module.weight.data = module.dense()
            module.__class__ = nn.Linear  # type: ignore[assignment]
            del module.packed, module.rows
    getattr(model, "folded_heads", {}).clear()
    model.is_packed = False
    return model


@contextmanager
def unpacked(model: nn.Module):
    """The model's plain weights for the time of the block; it is packed again afterwards if it was before."""
    was, folded = getattr(model, "is_packed", False), bool(getattr(model, "folded_heads", {}))
    unpack(model)
    try:
        yield model
    finally:
        if was:
            pack(model, fold=folded)
