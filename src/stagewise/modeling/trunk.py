"""The transformer trunk: norm, rotary positions, attention, MLP, block, and the loop over a stage's layers.

Design choices:
- No biases, no learnable norms. Queries and keys are rotated, then RMS-normed; both factors `qk_scale` are folded into
  the softmax scale.
- A block does not know how keys and values are kept. It calls `attend(layer, q, k, v)`: either `CausalAttention` over
  the sequence at hand, or the frontier cache's. The same block therefore serves training, prefill and decoding.
- Everything a stage needs besides its hidden input travels in `StageInputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .native import Kernels
from .packed import linear_together

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
FEW_QUERIES = 16


def norm(x: Tensor, eps: float, kernels: Kernels | None = None) -> Tensor:
    """RMS norm without a learnable weight, over the last dimension."""
    if kernels is not None:
        return kernels.norm(x, eps)
    size = x.size(-1)
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x, (size,), eps=eps)
    # On a CPU rms_norm is a dozen small operations, layer_norm one. (x, -x) has mean 0 and the mean square as variance.
    return F.layer_norm(torch.cat((x, -x), dim=-1), (2 * size,), eps=eps)[..., :size]


def rotary_tables(positions: Tensor, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin for every position and both halves of a head: each (..., 1, d), computed in float64."""
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64, device=positions.device) / head_dim)
    angle = positions.to(torch.float64)[..., None] * inverse  # (..., d/2)
    cos, sin = angle.cos(), angle.sin()
    cos = torch.cat((cos, cos), dim=-1)
    sin = torch.cat((sin, -sin), dim=-1)  # y1 = x1 cos + x2 sin, y2 = x2 cos - x1 sin
    return cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the half-split pairs of x (B, T, heads, d) by minus the angle of the position."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, dims=-1), sin)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal=False, fp32=False):
    """softmax(q k' scale) v for q (B, H, T, d) over k, v (B, G, S, d), G dividing H; mask is True where visible."""
    dtype = q.dtype
    # For a few queries half precision is also the slow way on a CPU: several times slower than converting first.
    fp32 = fp32 or (q.size(2) <= FEW_QUERIES and q.device.type == "cpu")
    if fp32 and dtype in (torch.bfloat16, torch.float16):
        q, k, v = q.float(), k.float(), v.float()
    heads, length, groups = q.size(1), q.size(2), k.size(1)
    if groups != heads and length == 1:  # one query: its grouped heads are rows that share the keys
        q = q.reshape(q.size(0), groups, heads // groups, q.size(3))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        y = y.reshape(y.size(0), heads, 1, y.size(3))
    else:
        if groups != heads:
            k = k.repeat_interleave(heads // groups, dim=1)
            v = v.repeat_interleave(heads // groups, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return y.to(dtype)


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, fp32: bool = False) -> Tensor:
    """Causal attention over one sequence in which a query at i sees the keys i - window .. i.

    Queries are taken in chunks of the window's length, each against at most two windows of keys, so the work grows
    with T * window rather than T * T.
    """
    length = q.size(2)
    if length <= window + 1:
        return attention(q, k, v, scale, causal=True, fp32=fp32)
    chunk = max(window, 128)
    out = []
    for start in range(0, length, chunk):
        stop, first = min(start + chunk, length), max(0, start - window)
        queries = torch.arange(start, stop, device=q.device)[:, None]
        keys = torch.arange(first, stop, device=q.device)[None, :]
        mask = (keys <= queries) & (keys >= queries - window)  # (chunk, keys)
        out.append(attention(q[:, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], scale, mask, fp32=fp32))
    return torch.cat(out, dim=2)


class CausalAttention:
    """Attention over the sequence at hand, nothing kept: training and uncached evaluation."""

    def __init__(self, windows: list[int], scale: float, fp32: bool):
        self.windows, self.scale, self.fp32 = windows, scale, fp32

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return windowed_attention(q, k, v, self.windows[layer], self.scale, self.fp32)


@dataclass
class StageInputs:
    """What a stage reads besides its hidden input; the same for every stage of one path.

    Row r holds the positions starts[r] .. starts[r] + counts[r] - 1; what lies beyond counts[r] is padding.
    """

    ids: Tensor  # (B, T)
    x0: Tensor  # (B, T, D)
    cos: Tensor  # (1 or B, T, 1, d)
    sin: Tensor
    attend: Attend
    lambdas: list[tuple]  # (resid, x0) factors of every layer of the path
    starts: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    path: str = "base"
    kernels: Kernels | None = None  # used where given: few rows on a CPU, packed weights, no gradients


@dataclass
class StageOutput:
    """Hidden states after a stage, and the backout tap once the stage that holds it has run."""

    hidden: Tensor  # (B, T, D)
    tap: Tensor | None = None  # (B, T, D)


class Attention(nn.Module):
    packs_together = ("c_q", "c_k", "c_v")  # they read the same input
    stays_plain = ("ve_gate",)

    def __init__(self, config, layer: int):
        super().__init__()
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.gate_scale, self.gate_channels = config.ve_gate_scale, config.ve_gate_channels
        size, kv = config.hidden_size, config.kv_size
        self.c_q = nn.Linear(size, self.heads * self.dim, bias=False)
        self.c_k = nn.Linear(size, kv, bias=False)
        self.c_v = nn.Linear(size, kv, bias=False)
        self.c_proj = nn.Linear(self.heads * self.dim, size, bias=False)
        if layer in config.value_embed_layers:
            self.ve_gate = nn.Linear(self.gate_channels, self.groups, bias=False)

    def forward(
        self, x: Tensor, values: nn.Embedding | None, layer: int, inputs: StageInputs, attend: Attend
    ) -> Tensor:
        rows, length, _ = x.shape
        kernels = inputs.kernels
        qkv = linear_together(x, self.c_q, self.c_k, self.c_v).view(rows, length, -1, self.dim)
        qk, v = qkv.split((self.heads + self.groups, self.groups), dim=2)  # (B, T, H + G, d), (B, T, G, d)
        if values is not None and kernels is not None:
            v = kernels.gate_values(v, x, self.ve_gate.weight, self.gate_scale, values.weight, inputs.ids)
        elif values is not None:
            gate = self.gate_scale * torch.sigmoid(self.ve_gate(x[..., : self.gate_channels]))  # (B, T, G)
            v = torch.addcmul(v, gate.unsqueeze(-1), values(inputs.ids).view(v.shape))
        if kernels is not None:
            qk = kernels.rotate_norm(qk, inputs.cos, inputs.sin, self.eps)
        else:
            qk = norm(rotate(qk, inputs.cos, inputs.sin), self.eps)
        q, k = qk.transpose(1, 2).split((self.heads, self.groups), dim=1)
        y = attend(layer, q, k, v.transpose(1, 2))  # (B, H, T, d)
        return self.c_proj(y.transpose(1, 2).reshape(rows, length, self.heads * self.dim))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.c_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    """One layer: attention, then MLP, each added to the residual stream."""

    def __init__(self, config, layer: int):
        super().__init__()
        self.layer, self.eps = layer, config.rms_norm_eps
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, values: nn.Embedding | None, inputs: StageInputs, attend: Attend) -> Tensor:
        x = x + self.attn(norm(x, self.eps, inputs.kernels), values, self.layer, inputs, attend)
        return x + self.mlp(norm(x, self.eps, inputs.kernels))


def run_layers(
    blocks,
    value_embeds,
    backout_layer: int | None,
    hidden: Tensor,
    inputs: StageInputs,
    attend: Attend,
) -> StageOutput:
    """Run consecutive blocks on the residual stream.

    Args:
        blocks: the stage's blocks, in order; each knows its layer index.
        value_embeds: mapping from str(layer) to its value embedding.
        backout_layer: the layer after which the residual stream is tapped, or None.
        hidden: (B, T, D).
    """
    tap = None
    for block in blocks:
        resid, x0 = inputs.lambdas[block.layer]
        if isinstance(x0, float):
            hidden = torch.add(hidden * resid, inputs.x0, alpha=x0)
        else:
            hidden = hidden * resid + inputs.x0 * x0
        key = str(block.layer)
        hidden = block(hidden, value_embeds[key] if key in value_embeds else None, inputs, attend)
        if block.layer == backout_layer:
            tap = hidden
    return StageOutput(hidden, tap)
