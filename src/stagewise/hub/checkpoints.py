"""Where models lie on disk: a model folder, a run with its checkpoints, or a folder of checkpoints.

- A model folder has a `config.json`; a checkpoint is a model folder named `step-N`, with or without leading zeros.
- A run keeps checkpoints in `checkpoints/` and its finished model in `model/`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

STEP = re.compile(r"step-0*(\d+)")


def step_of(name: str) -> int | None:
    """The step of a checkpoint's name, `step-000100` -> 100; None for any other name."""
    found = STEP.fullmatch(name)
    return int(found.group(1)) if found else None


def is_model(folder: Path) -> bool:
    """Whether the folder holds a model: a config.json beside weights or a delta."""
    return (folder / "config.json").is_file()


def list_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every checkpoint of a run, or of a folder of checkpoints, by step."""
    places = [folder, folder / "checkpoints"]
    found = {step: path for place in places if place.is_dir() for step, path in _steps(place)}
    return sorted(found.items())


def _steps(place: Path) -> list[tuple[int, Path]]:
    pairs = [(step_of(path.name), path) for path in place.iterdir() if is_model(path)]
    return [(step, path) for step, path in pairs if step is not None]


def model_folder(folder: Path) -> Path | None:
    """The model a folder stands for: itself, a run's `model/`, or its newest checkpoint; None when there is none."""
    for candidate in (folder, folder / "model"):
        if is_model(candidate):
            return candidate
    checkpoints = list_checkpoints(folder) if folder.is_dir() else []
    return checkpoints[-1][1] if checkpoints else None


def require_model(folder: Path) -> Path:
    """`model_folder`, with an error that says what was looked for."""
    if not folder.exists():
        raise FileNotFoundError(f"{folder} does not exist: give a model folder or a run folder")
    found = model_folder(folder)
    if found is None:
        raise FileNotFoundError(f"{folder} holds no model: no config.json in it, its model/ or its checkpoints/step-*/")
    return found


def read_json(path: Path) -> Any:
    """The content of a JSON file; damage is a `ValueError` that names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
