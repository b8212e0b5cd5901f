"""Release folders: what others need to load a model with transformers alone.

- Contents: weights (sharded when large) or a delta, config.json with its auto_map, the modeling files beside it, all
  tokenizer files, generation_config.json. The folder is assembled under a temporary name and renamed when complete.
- Bases stop at bos; specialists at assistant_end and bos.
- Measurements (`eval/`) and the card travel along; training state does not.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from stagewise.hub.checkpoints import read_json, require_model
from stagewise.hub.publish import check_release

KEPT = ("README.md", "LICENSE", "NOTICE", "recipe.yaml", "elastic.json", "calibration.json", "certificate.json")


def export(
    source: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
    parent: str | None = None,
    parent_weights: Path | None = None,
    force: bool = False,
) -> Path:
    """Write the release folder of a model, checkpoint or run to `out` and return it.

    `dtype` converts the weights ("bfloat16"); as stored when None. A specialist's delta folder stays a delta; `parent`
    names the repository or folder it is loaded on from now on. A delta knows its parent's weights by their hash: where
    the parent's export has another dtype, `parent_weights` is that export. Raises `FileExistsError` when `out` is there
    and `force` is not set, `ValueError` when model and tokenizer do not fit.
    """
    folder = require_model(source)
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already: give --force to replace it, or another folder")
    if out.exists() and out.resolve() in (folder.resolve(), *folder.resolve().parents):
        raise ValueError(f"out={out} holds the model that is exported: choose another folder")
    delta = (folder / "delta.safetensors").is_file()
    if not delta and (parent or parent_weights):
        raise ValueError(f"--parent is for delta folders: {folder} holds whole weights")

    def fill(target: Path) -> None:
        if delta:
            _write_delta(folder, target, dtype, parent or _parent_seen_from(out, folder), parent_weights)
        else:
            _write_model(folder, target, dtype, max_shard_size)
        for name in KEPT:
            if (folder / name).is_file():
                shutil.copy2(folder / name, target / name)
        if (folder / "eval").is_dir():
            shutil.copytree(folder / "eval", target / "eval", ignore=shutil.ignore_patterns(".*", "*.tmp"))
        check_release(target)

    from stagewise.training.checkpoint import write_folder

    write_folder(out, fill)
    return out


def _write_model(folder: Path, target: Path, dtype: str | None, max_shard_size: str) -> None:
    from stagewise.modeling.cascade import load
    from stagewise.specialist.delta import copy_modelling_code

    model = load(folder, dtype=dtype)
    _check_vocabulary(_write_tokenizer(folder, target), model.config.vocab_size, folder)
    model.generation_config = generation_defaults(model.config)
    model.save_pretrained(target, max_shard_size=max_shard_size)
    copy_modelling_code(target)


def _write_delta(
    folder: Path, target: Path, dtype: str | None, parent: str | None, parent_weights: Path | None
) -> None:
    from safetensors.torch import load_file, save_file

    from stagewise.modeling.cascade import assemble, content_hash
    from stagewise.specialist.delta import AUTO_MAP, copy_modelling_code

    config = read_json(folder / "config.json")
    tensors = load_file(folder / "delta.safetensors")
    if dtype is not None:
        from stagewise.modeling.cascade import as_dtype

        wanted = as_dtype(dtype)
        tensors = {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()}
        config["dtype"] = str(wanted).removeprefix("torch.")
    save_file(tensors, target / "delta.safetensors", metadata={"format": "pt"})
    config["auto_map"] = AUTO_MAP
    if parent is not None:
        config["base_model_name_or_path"] = parent
    if parent_weights is not None:
        config["base_model_hash"] = content_hash(assemble(parent_weights.resolve()).tensors)
    tokenizer = _write_tokenizer(folder, target)
    if config.get("vocab_size") is not None:
        _check_vocabulary(tokenizer, config["vocab_size"], folder)
    (target / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    bos, *others = tokenizer.chat_stop_ids[::-1]
    defaults = {"bos_token_id": bos, "eos_token_id": [*others, bos], "pad_token_id": bos}
    (target / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n", encoding="utf-8")
    copy_modelling_code(target)


def _parent_seen_from(out: Path, folder: Path) -> str | None:
    """The delta's parent as `out` has to name it: a relative folder is rewritten, anything else stays."""
    parent = read_json(folder / "config.json").get("base_model_name_or_path")
    if parent and not Path(parent).is_absolute() and (folder / parent).is_dir():
        return os.path.relpath((folder / parent).resolve(), out.resolve())
    return parent


def generation_defaults(config: Any) -> Any:
    """A GenerationConfig that stops where the kind of model stops: bos, and assistant_end for specialists."""
    from transformers import GenerationConfig

    bos = config.bos_token_id
    stops = [bos + 4, bos] if config.is_specialist else bos
    return GenerationConfig(bos_token_id=bos, eos_token_id=stops, pad_token_id=bos)


def _write_tokenizer(folder: Path, target: Path) -> Any:
    from stagewise.modeling.tokenization_poe import load_tokenizer

    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(target)
    return tokenizer


def _check_vocabulary(tokenizer: Any, vocabulary: int, folder: Path) -> None:
    if len(tokenizer) != vocabulary:
        raise ValueError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, config.json says vocab_size={vocabulary}; "
            "export a model with the tokenizer it was trained with"
        )
