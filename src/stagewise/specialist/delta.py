"""A specialist on disk: `delta.safetensors` beside a config that names its parent; converting and flattening.

Design choices:
- A delta holds the new layers, their head and the lambdas; of `wte` only the rows that changed. `reference_layout`
  writes the whole table instead, tensor for tensor what the released deltas hold (stage-chat card).
- The config is that of the whole model, so any loader knows the shapes; the parent is named by a path relative to the
  folder when it is local, and identified by its content hash.
- A delta folder is complete: tokenizer, generation defaults and the modelling code travel with it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

import stagewise.modeling
from stagewise.modeling import PoEForCausalLM, PoETokenizer
from stagewise.modeling.cascade import Assembled, as_dtype, assemble, merge_delta, resolve_folder
from stagewise.modeling.heads import fold_heads
from stagewise.modeling.modeling_poe import FORMAT_VERSION
from stagewise.specialist.growth import LAMBDAS, Parent, build, frozen_layers, open_parent, parent_tokenizer
from stagewise.training.checkpoint import write_folder

AUTO_MAP = {
    "AutoConfig": "configuration_poe.PoEConfig",
    "AutoModelForCausalLM": "modeling_poe.PoEForCausalLM",
}
_PREFIX = re.compile(r"^(?:(?:_orig_mod|module|model|gpt|_gpt)\.)+")
_DELTA_NAME = re.compile(r"^(?:transformer\.h\.(\d+)\..+\.weight|lm_head_stage\.weight|transformer\.wte\.weight)$")


def delta_tensors(model: PoEForCausalLM, reference_layout: bool = False) -> dict[str, Tensor]:
    """What distinguishes a specialist from its parent, by reference names.

    Tensors: 6 per new layer, `lm_head_stage`, the complete lambdas, and the changed embedding rows (`overlay.wte_ids`
    (n,) and `overlay.wte_rows` (n, D)) or, in the reference layout, all of `transformer.wte.weight`.
    """
    state, first = model.state_dict(), frozen_layers(model.config)
    out = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith("transformer.h.") and int(name.split(".")[2]) >= first
    }
    out["lm_head_stage.weight"] = state["lm_head_stage.weight"]
    for name in LAMBDAS:
        own = state[f"overlay.{name}"] if model.config.overlay_lambdas else state[name]
        out[name] = torch.cat((own[:first], state[name][first:].to(own.dtype)))
    if reference_layout:
        wte = state["transformer.wte.weight"].clone()
        if model.config.overlay_rows:
            wte[state["overlay.wte_ids"]] = state["overlay.wte_rows"].to(wte.dtype)
        out["transformer.wte.weight"] = wte
    elif model.config.overlay_rows and len(model.config.specialist_layers or ()) == 1:  # a chain inherits its rows
        out["overlay.wte_ids"], out["overlay.wte_rows"] = state["overlay.wte_ids"], state["overlay.wte_rows"]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in out.items()}


def delta_config(model: PoEForCausalLM, parent: Parent, folder: Path, stage_training: Mapping[str, Any] | None) -> dict:
    """config.json of a delta that will lie in `folder`."""
    own = {f.name for f in fields(type(model.config))} | {"model_type", "transformers_version"}
    config = {key: value for key, value in model.config.to_dict().items() if key in own}
    config |= {
        "architectures": [type(model).__name__],
        "auto_map": AUTO_MAP,
        "base_model_name_or_path": parent_name(parent, folder),
        "base_model_revision": parent.revision,
        "base_model_hash": parent.content_hash,
        "dual_head": True,
        "stagewise_version": FORMAT_VERSION,
        "stage_training": dict(stage_training) if stage_training else None,
    }
    return {key: value for key, value in config.items() if value is not None}


def parent_name(parent: Parent, folder: Path) -> str:
    """How a delta in `folder` names its parent: a relative path when local, else the repository."""
    if not parent.local:
        return parent.source
    return os.path.relpath(parent.found.folder.resolve(), folder.resolve())


def fill_delta_folder(
    folder: Path,
    model: PoEForCausalLM,
    tokenizer: PoETokenizer | None,
    parent: Parent,
    *,
    stage_training: Mapping[str, Any] | None = None,
    reference_layout: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a specialist's files into an existing folder: delta, config, tokenizer, generation defaults, code."""
    tensors = delta_tensors(model, reference_layout)
    if dtype is not None:
        tensors = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    save_file(tensors, folder / "delta.safetensors", metadata={"format": "pt"})
    config = delta_config(model, parent, folder, stage_training)
    config["dtype"] = str(tensors["lm_head_stage.weight"].dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)
    bos = model.config.vocab_size - 9
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": [bos + 4, bos], "pad_token_id": bos},
    )
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    copy_modelling_code(folder)


def copy_modelling_code(folder: Path) -> None:
    """Put the files that let transformers load the folder without this package beside the weights."""
    for path in Path(str(stagewise.modeling.__file__)).parent.glob("*.py"):
        if path.name != "__init__.py":
            shutil.copyfile(path, folder / path.name)


def write_delta(folder: Path, *arguments: Any, **options: Any) -> Path:
    """`fill_delta_folder` as one step: the folder appears complete or not at all."""
    return write_folder(folder, lambda temporary: fill_delta_folder(temporary, *arguments, **options))


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_stage_checkpoint(file: Path) -> dict[str, Tensor]:
    """Tensors of a stage checkpoint saved by torch (nanochat's layout, nested or flat), by reference names.

    Only weights are read: a pickle that holds anything else is refused. Raises ValueError naming the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no stage checkpoint at {file}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{file} is no checkpoint of plain tensors (weights-only load failed: {reason})") from None
    found: dict[str, Tensor] = {}

    def collect(value: Any, name: str) -> None:
        if isinstance(value, Tensor):
            plain = _PREFIX.sub("", name)
            if plain in found:
                raise ValueError(f"{file}: two tensors map to {plain}")
            found[plain] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                inner = isinstance(item, Mapping)
                collect(item, "" if inner else str(key))

    collect(content, "")
    if not found:
        raise ValueError(f"{file} holds no tensors")
    return found


def convert(
    file: Path,
    parent_source: str,
    out: Path,
    *,
    revision: str | None = None,
    base_head: str = "final",
    recompute_windows: bool = True,
    reference_layout: bool = False,
    dtype: str | None = None,
) -> Path:
    """A stage checkpoint (`.pt`) as a delta folder on `parent_source`.

    A checkpoint of the whole model is accepted when its frozen tensors equal the parent's. Lambdas of frozen layers
    and embedding rows that differ from the parent's are kept as the specialist's own. Raises ValueError for tensors
    that would change the frozen base or that nothing is known about.
    """
    parent = open_parent(parent_source, revision)
    delta = _only_new(read_stage_checkpoint(file), parent.found, file)
    layers = [int(match[1]) for name in delta if (match := _DELTA_NAME.match(name)) and match[1]]
    frozen = parent.config.num_hidden_layers
    raw = {
        "num_hidden_layers": max(layers, default=frozen - 1) + 1,
        "frozen_layers": frozen,
        "new_layers": max(layers, default=frozen - 1) + 1 - frozen,
        "dual_head": True,
        "specialist_base_head": parent.config.specialist_base_head if parent.config.is_specialist else base_head,
        "recompute_windows": recompute_windows,
        "base_model_name_or_path": parent.source,
    }
    found = merge_delta(parent.found, delta, raw, file)
    wanted = as_dtype(dtype) or delta["lm_head_stage.weight"].dtype
    model = build(found, wanted)
    facts = {"converted_from": file.name}
    tokenizer = parent_tokenizer(parent.found.folder)
    return write_delta(out, model, tokenizer, parent, stage_training=facts, reference_layout=reference_layout)


def _only_new(tensors: dict[str, Tensor], parent: Assembled, file: Path) -> dict[str, Tensor]:
    frozen, vocab = parent.config.num_hidden_layers, parent.config.vocab_size
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        match = _DELTA_NAME.match(name)
        layer = int(match[1]) if match and match[1] else None
        if name in LAMBDAS or (match and (layer is None or layer >= frozen)):
            out[name] = tensor
        elif name in parent.tensors:
            theirs = parent.tensors[name]
            rows = vocab if theirs.shape[0] >= vocab and tensor.shape[0] >= vocab else None
            if not torch.equal(tensor[:rows].to(theirs.dtype), theirs[:rows]):
                raise ValueError(f"{file}: {name} differs from the parent's: the checkpoint is of another base")
        elif tensor.dim() >= 2 and tensor.is_floating_point():
            raise ValueError(f"{file}: tensor {name} {tuple(tensor.shape)} is neither the stage's nor the parent's")
    missing = [name for name in ("lm_head_stage.weight", *LAMBDAS) if name not in out]
    if missing:
        raise ValueError(f"{file}: no {', '.join(missing)}; not a stage checkpoint")
    return out


def flatten(source: str | Path, *, revision: str | None = None, single_path: bool = False) -> Assembled:
    """A specialist and all its parents as one checkpoint with whole weights and no parent.

    Default: nothing is lost, base experts included. `single_path`: only the specialist's path remains, as a plain
    end-to-end model: heads added up into `lm_head` (fp32 sum, one rounding), changed rows written into `wte`.
    """
    found = assemble(resolve_folder(source, revision))
    if not found.config.is_specialist:
        raise ValueError(f"{source} is no specialist: there is nothing to fold")
    config, tensors = found.config, dict(found.tensors)
    changes: dict[str, Any] = {
        "base_model_name_or_path": None,
        "base_model_revision": None,
        "base_model_hash": None,
        "frozen_layers": None,
        "new_layers": None,
    }
    if single_path:
        tensors, more = _single_path(config, tensors)
        changes |= more
    settings = {**config.to_dict(), **changes}
    for key in ("architectures", "auto_map", "dtype", "model_type", "transformers_version", "_name_or_path"):
        settings.pop(key, None)
    return Assembled(type(config)(**settings), tensors, found.folder)


def _single_path(config: Any, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    heads = ["lm_head.weight"]
    if config.specialist_base_head == "last_expert" and config.per_stage_head:
        heads.append(f"lm_head_stages.{config.num_stages - 1}.weight")
    heads += [f"lm_head_ancestors.{j}.weight" for j in range(len(config.specialist_layers) - 1)]
    heads.append("lm_head_stage.weight")
    rows = min(tensors[name].shape[0] for name in heads)
    out = {n: t for n, t in tensors.items() if not n.startswith(("lm_head", "overlay."))}
    out["lm_head.weight"] = fold_heads([tensors[name][:rows] for name in heads])
    if config.overlay_rows:
        wte = out["transformer.wte.weight"].clone()
        wte[tensors["overlay.wte_ids"]] = tensors["overlay.wte_rows"].to(wte.dtype)
        out["transformer.wte.weight"] = wte
    if config.overlay_lambdas:
        out |= {name: tensors[f"overlay.{name}"] for name in LAMBDAS}
    backout = config.use_backout and config.specialist_base_head == "final"
    if not backout:
        out.pop("backout_lambda", None)
    return out, {
        "poe_mode": "none",
        "per_stage_head": False,
        "poe_head_count": None,
        "poe_every": None,
        "poe_stage_layers": [config.num_hidden_layers],
        "base_layers": config.num_hidden_layers,
        "specialist_layers": [],
        "use_backout": backout,
        "overlay_rows": 0,
        "overlay_lambdas": False,
        "dual_head": False,
        "poe_wand_p99_bounds_per_stage_head": None,
    }


def fold_to_folder(
    source: str | Path, out: Path, *, revision: str | None = None, single_path: bool = False, dtype: str | None = None
) -> Path:
    """`flatten`, written as a whole-weights model folder that needs no parent."""
    found = flatten(source, revision=revision, single_path=single_path)
    model = build_whole(found, as_dtype(dtype))
    tokenizer = parent_tokenizer(resolve_folder(source, revision))

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return write_folder(out, fill)


def build_whole(found: Assembled, dtype: torch.dtype | None = None) -> PoEForCausalLM:
    """A model of assembled tensors, nothing frozen."""
    from stagewise.modeling.cascade import fit_tensors

    tensors = fit_tensors(found.tensors, found.config, found.folder)
    wanted = dtype or tensors["transformer.wte.weight"].dtype
    moved = {n: t.to(wanted if t.is_floating_point() else None) for n, t in tensors.items()}
    with torch.device("meta"):
        model = PoEForCausalLM(found.config)
    model.load_state_dict(moved, strict=True, assign=True)
    model.config.dtype = wanted
    bos = found.config.vocab_size - 9
    stops = [bos + 4, bos]
    model.generation_config.update(bos_token_id=bos, eos_token_id=stops, pad_token_id=bos)
    return model.requires_grad_(True).eval()
