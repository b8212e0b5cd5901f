"""Checkpoints that are either whole or absent: a model folder plus the state of the run.

Design choices
- A checkpoint is written under a hidden temporary name, synced to disk and renamed; it is deleted the same way round. A
  process killed at any moment leaves the previous checkpoints, and nothing that looks like a checkpoint but is not.
- Run state is safetensors plus JSON: no pickles; optimizer state is gathered, so the number of ranks is free.
- `RUN/checkpoints/step-000100/` is a complete model folder; its `training_state/` holds the rest.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

STATE_FOLDER = "training_state"
PREFIX = "step-"


@dataclass
class RunState:
    """What resuming needs besides the weights: position, history and the optimizer's tensors by name."""

    step: int
    optimizer: dict[str, Tensor]
    data: dict[str, Any]
    recipe: dict[str, Any]
    tokens: int = 0  # targets trained on so far
    best: dict[str, Any] = field(default_factory=dict)  # {"step", "bpb"} of the best validated checkpoint
    elapsed: float = 0.0  # seconds of training so far
    guard: dict[str, Any] = field(default_factory=dict)  # the loss guard's memory


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint after `step` steps."""
    return f"{PREFIX}{step:06d}"


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Make folder `target` from what `fill(folder)` writes: atomically, synced to disk, replacing an older one.

    Raises OSError naming `target` when the disk is full; whatever was there before stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.writing-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        fill(temporary)
        for path in [*temporary.rglob("*"), temporary]:
            _sync(path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
            raise OSError(
                errno.ENOSPC,
                f"no space left for {target}: free some and go on with --resume; older checkpoints are whole",
            ) from None
        raise
    outdated = target.with_name(f".{target.name}.removing-{os.getpid()}")
    if target.exists():
        os.replace(target, outdated)
    os.replace(temporary, target)
    shutil.rmtree(outdated, ignore_errors=True)
    _sync(target.parent)
    return target


def remove_folder(folder: Path) -> None:
    """Delete a folder so that it is never seen half deleted: renamed away first."""
    doomed = folder.with_name(f".{folder.name}.removing-{os.getpid()}")
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def save_checkpoint(run: Path, state: RunState, save_model: Callable[[Path], None]) -> Path:
    """Write the checkpoint of `state.step`; `save_model(folder)` writes weights, configuration and tokenizer."""

    def fill(folder: Path) -> None:
        save_model(folder)
        inner = folder / STATE_FOLDER
        inner.mkdir()
        tensors = {f"optimizer/{name}": tensor.detach().cpu().contiguous() for name, tensor in state.optimizer.items()}
        tensors["rng/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["rng/cuda"] = torch.cuda.get_rng_state()
        save_file(tensors, inner / "tensors.safetensors")
        facts = {key: value for key, value in asdict(_without_tensors(state)).items() if key != "optimizer"}
        (inner / "state.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    return write_folder(run / "checkpoints" / checkpoint_name(state.step), fill)


def _without_tensors(state: RunState) -> RunState:
    return RunState(**{**vars(state), "optimizer": {}})


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    folders = (run / "checkpoints").glob(f"{PREFIX}*")
    return sorted((f for f in folders if (f / STATE_FOLDER / "state.json").is_file()), key=step_of)


def step_of(folder: Path) -> int:
    """Steps taken when the checkpoint in `folder` was written."""
    return int(folder.name.removeprefix(PREFIX))


def read_state(folder: Path) -> RunState:
    """The run state in a checkpoint folder; ValueError when a file is missing, cut short or damaged."""
    inner = folder / STATE_FOLDER
    try:
        facts = json.loads((inner / "state.json").read_text(encoding="utf-8"))
        tensors = load_file(inner / "tensors.safetensors")
        state = RunState(optimizer={}, **facts)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged ({error}): delete it to resume from the one before") from None
    state.optimizer = {
        name.removeprefix("optimizer/"): tensor for name, tensor in tensors.items() if name.startswith("optimizer/")
    }
    torch.set_rng_state(tensors["rng/cpu"])
    if "rng/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return state


def prune(run: Path, keep_last: int, best_step: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and the one of `best_step`; leftovers of killed writes too."""
    for folder in checkpoints(run)[:-keep_last]:
        if step_of(folder) != best_step:
            remove_folder(folder)
    for leftover in (run / "checkpoints").glob(f".{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


# Settings that change what is written or shown, never what is learnt: a resumed run may change them.
HARMLESS = frozenset(
    f"training.{name}"
    for name in ("log_every", "checkpoint_every", "keep_last", "keep_best", "tensorboard", "tracker", "eval_every")
) | {"description", "name"}


def changed_keys(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two recipes and matter to the result, sorted."""
    found: list[str] = []
    for key in before.keys() | after.keys():
        name = f"{prefix}{key}"
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_keys(old, new, f"{name}.")
        elif old != new and name not in HARMLESS:
            found.append(name)
    return sorted(found)
