"""Where recipes lie and how they are read: shipped YAML files, presets, and the words for what is not there."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def recipe_folder() -> Path:
    """Where the shipped recipes lie: inside an installed package, or at the root of a checkout."""
    installed = Path(__file__).parents[1] / "recipes"
    return installed if installed.is_dir() else Path(__file__).parents[3] / "recipes"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def preset_model(name: str) -> dict[str, Any]:
    """The model section of the shipped recipe `name`, its own preset resolved."""
    if name not in recipe_names():
        raise ValueError(f"unknown preset {name!r}{nearest(name, recipe_names())}")
    section = read_yaml(recipe_folder() / f"{name}.yaml")["model"]
    return {**preset_model(section["preset"]), **section} if "preset" in section else section


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, or a ValueError naming it."""
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds no mapping of recipe sections")
    return tree


def nearest(word: str, known: Sequence[str], prefix: str = "") -> str:
    """`; did you mean ...?` for the closest known word, or the known ones, or nothing when there are none."""
    if not known:
        return ""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {prefix + '.' if prefix else ''}{close[0]}?"
    return f"; known: {', '.join(known)}"
