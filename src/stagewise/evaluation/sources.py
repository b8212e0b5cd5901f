"""Which text a model is measured on: the validation split of its own run, the embedded corpus's, or files.

Design choices:
- A model inside a run folder is measured on the documents its recipe held out, by default.
- The embedded corpus is never read whole: only its validation documents, in an order drawn from the seed, so that the
  first N tokens are a sample of it all.
- Files are read whole and in order: whoever names a file says that the model has not seen it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stagewise.data.sources import SourceSpec, kind_of_name, read_source
from stagewise.data.splitting import derived_seed, key_hash, uniform, validation_masks

SEED, VALIDATION_FRACTION = 42, 0.02  # a recipe's defaults


@dataclass
class Texts:
    """Documents to measure on, and the name a report gives them."""

    name: str
    documents: Iterator[str]


def run_recipe(model: str | Path) -> Any | None:
    """The recipe of the run a model folder lies in (RUN/model, RUN/checkpoints/step-N, or RUN itself), or None."""
    from stagewise.recipe import load_recipe

    folder = Path(model)
    if not folder.is_dir():
        return None
    folder = folder.resolve()
    for place in (folder, folder.parent, folder.parent.parent):
        if (place / "recipe.yaml").is_file():
            return load_recipe(place / "recipe.yaml")
    return None


def held_out(specs: Sequence[SourceSpec], seed: int, fraction: float) -> Iterator[str]:
    """Validation documents of the sources: those a training run with this seed and fraction leaves out."""
    found: list[tuple[int, str]] = []
    for spec in specs:
        if spec.train_only:
            continue
        documents = list(read_source(spec))
        keys = np.array([key_hash(document.key) for document in documents], dtype=np.uint64)
        (mask,) = validation_masks([keys], seed, fraction)
        found += [(int(keys[i]), documents[i].text) for i in np.flatnonzero(mask)]
    if not found:
        raise ValueError(f"no documents are held out at validation_fraction={fraction}: name files with --data")
    order = np.argsort(uniform(np.array([key for key, _ in found], dtype=np.uint64), derived_seed(seed, "evaluate")))
    return iter([found[i][1] for i in order])


def evaluation_texts(data: Sequence[str] | None, model: str | Path | None = None) -> Texts:
    """The text named by `data`: "embedded", or files and globs of text, .jsonl or .parquet.

    Without `data`: the validation split of the run that `model` lies in, else of the embedded corpus. Raises
    `FileNotFoundError` for a file that is not there, `ValueError` when nothing is held out.
    """
    recipe = run_recipe(model) if model is not None else None
    seed = recipe.seed if recipe else SEED
    fraction = recipe.data.validation_fraction if recipe else VALIDATION_FRACTION
    if not data and recipe and recipe.data.sources:
        if getattr(recipe.data, "validation_sources", None):
            sets = [SourceSpec.of(source) for source in recipe.data.validation_sources]
            return Texts(f"{recipe.name}: validation sets", (d.text for spec in sets for d in read_source(spec)))
        specs = [SourceSpec.of(source) for source in recipe.data.sources]
        return Texts(f"{recipe.name}: held-out documents", held_out(specs, seed, fraction))
    if not data or list(data) == ["embedded"]:
        return Texts("embedded: held-out documents", held_out([SourceSpec("embedded", "embedded")], seed, fraction))
    if "embedded" in data:
        raise ValueError("--data takes the word embedded alone, or files")
    specs = [SourceSpec(Path(name).name, kind_of_name(name) or "text", name) for name in data]
    return Texts(", ".join(spec.name for spec in specs), (d.text for spec in specs for d in read_source(spec)))
