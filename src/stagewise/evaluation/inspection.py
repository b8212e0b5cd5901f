"""What a model costs: parameters, FLOPs, bytes read and KV bytes, per stage, prefix and mode, from its shape alone.

Design choices:
- Parameters are counted on a model built on the meta device: every tensor belongs to exactly one part, so the parts add
  up to the total.
- Costs are per generated token of one row at a given context, weights read once, heads folded for inference (one
  matrix for each expert: shared head plus its own; models with only the shared head read that one matrix once).
- A multiply and an add are two FLOPs; norms, softmax and other elementwise work are left out.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.modeling.configuration_poe import PRESETS

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8, "int8": 1}


@dataclass
class Cost:
    """Cost of one generated token in one mode (or of one stage), at batch 1."""

    name: str
    layers: int  # layers evaluated
    heads: int  # head matrices read
    parameters: int  # held in memory for it, embeddings included
    flops: int
    weight_bytes: int  # matrices and embedding rows read
    kv_bytes_read: int  # keys and values of the context
    kv_bytes_per_token: int  # kept for every position within a layer's window
    kv_bytes: int  # kept at the given context

    @property
    def bytes_read(self) -> int:
        return self.weight_bytes + self.kv_bytes_read

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bytes_read": self.bytes_read}


def meta_model(config: PoEConfig) -> PoEForCausalLM:
    """The model of a configuration without memory behind its tensors."""
    with torch.device("meta"):
        return PoEForCausalLM(config)


def parameter_parts(model: PoEForCausalLM) -> dict[str, int]:
    """Parameters by part: embedding, layer_{i}, value_embedding_{i}, head_shared, head_{k}, head_specialist_{j},
    scalars.

    Buffers that travel with the weights (a specialist's overlay) are not parameters and not counted.
    """
    parts: dict[str, int] = {}
    chained = len(model.config.specialist_layers)
    for name, tensor in model.named_parameters():
        words = name.split(".")
        if name.startswith("transformer.wte"):
            part = "embedding"
        elif name.startswith("transformer.h."):
            part = f"layer_{words[2]}"
        elif words[0] == "value_embeds":
            part = f"value_embedding_{words[1]}"
        elif words[0] == "lm_head":
            part = "head_shared"
        elif words[0] == "lm_head_stages":
            part = f"head_{words[1]}"
        elif words[0] == "lm_head_ancestors":
            part = f"head_specialist_{words[1]}"
        elif words[0] == "lm_head_stage":
            part = f"head_specialist_{chained - 1}"
        else:
            part = "scalars"
        parts[part] = parts.get(part, 0) + tensor.numel()
    return parts


class Costs:
    """Costs of a configuration in a weight type, at a context of `context` tokens (the longest by default)."""

    def __init__(self, config: PoEConfig, dtype: str = "bfloat16", context: int | None = None) -> None:
        if dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPE_BYTES)}")
        self.config, self.dtype, self.size = config, dtype, DTYPE_BYTES[dtype]
        self.context = config.max_position_embeddings if context is None else context
        if not 1 <= self.context <= config.max_position_embeddings:
            raise ValueError(
                f"context={context} must lie between 1 and {config.max_position_embeddings} (max_position_embeddings)"
            )
        self.parts = parameter_parts(meta_model(config))

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def head_size(self) -> int:
        return self.config.padded_vocab_size * self.config.hidden_size

    def reach(self, layer: int) -> int:
        """Positions a query at the end of the context sees in a layer, itself included."""
        return min(self.context, self.config.layer_windows[layer] + 1)

    def of_layers(self, name: str, layers: range, heads: int = 0, own_heads: int = 0) -> Cost:
        """Cost of evaluating `layers` and applying `heads` head matrices; `own_heads` stand beside the shared one."""
        config = self.config
        matrices = sum(self.parts[f"layer_{i}"] for i in layers) + heads * self.head_size
        tables = [self.parts.get(f"value_embedding_{i}", 0) for i in layers]
        rows = config.hidden_size * (layers.start == 0) + config.kv_size * sum(1 for t in tables if t)
        held = matrices + sum(tables) + (own_heads - heads) * self.head_size
        seen = sum(self.reach(i) for i in layers)
        kv = 2 * config.kv_size * self.size
        return Cost(
            name=name,
            layers=len(layers),
            heads=heads,
            parameters=held,
            flops=2 * matrices + 4 * config.num_attention_heads * config.head_dim * seen,
            weight_bytes=(matrices + rows) * self.size,
            kv_bytes_read=kv * seen,
            kv_bytes_per_token=kv * len(layers),
            kv_bytes=kv * seen,
        )

    def stages(self) -> list[Cost]:
        """Each stage alone, without the stages below: its layers and its own head, if it has one."""
        costs = []
        for k, (first, last) in enumerate(self.config.stage_ranges):
            base = k < self.config.num_stages
            own = 1 if (self.config.per_stage_head or not base) else 0
            name = f"stage {k}" if base else f"specialist {k - self.config.num_stages}"
            costs.append(self.of_layers(name, range(first, last), own, own))
        return costs

    def mode(self, name: str, stages: int, experts: int, own_heads: int) -> Cost:
        """A mode that runs the first `stages` stages and applies `experts` folded heads."""
        cost = self.of_layers(name, range(self.config.stage_ranges[stages - 1][1]), experts, own_heads + 1)
        cost.parameters += self.parts["embedding"] + self.parts["scalars"]
        return cost

    def modes(self) -> list[Cost]:
        """Full product, every shorter prefix, every single stage, the final path, and the specialist's path."""
        config, costs = self.config, []
        own = 1 if config.per_stage_head else 0
        if config.poe_mode != "none":
            for k in range(config.num_stages, 0, -1):
                name = "full" if k == config.num_stages else f"prefix {k}"
                costs.append(self.mode(name, k, k if own else 1, k * own))
            costs += [self.mode(f"stage {k} alone", k + 1, 1, own) for k in range(config.num_stages)]
        costs.append(self.mode("final path", config.num_stages, 1, 0))
        if config.is_specialist:
            base = own if config.specialist_base_head == "last_expert" else 0
            costs.append(self.mode("specialist", len(config.stage_ranges), 1, base + len(config.specialist_layers)))
        return costs

    def full(self) -> Cost:
        """Cost of the model's default output: the product, the final path, or the specialist's."""
        return next(
            cost
            for cost in self.modes()
            if cost.name == ("specialist" if self.config.is_specialist else _default_name(self.config))
        )

    def early_costs(self) -> list[float]:
        """Bytes read for a draft token at each stage as a share of a token of the full product: f = (phi + h) / C."""
        modes = {cost.name: cost.weight_bytes for cost in self.modes()}
        return [modes[f"stage {k} alone"] / modes["full"] for k in range(self.config.num_stages)]


def _default_name(config: PoEConfig) -> str:
    return "final path" if config.poe_mode == "none" else "full"


def available_memory() -> dict[str, int]:
    """Bytes free on this machine (`memory`) and on its accelerator (`accelerator`), where there is one."""
    try:
        import psutil

        memory = int(psutil.virtual_memory().available)
    except ImportError:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    found = {"memory": memory}
    if torch.cuda.is_available():
        found["accelerator"] = int(torch.cuda.mem_get_info()[0])
    return found


def inspect_config(
    config: PoEConfig, *, dtype: str = "bfloat16", context: int | None = None, batch: int = 1
) -> dict[str, Any]:
    """Sizes and costs of a configuration as JSON types.

    `parameters` and `parts` count numbers; `stages` and `modes` hold costs in FLOPs and bytes per generated token at
    batch 1; `memory` compares weights plus the KV of `batch` rows at `context` with what is free here.
    """
    if batch < 1:
        raise ValueError(f"batch={batch} must be at least 1")
    costs = Costs(config, dtype, context)
    full = costs.full()
    weights = costs.parameters * costs.size
    folded = config.num_stages * costs.head_size * costs.size if config.per_stage_head else 0
    kv = batch * full.kv_bytes
    free = available_memory()
    result: dict[str, Any] = {
        "parameters": costs.parameters,
        "parts": grouped_parts(costs.parts),
        "dtype": dtype,
        "context": costs.context,
        "stages": [cost.as_dict() for cost in costs.stages()],
        "modes": [cost.as_dict() for cost in costs.modes()],
        "memory": {
            "weights": weights,
            "folded_heads": folded,
            "kv": kv,
            "batch": batch,
            "needed": weights + folded + kv,
            "free": free,
            "fits": {place: weights + folded + kv <= size for place, size in free.items()},
        },
    }
    if config.poe_mode != "none":
        result["draft_cost"] = costs.early_costs()
    return result


def grouped_parts(parts: dict[str, int]) -> dict[str, int]:
    """Parts summed over layers and heads: embedding, layers, value_embeddings, heads by name, scalars."""
    grouped: dict[str, int] = {}
    for name, count in parts.items():
        group = {"layer": "layers", "value": "value_embeddings"}.get(name.split("_")[0], name)
        grouped[group] = grouped.get(group, 0) + count
    return grouped


def preset_config(name: str) -> PoEConfig | None:
    """The configuration of a preset or of a shipped recipe's model; None when `name` is neither."""
    if name in PRESETS:
        return PoEConfig.preset(name)
    from stagewise.recipe import load_recipe, recipe_names

    if name not in recipe_names():
        return None
    recipe = load_recipe(name)
    arguments = recipe.model.config_arguments()
    if recipe.specialist is not None:
        frozen = arguments["num_hidden_layers"]
        new = recipe.specialist.new_layers
        arguments |= {"num_hidden_layers": frozen + new, "new_layers": new, "frozen_layers": frozen, "dual_head": True}
    return PoEConfig(**arguments)
