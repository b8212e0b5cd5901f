"""A frozen parent with new layers and a zero head on top: what a specialist is before its first step.

Design choices:
- A fresh specialist is a fresh *delta*: the same code lays it over its parent as lays a trained one, so what is trained
  is what is loaded.
- New blocks begin as the identity and the new head at zero: logits equal the parent's path exactly. Only the embedding
  rows of the chat tokens differ, and those are an overlay that no base path reads.
- Everything that trains is named by `trainable_names`; everything else is hashed before and after a run.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stagewise.modeling import PoEConfig, PoEForCausalLM, PoETokenizer, load_tokenizer
from stagewise.modeling.byte_encoding import (
    ASSISTANT_END,
    ASSISTANT_START,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    USER_END,
    USER_START,
)
from stagewise.modeling.cascade import (
    Assembled,
    assemble,
    content_hash,
    expected_shapes,
    fit_tensors,
    merge_delta,
    read_config_json,
    resolve_folder,
)

logger = logging.getLogger("stagewise")

WARM_TEXTS = {  # the row of a chat token starts as the row of this text's first token
    USER_START: "User",
    USER_END: "\n",
    ASSISTANT_START: "Assistant",
    ASSISTANT_END: "\n",
    PYTHON_START: "```",
    PYTHON_END: "```",
    OUTPUT_START: "Output",
    OUTPUT_END: "\n",
}
LAMBDAS = ("resid_lambdas", "x0_lambdas")


@dataclass
class Parent:
    """The model a specialist grows on: where it was named, what it holds, and the hash that identifies it."""

    source: str
    revision: str | None
    found: Assembled
    content_hash: str

    @property
    def config(self) -> PoEConfig:
        return self.found.config

    @property
    def local(self) -> bool:
        return Path(self.source).is_dir()


def open_parent(source: str | Path, revision: str | None = None) -> Parent:
    """Read the parent of a new specialist, base or specialist itself, any depth."""
    found = assemble(resolve_folder(source, revision))
    return Parent(str(source), revision, found, content_hash(found.tensors))


def parent_tokenizer(folder: Path) -> PoETokenizer:
    """The tokenizer of a model folder, or of the nearest parent that has one."""
    seen: set[Path] = set()
    while True:
        try:
            return load_tokenizer(folder)
        except FileNotFoundError:
            seen.add(folder)
            raw = read_config_json(folder)
            source = raw.get("base_model_name_or_path")
            above = resolve_folder(source, raw.get("base_model_revision"), relative_to=folder) if source else folder
            if above in seen:
                raise
            folder = above


def choose_base_head(base: PoEConfig, wanted: str | None) -> str:
    """Where the specialist's path branches off: what fits the parent when `wanted` is None.

    Per-stage heads: the last expert, because the final path of such a base was never trained. A chain keeps what it
    began with. Raises ValueError for a choice that the parent does not have.
    """
    if base.is_specialist:
        if wanted not in (None, base.specialist_base_head):
            raise ValueError(
                f"specialist_base_head={wanted!r}, but the parent is a specialist grown on "
                f"{base.specialist_base_head!r}: a chain keeps one path; leave the field out"
            )
        return base.specialist_base_head
    chosen = wanted or ("last_expert" if base.per_stage_head else "final")
    if base.poe_mode == "none":
        if chosen == "last_expert":
            raise ValueError("specialist_base_head='last_expert' needs a staged base; this one was trained end to end")
        logger.warning(
            "the parent was trained end to end (poe_mode none): the specialist is plain top layers. Its base has no "
            "intermediate experts, so stage, prefix, early-exit and speculative modes are not available"
        )
    elif chosen == "final" and base.per_stage_head:
        logger.warning(
            "specialist_base_head='final' on a base with per-stage heads: its final path was never trained, so the "
            "specialist starts far from the product; 'last_expert' starts from its last expert"
        )
    return chosen


def warm_rows(wte: Tensor, tokenizer: PoETokenizer) -> tuple[Tensor, Tensor]:
    """Embedding rows of the chat tokens (n, D) and their ids (n,): copies of rows of the base, nothing else."""
    ids = [tokenizer.special_ids[name] for name in WARM_TEXTS]
    sources = [tokenizer.encode_ordinary(text)[0] for text in WARM_TEXTS.values()]
    return torch.tensor(ids), wte[torch.tensor(sources)].clone()


def fresh_delta(parent: Assembled, new_layers: int, seed: int, tokenizer: PoETokenizer | None) -> dict[str, Tensor]:
    """Tensors of an untrained specialist: identity blocks, zero head, unit lambdas; warm chat rows with a tokenizer."""
    config, tensors = parent.config, parent.tensors
    generator = torch.Generator().manual_seed(seed)
    bound = math.sqrt(3.0 / config.hidden_size)
    spread = {"attn.c_q": bound, "attn.c_k": bound, "attn.c_v": bound, "mlp.c_fc": 0.4 * bound}
    delta: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + new_layers):
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
            like = tensors[f"transformer.h.0.{name}.weight"]
            weight = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
            if name in spread and not like.is_meta:
                weight.uniform_(-spread[name], spread[name], generator=generator)
            delta[f"transformer.h.{layer}.{name}.weight"] = weight
    head = tensors["lm_head.weight"]
    delta["lm_head_stage.weight"] = torch.zeros(head.shape, dtype=torch.float32, device=head.device)
    for name, value in (("resid_lambdas", 1.0), ("x0_lambdas", 0.0)):
        own = tensors.get(f"overlay.{name}", tensors[name])
        delta[name] = torch.cat((own, own.new_full((new_layers,), value)))
    if tokenizer is not None and not config.is_specialist:
        ids, rows = warm_rows(tensors["transformer.wte.weight"], tokenizer)
        delta["overlay.wte_ids"], delta["overlay.wte_rows"] = ids, rows
    return delta


def lay_over(
    parent: Assembled, delta: dict[str, Tensor], new_layers: int, base_head: str | None, recompute_windows: bool = False
) -> Assembled:
    """Parent and fresh delta as one checkpoint."""
    frozen = parent.config.num_hidden_layers
    raw = {
        "new_layers": new_layers,
        "frozen_layers": frozen,
        "num_hidden_layers": frozen + new_layers,
        "dual_head": True,
        "specialist_base_head": choose_base_head(parent.config, base_head),
        "recompute_windows": recompute_windows,
        "base_model_name_or_path": str(parent.folder),
    }
    return merge_delta(parent, delta, raw, parent.folder)


def build(found: Assembled, dtype: torch.dtype, device: torch.device | str = "cpu") -> PoEForCausalLM:
    """A model of the assembled tensors in `dtype`, of which only the newest specialist's tensors require gradients."""
    tensors = fit_tensors(found.tensors, found.config, found.folder)
    moved = {n: t.to(device, dtype if t.is_floating_point() else None) for n, t in tensors.items()}
    with torch.device("meta"):
        model = PoEForCausalLM(found.config)
    model.load_state_dict(moved, strict=True, assign=True)
    model.config.dtype = dtype
    freeze(model)
    return model.eval()


def grow(
    parent: Parent,
    new_layers: int,
    *,
    tokenizer: PoETokenizer | None = None,
    base_head: str | None = None,
    recompute_windows: bool = False,
    seed: int = 42,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PoEForCausalLM:
    """A trainable specialist on `parent`; its logits equal the parent's own path exactly.

    A tokenizer warms the embedding rows of the chat tokens (skipped when the parent is a specialist, whose rows stay).
    """
    delta = fresh_delta(parent.found, new_layers, seed, tokenizer)
    return build(lay_over(parent.found, delta, new_layers, base_head, recompute_windows), dtype, device)


def grow_on_meta(base: PoEConfig, new_layers: int, base_head: str | None = None) -> PoEForCausalLM:
    """The shapes of a specialist on a base of configuration `base`, without any weights."""
    tensors = {name: torch.empty(shape, device="meta") for name, shape in expected_shapes(base).items()}
    tensors |= {name: torch.zeros(base.num_hidden_layers) for name in LAMBDAS}
    parent = Assembled(base, tensors, Path("."))
    found = lay_over(parent, fresh_delta(parent, new_layers, 0, None), new_layers, base_head)
    with torch.device("meta"):
        model = PoEForCausalLM(found.config)
    freeze(model)
    return model


def frozen_layers(config: PoEConfig) -> int:
    """Layers below the newest specialist's."""
    return config.num_hidden_layers - (config.specialist_layers or [0])[-1]


def trainable_names(model: PoEForCausalLM) -> list[str]:
    """The tensors that a specialist's training changes; of the lambdas only the entries of new layers move."""
    first = frozen_layers(model.config)
    blocks = [
        name
        for name, _ in model.named_parameters()
        if name.startswith("transformer.h.") and int(name.split(".")[2]) >= first
    ]
    return [*blocks, "lm_head_stage.weight", *LAMBDAS]


def freeze(model: PoEForCausalLM) -> None:
    """Let gradients reach exactly the tensors of `trainable_names`."""
    names = set(trainable_names(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def frozen_hash(model: PoEForCausalLM) -> str:
    """Content hash of everything that a specialist's training must leave as it is."""
    names, first = set(trainable_names(model)), frozen_layers(model.config)
    state: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if name.removeprefix("overlay.") in LAMBDAS:
            state[name] = tensor[:first]
        elif name not in names:
            state[name] = tensor
    return content_hash(state)


@torch.no_grad()
def refresh_overlay(model: PoEForCausalLM) -> None:
    """Where the specialist's path reads its lambdas from an overlay, show it the trained entries."""
    if model.config.overlay_lambdas:
        first = frozen_layers(model.config)
        for name in LAMBDAS:
            getattr(model.overlay, name)[first:] = getattr(model, name)[first:]
