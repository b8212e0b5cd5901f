"""`stagewise quickstart`: train a small model on this machine and show what its experts can do.

What it trained is reused when it is run again; an interrupted training goes on where it stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

PROMPT = "def __init__(self"
NEW_TOKENS = 24


def quickstart(
    *, out: Path = Path("runs/quickstart"), recipe: str = "quickstart", prompt: str = PROMPT, tokens: int = 65_536
) -> None:
    """Train a small model on the standard library's own source and show what its experts can do.

    Args:
        out: Run folder to write; what is there already is reused.
        recipe: Recipe to train.
        prompt: Text that every expert continues.
        tokens: Validation tokens to measure on.

    Example: stagewise quickstart --prompt "import os"
    """
    from stagewise.evaluation.provenance import write_json
    from stagewise.evaluation.suite import evaluate_models
    from stagewise.evaluation.tables import show_evaluation
    from stagewise.modeling import load, load_tokenizer
    from stagewise.report.build import build_report

    folder = trained(recipe, out)
    figures = folder / "eval" / "evaluation.json"
    if not figures.is_file():
        figures.parent.mkdir(exist_ok=True)
        write_json(figures, evaluate_models([str(folder)], None, tokens))
    result = read(figures)
    measured = result["models"][0]
    setting = f"{measured['tokens']:,} held-out tokens of {result['data']['source']}"
    show_evaluation(measured, setting)
    model, tokenizer = load(folder), load_tokenizer(folder)
    show_continuations(model, tokenizer, prompt)
    report = build_report(out, prompts=[prompt], force=True)
    print(f"\nmodel   {folder}\nreport  {report}\n\nTry next:")
    print(f'  stagewise generate {folder} --prompt "import os" --mode speculative:3 --show-stages')
    print(f"  stagewise calibrate {folder}")
    print(f"  stagewise inspect {folder}")


def trained(recipe: str, out: Path) -> Path:
    """The model folder of a run: found, or trained now."""
    from stagewise.recipe import load_recipe
    from stagewise.training.run import train_recipe

    folder = out / "model"
    if (folder / "config.json").is_file():
        print(f"reusing {folder} (delete {out} to train again)")
        return folder
    outcome = train_recipe(load_recipe(recipe, []), out, resume=True)
    if outcome.stopped_by is not None:
        raise SystemExit(f"stopped by {outcome.stopped_by} after step {outcome.step}; run the same command to go on")
    return folder


def read(file: Path) -> dict[str, Any]:
    import json

    return json.loads(file.read_text(encoding="utf-8"))


def show_continuations(model: Any, tokenizer: Any, prompt: str) -> None:
    """One line per expert, prefix and the product: what each says after the prompt, greedily."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from stagewise.modeling.decoding import decode
    from stagewise.modeling.sampling import SamplingParams

    stages = model.config.num_stages
    modes = [(f"expert {k} alone", f"stage:{k}") for k in range(stages)]
    modes += [(f"experts 0-{k - 1}", f"prefix:{k}") for k in range(2, stages)]
    modes += [("product of all", "full")]
    ids = tokenizer.ensure_bos(tokenizer.encode_ordinary(prompt))
    table = Table(title=f"greedy continuations of {prompt!r}", title_justify="left")
    table.add_column("who speaks", no_wrap=True)
    table.add_column("layers", justify="right")
    table.add_column("text")
    for name, mode in modes:
        result = decode(model, [ids], mode, SamplingParams(NEW_TOKENS))
        depth = model.config.stage_ranges[stages - 1 if mode == "full" else last_stage(mode)][1]
        table.add_row(name, str(depth), Text(prompt + tokenizer.decode(result.tokens[0])))
    Console().print(table)


def last_stage(mode: str) -> int:
    """Index of the deepest stage that "stage:k" or "prefix:k" runs."""
    kind, _, number = mode.partition(":")
    return int(number) - (kind == "prefix")
