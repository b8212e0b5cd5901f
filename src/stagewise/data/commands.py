"""Commands of the data room: `stagewise data prepare`."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .prepare import prepare_shards
from .sources import SourceSpec, kind_of_name


def prepare(
    *sources: str,
    out: Path,
    tokenizer: str | None = None,
    workers: int | None = None,
    dedup: Literal["none", "exact", "near"] = "none",
    executor: Literal["local", "datatrove", "slurm", "ray"] = "local",
    executor_option: list[str] | None = None,
    text_key: str = "text",
    skip_bad: bool = False,
    set: list[str] | None = None,  # noqa: A002 (the option is called --set)
) -> None:
    """Tokenise a mixture into memory-mapped shards; run again after an interruption, it continues where it stopped.

    Parameters
    ----------
    sources
        A recipe (its name or YAML file), or files, folders and globs of text, .jsonl and .parquet (also .gz, .zst), or
        the word embedded for the installed Python's own library.
    out
        Folder to write.
    tokenizer
        Folder of the tokenizer; default: the recipe's tokenizer.path.
    workers
        Processes to encode with; default: all cores.
    dedup
        Remove repeated documents: exact (same text up to white space) or near (MinHash, similarity 0.8).
    executor
        Who runs the work: a process pool here, or datatrove on this machine, on Slurm or on Ray.
    executor_option
        KEY=VALUE for datatrove's executor, for example partition=cpu and time=12:00:00 for Slurm.
    text_key
        Column with the text in .jsonl and .parquet files that are named directly.
    skip_bad
        Skip and count records that cannot be read instead of stopping at the first.
    set
        KEY=VALUE changes to the recipe.

    Example: stagewise data prepare "books/*.txt" web.jsonl.zst --tokenizer my-tokenizer --out shards --dedup exact
    """
    specs, recipe_tokenizer = _specs(sources, text_key, set or [])
    path = tokenizer or recipe_tokenizer
    if path is None:
        raise ValueError(
            "shards need a tokenizer: give --tokenizer FOLDER "
            "(make one with: stagewise tokenizer train FILES --out FOLDER)"
        )
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no tokenizer folder {path}")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    report = prepare_shards(
        specs,
        out,
        partial(load_tokenizer_folder, os.path.abspath(path)),
        workers=workers or cores,
        deduplicate=dedup,
        skip_bad=skip_bad,
        executor=executor,
        executor_options=_options(executor_option or []),
    )
    if report is None:
        print(f"the jobs are queued; {out}/manifest.json appears when they are done")
    else:
        print_report(report)
        print(f"written to {out}; use it with: stagewise train RECIPE --set data.shards={out}")


def load_tokenizer_folder(path: str) -> Any:
    """The tokenizer in a folder (what every worker calls)."""
    from stagewise import load_tokenizer

    return load_tokenizer(path)


def _specs(sources: tuple[str, ...], text_key: str, changes: list[str]) -> tuple[list[SourceSpec], str | None]:
    """Sources, and the tokenizer's folder when a recipe names one."""
    if not sources:
        raise ValueError("name a recipe, files to prepare, or embedded")
    first = sources[0]
    is_data = first == "embedded" or kind_of_name(first) is not None or os.path.isdir(first)
    if len(sources) == 1 and not is_data:
        from stagewise.recipe import load_recipe

        recipe = load_recipe(first, changes)
        found = [*recipe.data.sources, *recipe.data.validation_sources]
        if not found:
            raise ValueError(f"recipe {first} has no data sources")
        held_out = {source.name for source in recipe.data.validation_sources}
        specs = [replace(SourceSpec.of(source), validation_only=source.name in held_out) for source in found]
        return specs, recipe.tokenizer.path
    if changes:
        raise ValueError("--set changes a recipe, and none was named")
    specs = []
    for number, source in enumerate(sources):
        name = Path(source).name or source
        if any(spec.name == name for spec in specs):
            name = f"{number}-{name}"
        if source == "embedded":
            specs.append(SourceSpec("embedded", kind="embedded", share=None))
            continue
        kind = kind_of_name(source) or _kind_inside(source)
        specs.append(SourceSpec(name, kind=kind, path=source, text_key=text_key, share=None))
    return specs, None


def _kind_inside(folder: str) -> str:
    """The kind of the files in a folder; FileNotFoundError when there are none, ValueError when there are several."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"{folder}: no such file, folder or recipe, and its name says no kind of data")
    kinds = {kind for path in Path(folder).rglob("*") if path.is_file() and (kind := kind_of_name(path.name))}
    if len(kinds) != 1:
        what = (
            "no text, .jsonl or .parquet files" if not kinds else f"files of several kinds ({', '.join(sorted(kinds))})"
        )
        error = FileNotFoundError if not kinds else ValueError
        raise error(f"{folder} holds {what}; name the files with a glob")
    return kinds.pop()


def _options(pairs: list[str]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--executor-option takes KEY=VALUE, got {pair!r}")
        try:
            options[key] = json.loads(value)
        except ValueError:
            options[key] = value
    return options


def print_report(report: dict) -> None:
    """Documents, tokens and bytes per source against the target shares, as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Prepared sources")
    table.add_column("source")
    columns = ("documents", "tokens", "bytes", "bytes/token", "duplicates", "skipped", "share", "target", "epochs")
    for name in columns:
        table.add_column(name, justify="right")
    for row in [*report["sources"], {"name": "total", **report["total"]}]:
        percent = [f"{row[key]:.1%}" if row.get(key) is not None else "" for key in ("share", "target_share")]
        epochs = row.get("epochs_per_total")
        table.add_row(
            row["name"],
            *(f"{row[key]:,}" for key in ("documents", "tokens", "bytes")),
            f"{row['bytes'] / max(1, row['tokens']):.2f}",
            *(f"{row[key]:,}" for key in ("duplicates", "skipped")),
            *percent,
            f"{epochs:.2f}" if epochs is not None else "",
        )
    console = Console()
    if not console.is_terminal:
        console.width = 140
    console.print(table)
    print("epochs: how often a source comes round while training reads as many tokens as all sources hold")
