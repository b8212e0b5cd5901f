"""What a training run costs before it is started: FLOPs per token, memory per rank, whether it fits.

Design choices
- FLOPs are those of the matrix products the objective needs (2 per multiply-add, backward twice the forward), attention
  counted over the keys its windows let a query see; element-wise work and the optimizer are not in them.
- Memory is an estimate from shapes: weights, gradients and optimizer state exactly, activations from what one block
  saves. The parameter counts come from the model itself, built on the meta device.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.recipe import Recipe
from stagewise.training.head_loss import chunk_values
from stagewise.training.optimizer import parameter_groups

GIB = 1 << 30


@dataclass(frozen=True)
class Flops:
    """FLOPs per trained token: `trunk` and `heads` forward and backward, `earlier` the heads of earlier experts.

    `earlier` is what residual Log-OP adds by recomputing the logits of the experts before each one.
    """

    trunk: float
    heads: float
    earlier: float

    @property
    def total(self) -> float:
        """All FLOPs of a trained token."""
        return self.trunk + self.heads + self.earlier


def mean_keys(length: int, window: int) -> float:
    """Keys a query sees on average over `length` positions when it looks back `window` (itself included)."""
    reach = min(window, length - 1)
    return (reach * (reach + 1) / 2 + (length - reach) * (reach + 1)) / length


def forward_flops(config: Any, length: int, stages: range | None = None) -> float:
    """FLOPs per token of the trunk's forward pass over `stages` (all when None) at sequences of `length`."""
    first, last = (0, config.num_hidden_layers)
    if stages is not None:
        first, last = config.stage_ranges[stages[0]][0], config.stage_ranges[stages[-1]][1]
    size, queries, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.kv_size
    matrices = 2 * size * queries + 2 * size * kv + 2 * size * config.intermediate_size
    total = 0.0
    for layer in range(first, last):
        gate = config.ve_gate_channels * config.num_key_value_heads if layer in config.value_embed_layers else 0
        total += 2 * (matrices + gate) + 4 * queries * mean_keys(length, config.layer_windows[layer])
    return total


def training_flops(config: Any, length: int) -> Flops:
    """FLOPs per token of one forward and backward pass of the configuration's own objective."""
    head = 2.0 * config.vocab_size * config.hidden_size
    experts = 1 if config.poe_mode == "none" else config.num_stages
    earlier = head * experts * (experts - 1) / 2 if config.poe_mode == "residual_logop" else 0.0
    return Flops(3 * forward_flops(config, length), 3 * head * experts, earlier)


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank while training."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.activations


def activation_bytes(config: Any, rows: int, length: int, width: int, checkpointing: bool = False) -> int:
    """Bytes alive for backward at most: of the deepest stage for detached objectives, of all layers otherwise.

    `width` is the bytes of a value. With `checkpointing` a layer keeps its input; one at a time is recomputed whole.
    """
    size, queries, kv = config.hidden_size, config.num_attention_heads * config.head_dim, config.kv_size
    block = 7 * size + 4 * queries + 4 * kv + 2 * config.intermediate_size  # values a token and layer
    ranges = config.stage_ranges[: config.num_stages]
    detached = config.poe_mode in ("flat", "residual_logop")
    layers = max(last - first for first, last in ranges) if detached else ranges[-1][1]
    per_token = layers * size + block if checkpointing else layers * block
    boundaries = 4 * size + (len(ranges) * size if config.poe_mode != "flat" else 0)
    return rows * length * (per_token + boundaries) * width


def head_bytes(config: Any, device: torch.device) -> int:
    """Bytes alive while a head's loss is taken: a chunk's logits three times over, the gradient of the head matrix."""
    return 12 * chunk_values(device) + 8 * config.padded_vocab_size * config.hidden_size


def training_memory(recipe: Recipe, model: Any, world: int, device: torch.device | None = None) -> Memory:
    """Memory per rank of `world` ranks, with the state of ZeRO-2: divided optimizer, whole weights and gradients."""
    training = recipe.training
    values = sum(p.numel() for p in model.parameters())
    tables = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Embedding))
    half = training.dtype == "bfloat16"
    state = 0
    for group in parameter_groups(model.named_parameters(), model.config.hidden_size):
        count = sum(p.numel() for p in group["params"])
        state += count * (8 if group["kind"] == "adamw" else 4)
    return Memory(
        weights=4 * values + (2 * (values - tables) if half else 0),
        gradients=4 * values,
        optimizer=state // world,
        activations=activation_bytes(
            model.config,
            training.micro_batch,
            training.sequence_length,
            2 if half else 4,
            training.activation_checkpointing,
        )
        + head_bytes(model.config, device or torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    )


def device_memory() -> tuple[str, int]:
    """The device a run would use here, and its memory in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return "this machine's memory", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def dry_run(recipe: Recipe, world: int | None = None) -> str:
    """A report on `recipe` without running it: tokens, steps, FLOPs and memory per rank, and whether it fits here.

    `world` is the number of ranks, by default the one `torchrun` set. Raises ValueError when the model cannot be built.
    """
    world = world or int(os.environ.get("WORLD_SIZE", "1"))
    with torch.device("meta"):
        model = PoEForCausalLM(PoEConfig(**recipe.model.config_arguments()))
    training = recipe.training
    values = sum(p.numel() for p in model.parameters())
    flops = training_flops(model.config, training.sequence_length)
    memory = training_memory(recipe, model, world)
    place, room = device_memory()
    rows = training.batch_tokens // training.sequence_length
    objective = recipe.model.poe_mode + (
        f", stages {recipe.model.poe_stage_layers}" if recipe.model.poe_stage_layers else ""
    )
    fits = memory.total <= room
    lines = [
        f"{recipe.name}: {values:,} parameters in {sum(1 for _ in model.parameters())} tensors ({objective})",
        f"  steps        {training.steps:,} of {training.batch_tokens:,} tokens, {rows:,} rows",
        f"  tokens       {recipe.tokens:,} ({recipe.tokens / values:.1f} a parameter)",
        f"  FLOPs        {flops.total:.3e} a token, {flops.total * recipe.tokens:.3e} in all"
        f" (trunk {flops.trunk / flops.total:.0%}, heads {flops.heads / flops.total:.0%})",
    ]
    if flops.earlier:
        without = flops.total - flops.earlier
        lines.append(
            f"               {flops.earlier / flops.total:.1%} earlier experts' heads; {without:.3e} a token without"
        )
    lines += [
        f"  ranks        {world}, {rows / world / training.micro_batch:,.1f} forward passes a step and rank",
        f"  memory       {memory.total / GIB:.2f} GiB a rank: weights {memory.weights / GIB:.2f},"
        f" gradients {memory.gradients / GIB:.2f}, optimizer {memory.optimizer / GIB:.2f},"
        f" activations about {memory.activations / GIB:.2f}",
        f"  {'fits' if fits else 'DOES NOT FIT'}         {place}: {room / GIB:.2f} GiB",
    ]
    if rows % world:
        lines.append(f"  {rows} rows a step cannot be shared evenly by {world} ranks")
    if not fits:
        lines.append("  try a smaller micro_batch, activation_checkpointing: true, or more ranks")
    return "\n".join(lines)
