"""Commands of the reports: report, trajectory."""

from __future__ import annotations

from pathlib import Path


def report(
    folder: Path,
    *,
    out: Path | None = None,
    prompt: list[str] | None = None,
    tokens: int = 60,
    sample: bool = True,
    force: bool = False,
) -> None:
    """Write report.html about a run or a model: one page that needs nothing else.

    Args:
        folder: A run folder, or a model folder with eval/*.json.
        out: The file to write; report.html in `folder` when not given.
        prompt: Text to continue in the sample; may be given several times.
        tokens: Length of a continuation in tokens.
        sample: Load the model and show what its experts say (--no-sample to leave it out).
        force: Replace an existing report.

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
    seed: int = 0,
    force: bool = False,
) -> None:
    """Measure and calibrate many checkpoints of one run: tables by step as JSON and CSV, with plots.

    Run again, it goes on where it stopped.

    Args:
        source: A run folder, a folder of step-*/ checkpoints, or a repository with step-* branches.
        out: The folder to write; `trajectory` in the run when not given.
        steps: Only these steps; may be given several times.
        every: Only every n-th checkpoint (the last one always).
        data: Text to measure on, as in `stagewise evaluate`.
        tokens: Tokens to measure on at each checkpoint.
        seed: Seed of the bootstrap intervals.
        force: Measure again what is there already.

    Example: stagewise trajectory runs/lab --tokens 131072
    """
    from stagewise.report.trajectory import trajectory as run

    print(run(source, out=out, steps=steps, every=every, data=data, tokens=tokens, seed=seed, force=force))
