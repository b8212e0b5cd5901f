"""Collecting a report's content from the files of a run folder or a model folder.

A fresh run without evaluation is shown with the last validation of its training; nothing is filled in that no file
says.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stagewise.hub.checkpoints import model_folder, read_json, step_of
from stagewise.hub.measurements import count_parameters, duration, is_figures, read_measurements, read_recipe, run_of
from stagewise.report.content import Content, Curves, finite, read_jsonl


def gather(folder: Path) -> Content:
    """Everything measured in a run folder (with metrics.jsonl) or a model folder (with eval/*.json).

    Raises `FileNotFoundError` when there is neither, `ValueError` for a damaged file.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a run folder or a model folder")
    run = folder if (folder / "metrics.jsonl").is_file() else run_of(folder)
    model = model_folder(folder)
    if model is None and run is None:
        raise FileNotFoundError(f"{folder} holds neither metrics.jsonl nor a model with config.json")
    content = Content(title=folder.resolve().name)
    if model is not None:
        _read_model(content, model)
    if run is not None:
        content.recipe = read_recipe(run / "recipe.yaml")
        content.title = str(content.recipe.get("name") or run.resolve().name)
        _read_metrics(content, run / "metrics.jsonl", step_of(folder.resolve().name))
        if not content.config and content.recipe.get("model"):
            content.config = dict(content.recipe["model"])
    return content


def _read_model(content: Content, model: Path) -> None:
    content.config = read_json(model / "config.json")
    measured = read_measurements(model)
    content.evaluation, content.bounds = measured.figures, measured.bounds
    content.routing, content.acceptance = measured.routing, measured.acceptance
    content.certificate, content.probes = measured.certificate, measured.probes
    content.exits, usual = measured.exits, measured.usual_exits
    if usual:
        words = [f"Shown for WAND at safety {usual.get('safety', 1.0):g}"]
        if finite(measured.exit_tokens):
            words.append(f"{measured.exit_tokens:,} tokens of text")
        content.exit_shares, content.exit_setting = usual["exit_shares"], "; ".join(words) + "."
    parameters = count_parameters(model)
    content.setting = ({"parameters": f"{parameters:,}"} if parameters else {}) | measured.setting
    if measured.acceptance_text:
        content.setting["acceptance setting"] = f"Measured on {measured.acceptance_text}."


def _read_metrics(content: Content, path: Path, until: int | None) -> None:
    """Curves and facts of training, up to the step of the checkpoint that is shown."""
    if not path.is_file():
        return
    loss: dict[str, list[tuple[float, float]]] = {}
    validation: dict[str, list[tuple[float, float]]] = {}
    last: dict[str, Any] = {}
    facts: dict[str, str] = {}
    for row in read_jsonl(path):
        step = row.get("step")
        if not finite(step) or (until is not None and step > until):
            continue
        facts["steps"] = f"{int(step):,}"
        if finite(row.get("seconds")):
            facts["training time"] = duration(row["seconds"])
        if "loss" in row:
            if finite(row.get("tokens")):
                facts["tokens trained"] = f"{int(row['tokens']):,}"
            stages = row.get("stage_loss") or []
            _add(loss, step, stages if len(stages) > 1 else [row["loss"]], "expert {}" if len(stages) > 1 else "loss")
        if is_figures(row) and "set" not in row:
            last = row
            _add(validation, step, row.get("stage_bpb") or [], "expert {}")
            main = "product" if "product_bpb" in row else "final path"
            _add(validation, step, [row.get("product_bpb", row.get("final_path_bpb"))], main)
    if loss or validation:
        content.curves = Curves(loss, validation)
    if not content.evaluation:
        content.evaluation = {k: v for k, v in last.items() if k not in ("step", "seconds")}
    content.setting = facts | content.setting


def _add(curves: dict[str, list[tuple[float, float]]], step: float, values: list[Any], name: str) -> None:
    for k, value in enumerate(values):
        if finite(value):
            curves.setdefault(name.format(k), []).append((step, value))
