"""Commands of the reports: report, trajectory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def report(
    folder: Path,
    *,
    out: Path | None = None,
    prompt: list[str] | None = None,
    tokens: int = 60,
    sample: bool = True,
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write report.html about a run or a model: one page that needs nothing else.

    Parameters
    ----------
    folder
        A run folder, or a model folder with eval/*.json.
    out
        The file to write; report.html in the folder when left out.
    prompt
        Text to continue in the sample. May be repeated.
    tokens
        Length of a continuation in tokens.
    sample
        Load the model and show what its experts say; --no-sample leaves it out.
    force
        Replace an existing report.

    Example: stagewise report runs/quickstart --prompt "import os"
    """
    from stagewise.report.build import build_report

    print(build_report(folder, out=out, prompts=prompt, max_new_tokens=tokens, sample=sample, force=force))


def trajectory(
    source: str,
    *,
    out: Path | None = None,
    steps: list[int] | None = None,
    every: int = 1,
    data: list[str] | None = None,
    tokens: int = 131_072,
    cap: float = 0.020,
    draft_length: int = 4,
    prompts: int = 64,
    new_tokens: int = 60,
    allow_fewer_tokens: Annotated[bool, Parameter(negative=())] = False,
    seed: int = 0,
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Measure and calibrate many checkpoints of one run: tables by step as JSON and CSV, with plots.

    Run again, it goes on where it stopped.

    Parameters
    ----------
    source
        A run folder, a folder of step-*/ checkpoints, or a repository with step-* branches.
    out
        The folder to write; trajectory in a local source when left out.
    steps
        Only these steps.
    every
        Only every n-th checkpoint, and the last one.
    data
        Text to measure on, as in evaluate.
    tokens
        Tokens to measure on at each checkpoint.
    cap
        Rate of regressions allowed in the routing probe.
    draft_length
        Tokens a draft has.
    prompts
        Prompts whose continuations acceptance is measured on.
    new_tokens
        Tokens each prompt is continued by.
    allow_fewer_tokens
        Accept rougher exit bounds from fewer than 131,072 tokens.
    seed
        Seed of the intervals and of the prompts.
    force
        Measure again what is there already.

    Example: stagewise trajectory runs/lab --every 2
    """
    from stagewise.report.trajectory import trajectory as measure

    folder = measure(
        source,
        out=out,
        steps=steps,
        every=every,
        data=data,
        tokens=tokens,
        cap=cap,
        draft_length=draft_length,
        prompts=prompts,
        new_tokens=new_tokens,
        allow_fewer_tokens=allow_fewer_tokens,
        seed=seed,
        force=force,
    )
    print(folder / "trajectory.html")
