"""`stagewise train`: a recipe in, a run folder out."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def train(
    recipe: str,
    /,
    *,
    set: Annotated[list[str] | None, Parameter(negative=())] = None,  # noqa: A002 (the option is called --set)
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    device: str | None = None,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Train a base model from a recipe.

    Parameters
    ----------
    recipe
        A shipped recipe's name, or the path of a YAML file.
    set
        Values to change, as section.key=value. May be repeated.
    out
        Run folder to write; runs/NAME when left out.
    resume
        Go on from the newest checkpoint in the run folder, or start when there is none.
    dry_run
        Build nothing: say tokens, steps, FLOPs and memory per rank, and whether it fits this machine.
    device
        cpu, cuda or cuda:1; the GPU when there is one.
    quiet
        Print nothing while training.

    Example:
        stagewise train quickstart --set training.steps=100 --out runs/first
    """
    from stagewise.recipe import load_recipe

    loaded = load_recipe(recipe, set or [])
    run = out or Path("runs") / loaded.name
    if dry_run:
        from stagewise.training.cost import dry_run as estimate

        print(estimate(loaded))
        return
    from stagewise.training.run import train_recipe

    outcome = train_recipe(loaded, run, resume=resume, device=device, quiet=quiet)
    if outcome.stopped_by is not None:
        print(f"stopped by {outcome.stopped_by} after step {outcome.step}; checkpoint {outcome.checkpoint}")
        again = "".join(f" --set {item}" for item in set or [])
        print(f"go on with: stagewise train {recipe}{again} --out {run} --resume")
        number = getattr(signal, outcome.stopped_by, None)
        raise SystemExit(128 + number if number else 1)
    if not quiet:
        print(f"trained {outcome.step:,} steps in {outcome.seconds:,.0f} s: {outcome.model}")
