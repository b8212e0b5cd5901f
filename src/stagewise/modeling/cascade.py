"""Names, shapes, parents and deltas of checkpoints: every load goes through here.

Design choices:
- A folder holds either whole weights (`model*.safetensors`) or a delta (`delta.safetensors`) whose config names its
  parent; deltas are assembled on the root base, any depth.
- Folders written by stagewise carry `stagewise_version` and are read strictly. Foreign folders may have unknown config
  keys and a config that disagrees with the tensors: the tensors win, and a warning says so.
- A tensor that is missing, unexpected or of the wrong shape aborts the load, whoever called.
- Tensors stay memory-mapped until they are converted, one at a time.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import logging
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig

from .configuration_poe import PoEConfig

logger = logging.getLogger("stagewise")

_PREFIX = re.compile(r"^(?:(?:_orig_mod|module|model|gpt|_gpt)\.)+")
_BUFFER = re.compile(r"(?:^|\.)(?:cos|sin|inv_freq|rotary_emb\..*|attn_mask|causal_mask)$")
_VOCAB_ROWS = re.compile(r"^(?:transformer\.wte|lm_head.*|value_embeds\.\d+)\.weight$")
_BOOKKEEPING = {
    "architectures", "auto_map", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "use_router", "router_enabled", "_attn_implementation_autoset", "id2label", "label2id", "problem_type",
}  # fmt: skip


@dataclass
class Assembled:
    """A checkpoint as it will be loaded: its configuration and its tensors by reference name."""

    config: PoEConfig
    tensors: dict[str, Tensor]
    folder: Path


def resolve_folder(source, revision: str | None = None, relative_to: Path | None = None, **hub) -> Path:
    """The local folder of a path or hub repository id (its config and safetensors are downloaded)."""
    path = Path(source)
    candidates = [path] if path.is_absolute() or relative_to is None else [relative_to / path, path]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate.resolve()
    looks_local = path.is_absolute() or str(source).startswith(".") or str(source).count("/") != 1
    if looks_local:
        raise FileNotFoundError(f"no model folder at {source}")
    from huggingface_hub import snapshot_download

    known = {k: hub[k] for k in ("token", "cache_dir", "local_files_only", "force_download") if hub.get(k) is not None}
    try:
        return Path(
            snapshot_download(str(source), revision=revision, allow_patterns=["*.json", "*.safetensors"], **known)
        )
    except Exception as error:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(
            f"{source}{at} is neither a local folder nor a repository within reach: {error}"
        ) from error


def read_config_json(folder: Path) -> dict:
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: not a model folder")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    known = {f.name for f in fields(PoEConfig)} | _BOOKKEEPING
    unknown = sorted(set(raw) - known)
    if unknown and "stagewise_version" in raw:
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"{file}: unknown key {unknown[0]!r}{hint}")
    if unknown:
        logger.warning("%s: unknown keys kept: %s", file, ", ".join(unknown))
    return raw


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file under reference names (training wrappers' prefixes stripped)."""
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} cannot be read (cut short or damaged?): {error}") from error
    out = {}
    for name, tensor in tensors.items():
        plain = _PREFIX.sub("", name)
        if _BUFFER.search(plain):
            logger.warning("%s: buffer %s ignored; it is recomputed", file, name)
            continue
        if plain in out:
            raise ValueError(f"{file}: two tensors map to {plain}")
        out[plain] = tensor
    return out


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a whole-weights folder, sharded or not."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}")
        tensors.update(read_tensors(folder / name))
    return tensors


def content_hash(tensors: dict[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes of the tensors: the identity a delta records of its parent."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}\n".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def expected_shapes(config: PoEConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a model of this configuration has."""
    from .modeling_poe import PoEForCausalLM

    with torch.device("meta"):
        return {name: tuple(t.shape) for name, t in PoEForCausalLM(config).state_dict().items()}


def recover_config(raw: dict, tensors: dict[str, Tensor], folder: Path) -> dict:
    """Facts of a foreign folder read off its tensors where its config says something else; each is announced."""
    found: dict[str, Any] = {}
    layers = [int(m.group(1)) for n in tensors if (m := re.match(r"transformer\.h\.(\d+)\.", n))]
    if layers:
        found["num_hidden_layers"] = max(layers) + 1
    first = {n.split("transformer.h.0.")[1]: t for n, t in tensors.items() if n.startswith("transformer.h.0.")}
    wte = tensors.get("transformer.wte.weight")
    if wte is not None:
        found["hidden_size"] = wte.shape[1]
        vocab = raw.get("vocab_size")
        if vocab is None or not vocab <= wte.shape[0] < vocab + 1024:
            found["vocab_size"] = wte.shape[0]
    if "mlp.c_fc.weight" in first:
        found["intermediate_size"] = first["mlp.c_fc.weight"].shape[0]
    if "attn.c_k.weight" in first and raw.get("num_attention_heads"):
        dim = raw.get("head_dim") or first["attn.c_q.weight"].shape[0] // raw["num_attention_heads"]
        found["head_dim"] = dim
        found["num_key_value_heads"] = first["attn.c_k.weight"].shape[0] // dim
    embeds = sorted(int(m.group(1)) for n in tensors if (m := re.match(r"value_embeds\.(\d+)\.", n)))
    total = int(found.get("num_hidden_layers") or raw.get("num_hidden_layers") or 0)
    derived = [i for i in range(total) if (total - 1 - i) % 2 == 0]
    if embeds != (raw.get("value_embed_layers") or derived):
        found["value_embed_layers"] = embeds
    gate = next((t for n, t in tensors.items() if n.endswith("attn.ve_gate.weight")), None)
    if gate is not None and gate.shape[1] != raw.get("ve_gate_channels", 12):
        found["ve_gate_channels"] = gate.shape[1]
    heads = sum(n.startswith("lm_head_stages.") for n in tensors)
    if bool(heads) != bool(raw.get("per_stage_head")):
        found["per_stage_head"] = bool(heads)
        found["poe_head_count"] = None
    smear = tensors.get("smear_gate.weight")
    channels = 0 if smear is None else smear.shape[1]
    if channels != raw.get("smear_channels", 24):
        found["smear_channels"] = channels
    if ("backout_lambda" in tensors) != raw.get("use_backout", True):
        found["use_backout"] = "backout_lambda" in tensors
    out = dict(raw)
    for key, value in found.items():
        if raw.get(key) != value:
            if key in raw and raw[key] is not None:
                logger.warning(
                    "%s: config says %s=%s, the tensors say %s; using the tensors", folder, key, raw[key], value
                )
            out[key] = value
    stages = out.get("poe_stage_layers")
    if heads and stages and len(stages) != heads:
        raise ValueError(f"{folder}: {heads} stage heads but poe_stage_layers={stages} names {len(stages)} stages")
    return out


def _config(raw: dict) -> PoEConfig:
    return PoEConfig(**{k: v for k, v in raw.items() if k not in ("model_type", "dtype", "torch_dtype")})


def assemble(folder: Path, chain: tuple[Path, ...] = (), **hub) -> Assembled:
    """Read a folder and, for a delta, everything below it."""
    if folder in chain:
        names = " -> ".join(str(f) for f in (*chain, folder))
        raise ValueError(f"base_model_name_or_path forms a cycle: {names}")
    raw = read_config_json(folder)
    if (folder / "delta.safetensors").is_file():
        return _assemble_delta(folder, raw, chain, **hub)
    tensors = read_weights(folder)
    if "stagewise_version" not in raw:
        raw = recover_config(raw, tensors, folder)
    return Assembled(_config(raw), tensors, folder)


def _assemble_delta(folder: Path, raw: dict, chain: tuple[Path, ...], **hub) -> Assembled:
    source = raw.get("base_model_name_or_path")
    if not source:
        raise ValueError(f"{folder} holds a delta but its config names no base_model_name_or_path")
    try:
        parent_folder = resolve_folder(source, raw.get("base_model_revision"), relative_to=folder, **hub)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"the parent {source!r} of the specialist {folder} cannot be found: {error}") from error
    parent = assemble(parent_folder, (*chain, folder), **hub)
    delta = read_tensors(folder / "delta.safetensors")
    wanted = raw.get("base_model_hash")
    if wanted is not None and (actual := content_hash(parent.tensors)) != wanted:
        raise ValueError(
            f"the specialist {folder} was trained on a parent with content hash {wanted[:16]}, but {parent_folder} "
            f"has {actual[:16]}; point base_model_name_or_path at the right parent"
        )
    return merge_delta(parent, delta, raw, folder)


def merge_delta(parent: Assembled, delta: dict[str, Tensor], raw: dict, folder: Path) -> Assembled:
    """A specialist's tensors laid over its parent's: appended layers, heads as a list, what changed as an overlay."""
    base = parent.config
    for key in ("hidden_size", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim"):
        if raw.get(key) not in (None, getattr(base, key)):
            raise ValueError(f"{folder} has {key}={raw[key]}, its parent {parent.folder} has {getattr(base, key)}")
    frozen = raw.get("frozen_layers", base.num_hidden_layers)
    if frozen != base.num_hidden_layers:
        raise ValueError(
            f"{folder} was trained on frozen_layers={frozen}, its parent {parent.folder} has "
            f"{base.num_hidden_layers} layers"
        )
    total = raw.get("num_hidden_layers", frozen + (raw.get("new_layers") or 0))
    new = total - frozen
    if new < 1:
        raise ValueError(f"{folder}: num_hidden_layers={total} adds nothing to the parent's {frozen} layers")
    tensors = dict(parent.tensors)
    ancestors = len(base.specialist_layers)
    if ancestors:
        tensors[f"lm_head_ancestors.{ancestors - 1}.weight"] = tensors.pop("lm_head_stage.weight")
    overlay = {n: tensors.pop(n) for n in list(tensors) if n.startswith("overlay.")}
    overlay = {n: t for n, t in overlay.items() if "wte" in n}  # a delta's lambdas are complete: they replace these
    delta = dict(delta)
    if (wte := delta.pop("transformer.wte.weight", None)) is not None:
        overlay = _changed_rows(parent.tensors["transformer.wte.weight"], wte, folder)
    for name in ("overlay.wte_ids", "overlay.wte_rows"):
        if name in delta:
            overlay[name] = delta.pop(name)
    changed = False
    for name in ("resid_lambdas", "x0_lambdas"):
        if name not in delta:
            raise ValueError(f"{folder}: delta.safetensors has no {name}")
        mine, theirs = delta.pop(name), parent.tensors[name]
        if mine.shape != (total,):
            raise ValueError(f"{folder}: {name} has shape {tuple(mine.shape)}, expected ({total},)")
        changed = changed or not torch.equal(mine[:frozen], theirs.to(mine.dtype))
        overlay[f"overlay.{name}"] = mine
        tensors[name] = torch.cat((theirs, mine[frozen:].to(theirs.dtype)))
    if changed:
        logger.warning("%s: its lambdas of frozen layers differ from the base's; each path uses its own", folder)
    else:
        overlay = {n: t for n, t in overlay.items() if "lambdas" not in n}
    if overlay and "overlay.wte_ids" not in overlay:
        overlay["overlay.wte_ids"] = torch.zeros(0, dtype=torch.long)
        overlay["overlay.wte_rows"] = tensors["transformer.wte.weight"][:0]
    allowed = re.compile(r"^(?:transformer\.h\.(\d+)\..*|lm_head_stage\.weight)$")
    for name in delta:
        match = allowed.match(name)
        if not match or (match.group(1) and int(match.group(1)) < frozen):
            raise ValueError(f"{folder}: delta.safetensors holds {name}, which would change the frozen base")
    tensors.update(delta)
    tensors.update(overlay)
    facts = {f.name: getattr(base, f.name) for f in fields(PoEConfig)}
    facts.update(_appended(base, raw, folder, frozen, new))
    facts["overlay_rows"] = overlay["overlay.wte_ids"].numel() if overlay else 0
    facts["overlay_lambdas"] = changed
    return Assembled(_config(facts), tensors, folder)


def _appended(base: PoEConfig, raw: dict, folder: Path, frozen: int, new: int) -> dict:
    """Config fields that a specialist adds to or changes of its parent's; layers below keep their behaviour."""
    probe = PoEConfig(
        **{
            "num_hidden_layers": frozen + new,
            "specialist_layers": [new],
            "window_pattern": raw.get("window_pattern", base.window_pattern),
            "max_position_embeddings": base.max_position_embeddings,
            "recompute_windows": bool(raw.get("recompute_windows")),
        }
    )
    windows = probe.layer_windows if probe.recompute_windows else base.layer_windows + probe.layer_windows[frozen:]
    kept = ("specialist_base_head", "stage_training", "dual_head", "add_bos_token", "base_model_revision",
            "base_model_hash", "stagewise_version", "recompute_windows", "transformers_version")  # fmt: skip
    return {
        **{k: raw[k] for k in kept if k in raw},
        "num_hidden_layers": frozen + new,
        "specialist_layers": [*base.specialist_layers, new],
        "layer_windows": windows,
        "new_layers": new,
        "frozen_layers": frozen,
        "base_model_name_or_path": raw["base_model_name_or_path"] if "base_model_name_or_path" in raw else str(folder),
        "eos_token_id": raw.get("eos_token_id"),
    }


def _changed_rows(base: Tensor, mine: Tensor, folder: Path) -> dict[str, Tensor]:
    if base.shape[1] != mine.shape[1]:
        raise ValueError(
            f"{folder}: transformer.wte.weight has width {mine.shape[1]}, the parent's has {base.shape[1]}"
        )
    rows = min(base.shape[0], mine.shape[0])
    ids = (base[:rows].to(mine.dtype) != mine[:rows]).any(1).nonzero().flatten()
    return {"overlay.wte_ids": ids, "overlay.wte_rows": mine[ids].clone()} if ids.numel() else {}


def fit_tensors(tensors: dict[str, Tensor], config: PoEConfig, where) -> dict[str, Tensor]:
    """Check names and shapes against the configuration; ValueError lists what is missing, unexpected or misshapen.

    Matrices with one row per token may be padded to another multiple: they are cut or zero-padded to ours.
    """
    shapes = expected_shapes(config)
    missing = [f"{n} {shapes[n]}" for n in shapes if n not in tensors]
    unexpected = [f"{n} {tuple(t.shape)}" for n, t in tensors.items() if n not in shapes]
    wrong, out = [], {}
    for name, shape in shapes.items():
        t = tensors.get(name)
        if t is None:
            continue
        if _VOCAB_ROWS.match(name) and t.shape[1:] == shape[1:] and t.shape[0] >= config.vocab_size:
            t = torch.nn.functional.pad(t[: shape[0]], (0, 0, 0, max(0, shape[0] - t.shape[0])))
        if tuple(t.shape) != shape:
            wrong.append(f"{name} {tuple(t.shape)}, expected {shape}")
        out[name] = t
    if missing or unexpected or wrong:
        parts = [(missing, "missing"), (unexpected, "unexpected"), (wrong, "of the wrong shape")]
        lines = [
            f"{len(x)} tensors {word}: {'; '.join(x[:12])}{' ...' if len(x) > 12 else ''}" for x, word in parts if x
        ]
        raise ValueError(f"{where} does not match its configuration. " + " | ".join(lines))
    return out


def as_dtype(dtype) -> torch.dtype | None:
    """A torch dtype from a dtype, its name, or None / "auto" (None: as stored)."""
    if dtype is None or dtype == "auto":
        return None
    found = getattr(torch, str(dtype).removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating point dtype such as float32 or bfloat16")
    return found


def load_model(
    cls,
    source,
    *,
    config: PoEConfig | None = None,
    revision: str | None = None,
    dtype=None,
    torch_dtype=None,
    device=None,
    device_map=None,
    output_loading_info: bool = False,
    **kwargs,
):
    """Load a folder or hub repository into a model in evaluation mode.

    Args:
        source: folder or repository id, whole weights or a delta. revision: branch, tag or commit on the hub.
        config: its conversational fields (anything but shapes) override the folder's.
        dtype: of the weights; as stored when None. device: where they go. device_map: "auto" or a device, as in
            transformers.
    Raises FileNotFoundError and ValueError naming what is missing or does not fit.
    """
    if kwargs.get("quantization_config") is not None:
        raise ValueError("quantization_config is not supported by this model class")
    folder = resolve_folder(source, revision, **kwargs)
    found = assemble(folder, **kwargs)
    final = found.config
    if config is not None:
        final = copy.deepcopy(config)
        for f in fields(PoEConfig):
            if f.name not in ("use_cache", "fp32_attention", "poe_wand_p99_bounds_per_stage_head"):
                setattr(final, f.name, getattr(found.config, f.name))
    for name in [n for n in kwargs if n in {f.name for f in fields(PoEConfig)}]:
        setattr(final, name, kwargs[name])
    tensors = fit_tensors(found.tensors, final, source)
    target = as_dtype(torch_dtype if dtype is None else dtype) or tensors["transformer.wte.weight"].dtype
    place = torch.device(device) if device is not None else None
    if place is None and isinstance(device_map, (str, int, torch.device)) and device_map not in (
        "auto", "balanced", "balanced_low_0", "sequential"
    ):  # fmt: skip
        place, device_map = torch.device(device_map), None
    for name in tensors:
        t = tensors[name]
        tensors[name] = t.to(device=place, dtype=target if t.is_floating_point() else None)
    final.dtype = target
    final.architectures = [cls.__name__]
    final._name_or_path = str(source)
    with torch.device("meta"):
        model = cls(final)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.requires_grad_(True)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval()
    if device_map is not None:
        model = _dispatch(model, device_map)
    info: dict[str, Any] = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(), "error_msgs": []}
    return (model, info) if output_loading_info else model


def _dispatch(model, device_map):
    """Place a model by a device map: one accelerator when it fits there, else as accelerate decides."""
    try:  # guarded: transformers refuses remote code whose plain imports are not installed
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError:
        raise ImportError("device_map needs accelerate: pip install accelerate") from None

    if isinstance(device_map, str):
        device_map = infer_auto_device_map(model, no_split_module_classes=model._no_split_modules)
    places = {str(d) for d in device_map.values()}
    if places == {"disk"} or "disk" in places:
        raise ValueError("device_map would place weights on disk; give more memory or a smaller dtype")
    model.hf_device_map = device_map
    if len(places) == 1:
        return model.to(torch.device(next(iter(device_map.values()))))
    return dispatch_model(model, device_map)


def load(path_or_repo_id, revision: str | None = None, dtype=None, device=None, **kwargs):
    """Load a model: our folders, foreign ones, deltas. See `load_model`."""
    from .modeling_poe import PoEForCausalLM

    return load_model(PoEForCausalLM, path_or_repo_id, revision=revision, dtype=dtype, device=device, **kwargs)
