"""One run's checkpoints measured alike: the tables a card prints by step, as JSON, CSV and charts.

- A checkpoint is evaluated and calibrated by the same functions as `stagewise evaluate` and `stagewise calibrate`.
- Each result is a file of its own under OUT/steps, so a stopped run goes on where it was; results made with another
  setting are never mixed in.
- Checkpoints are folders, or the `step-N` branches of a repository, fetched one at a time.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stagewise.hub.checkpoints import list_checkpoints, read_json, step_of
from stagewise.hub.measurements import finite
from stagewise.report.trajectory_page import TABLES, render_trajectory, table_rows

Checkpoint = tuple[int, Callable[[], Path]]  # step, and how to get its folder
HUB_FILES = ["*.json", "*.safetensors", "tokenizer.pkl", "token_bytes.pt"]


@dataclass(frozen=True)
class Setting:
    """What every checkpoint is measured with; equal for all rows of one table."""

    data: list[str] | None
    tokens: int
    seed: int
    cap: float  # regressions allowed in the routing probe
    draft_length: int
    prompts: int
    new_tokens: int
    allow_fewer_tokens: bool


def find_checkpoints(source: str) -> list[Checkpoint]:
    """(step, fetch) of every checkpoint of a run, of a folder of `step-*`, or of a repository's `step-*` branches.

    Raises `FileNotFoundError` when there are none.
    """
    folder = Path(source)
    if folder.is_dir():
        found: list[Checkpoint] = [(step, partial(Path, path)) for step, path in list_checkpoints(folder)]
        if not found:
            raise FileNotFoundError(f"{source} holds no checkpoints: no step-*/config.json in it or its checkpoints/")
        return found
    if source.count("/") != 1 or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{source} does not exist: give a run folder, a folder of step-*/, or owner/name")
    from huggingface_hub import HfApi, snapshot_download

    branches = {ref.name: step_of(ref.name) for ref in HfApi().list_repo_refs(source).branches}
    steps = sorted((step, name) for name, step in branches.items() if step is not None)
    if not steps:
        raise FileNotFoundError(f"{source} has no branches named step-N (it has: {', '.join(sorted(branches))})")

    def fetch(name: str) -> Path:
        return Path(snapshot_download(source, revision=name, allow_patterns=HUB_FILES))

    return [(step, partial(fetch, name)) for step, name in steps]


def choose(checkpoints: list[Checkpoint], steps: Sequence[int] | None, every: int) -> list[Checkpoint]:
    """The checkpoints asked for: some steps, or every n-th and the last. `ValueError` for a step that is not there."""
    if every < 1:
        raise ValueError(f"every={every} must be at least 1")
    if steps:
        have = {step for step, _ in checkpoints}
        missing = sorted(set(steps) - have)
        if missing:
            raise ValueError(f"no checkpoint of step {missing[0]}; there are {', '.join(map(str, sorted(have)))}")
        return [c for c in checkpoints if c[0] in set(steps)]
    last = len(checkpoints) - 1
    return [c for i, c in enumerate(checkpoints) if i % every == 0 or i == last]


def measure_checkpoint(step: int, folder: Path, setting: Setting) -> dict[str, Any]:
    """Evaluation and, for a model with experts, calibration of one checkpoint, as JSON types."""
    from stagewise.calibration.suite import calibrate_model
    from stagewise.evaluation.suite import evaluate_models

    evaluation = evaluate_models([str(folder)], setting.data, setting.tokens, seed=setting.seed)
    result: dict[str, Any] = {"step": step, "setting": asdict(setting), "evaluation": evaluation}
    if len(evaluation["models"][0].get("stage_bpb") or []) > 1:
        result["calibration"] = calibrate_model(
            str(folder),
            setting.data,
            setting.tokens,
            allow_fewer_tokens=setting.allow_fewer_tokens,
            caps=[setting.cap],
            draft_lengths=[setting.draft_length],
            prompts=setting.prompts,
            new_tokens=setting.new_tokens,
            seed=setting.seed,
        )
    return result


def summarise(result: dict[str, Any]) -> dict[str, Any]:
    """One row of the trajectory: the figures of `measure_checkpoint` by the names of the tables' columns."""
    figures = result["evaluation"]["models"][0]
    row: dict[str, Any] = {"step": result["step"]}
    names = ("product_bpb", "mean_stage_bpb", "entropy_weighted_bpb", "final_path_bpb", "crossover_gap")
    row |= {name: figures[name] for name in (*names, "product_accuracy", "final_path_accuracy") if name in figures}
    for name in ("stage_bpb", "prefix_bpb", "stage_accuracy"):
        row |= {f"{name}_{k}": value for k, value in enumerate(figures.get(name) or [])}
    calibration = result.get("calibration") or {}
    row |= {f"bound_{k}_{k + 1}": bound for k, bound in enumerate(calibration.get("p99_bounds") or [])}
    exits = min(calibration.get("exits") or [], key=lambda part: abs(part["safety"] - 1.0), default=None)
    if exits:
        row |= {f"exit_share_{k}": share for k, share in enumerate(exits["exit_shares"])}
        row["wand_disagreement"] = exits["disagreement"]
    for part in (calibration.get("speculation") or {}).get("rows") or []:
        row[f"acceptance_{part['draft_stage']}"] = part["acceptance"]
    for part in calibration.get("routing") or []:
        row[f"routed_share_{part['rate_over']}"] = part["routed_share"]
        row[f"projected_speedup_{part['rate_over']}"] = part["projected_speedup"]
    return {key: value for key, value in row.items() if finite(value)}


def trajectory(
    source: str,
    *,
    out: Path | None = None,
    steps: Sequence[int] | None = None,
    every: int = 1,
    data: list[str] | None = None,
    tokens: int = 131_072,
    seed: int = 0,
    cap: float = 0.020,
    draft_length: int = 4,
    prompts: int = 64,
    new_tokens: int = 60,
    allow_fewer_tokens: bool = False,
    force: bool = False,
    measure: Callable[[int, Path, Setting], dict[str, Any]] = measure_checkpoint,
) -> Path:
    """Measure a run's checkpoints and write OUT: trajectory.json, trajectory.html, a CSV and an SVG per table.

    OUT is `trajectory` in a local source, else `trajectory-NAME`. Checkpoints that OUT/steps already holds with the
    same setting are not measured again; with another setting they are a `ValueError`, or measured anew with `force`.
    """
    checkpoints = choose(find_checkpoints(source), steps, every)
    local = Path(source).is_dir()
    folder = out or (Path(source) / "trajectory" if local else Path(f"trajectory-{source.rpartition('/')[2]}"))
    setting = Setting(data, tokens, seed, cap, draft_length, prompts, new_tokens, allow_fewer_tokens)
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    results = []
    for step, result in _results(checkpoints, folder / "steps", setting, force, measure):
        results.append((step, result))
        write_tables(folder, source, setting, [summarise(result) for _, result in sorted(results)])
    return folder


def _results(
    checkpoints: list[Checkpoint],
    folder: Path,
    setting: Setting,
    force: bool,
    measure: Callable[[int, Path, Setting], dict[str, Any]],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Results of all checkpoints, those already there first, so that a clash of settings shows before work is done."""
    todo = []
    for step, fetch in checkpoints:
        path = folder / f"step-{step:06d}.json"
        if force or not path.is_file():
            todo.append((step, fetch, path))
            continue
        result = read_json(path)
        if result.get("setting") != asdict(setting):
            theirs, ours = result.get("setting") or {}, asdict(setting)
            names = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
            raise ValueError(
                f"{path} was measured with another setting ({', '.join(names)}): use the same one, another --out, or "
                "--force to measure again"
            )
        yield step, result
    for step, fetch, path in todo:
        result = measure(step, fetch(), setting)
        _write(path, _json_text(result))
        yield step, result


def write_tables(folder: Path, source: str, setting: Setting, rows: list[dict[str, Any]]) -> None:
    """Write the tables as far as they go: trajectory.json, trajectory.html, NAME.csv and NAME.svg per table."""
    from stagewise.report.plots import standalone

    charts: dict[str, str] = {}
    for name, table in TABLES.items():
        columns, cells = table_rows(table, rows)
        if not cells:
            continue
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(cells)
        _write(folder / f"{name}.csv", buffer.getvalue())
        charts[name] = table.chart(rows)
        if charts[name]:
            _write(folder / f"{name}.svg", standalone(charts[name]))
    document = {"kind": "trajectory", "source": source, "setting": asdict(setting), "rows": rows}
    _write(folder / "trajectory.json", _json_text(document))
    _write(folder / "trajectory.html", render_trajectory(source, asdict(setting), rows, charts))


def _json_text(value: Any) -> str:
    import json

    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
