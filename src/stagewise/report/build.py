"""From a folder to its report: gather what was measured, let the model speak, write the page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stagewise.hub.checkpoints import model_folder
from stagewise.report.gather import gather
from stagewise.report.page import write_page

DEFAULT_PROMPTS = ("import os\n\n\ndef ", "Return a list of ")


def build_report(
    folder: Path,
    *,
    out: Path | None = None,
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 60,
    sample: bool = True,
    force: bool = False,
) -> Path:
    """Write the page about a run or model folder and return its path (`report.html` in the folder by default).

    `sample` loads the folder's model and shows continuations of `prompts`; a model without experts has none. Raises
    `FileExistsError` before anything is computed when there is a report already and `force` is not set.
    """
    target = out or folder / "report.html"
    if target.exists() and not force:
        raise FileExistsError(f"{target} exists already: give --force to replace it, or another --out")
    content = gather(folder)
    model_path = model_folder(folder)
    if sample and model_path is not None and content.config.get("poe_mode", "none") != "none":
        from stagewise.modeling import load, load_tokenizer
        from stagewise.report.sample import trace_sample

        model, tokenizer = load(model_path), load_tokenizer(model_path)
        chosen = prompts or DEFAULT_PROMPTS
        content.samples = [trace_sample(model, tokenizer, text, max_new_tokens=max_new_tokens) for text in chosen]
    return write_page(content, target, force=force)
