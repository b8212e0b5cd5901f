"""`stagewise specialise`, `convert-delta` and `fold`."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter


def specialise(
    recipe: str,
    /,
    *,
    set: Annotated[list[str] | None, Parameter(negative=())] = None,  # noqa: A002 (the option is called --set)
    out: Path | None = None,
    resume: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
    reference_layout: Annotated[bool, Parameter(negative=())] = False,
    device: str | None = None,
    quiet: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Grow a specialist on a frozen model from a recipe.

    Parameters
    ----------
    recipe
        A shipped recipe's name, or the path of a YAML file with a specialist section.
    set
        Values to change, as section.key=value. May be repeated.
    out
        Run folder to write; runs/NAME when left out. A finished one is shown again, not trained again.
    resume
        Go on from the newest checkpoint in the run folder, or start when there is none.
    dry_run
        Build shapes only: say what trains, at which rates and on what.
    reference_layout
        Write deltas tensor for tensor as the released ones: the whole embedding table instead of its changed rows.
    device
        cpu, cuda or cuda:1; the GPU when there is one.
    quiet
        Print nothing while training.

    Example:
        stagewise specialise quickstart-tools --set specialist.parent=runs/quickstart/model
    """
    from stagewise.recipe import load_recipe
    from stagewise.specialist import train

    loaded = load_recipe(recipe, set or [])
    if dry_run:
        print(train.dry_run(loaded))
        return
    run = out or Path("runs") / loaded.name
    model = run / "model"
    if (model / "delta.safetensors").is_file() and (run / "recipe.yaml").read_text("utf-8") == loaded.to_yaml():
        print(f"reusing {model} (delete {run} to train again)")
        finish(loaded, model)
        return
    outcome = train.train_specialist(
        loaded, run, resume=resume, device=device, quiet=quiet, reference_layout=reference_layout
    )
    if outcome.stopped_by is not None:
        print(f"stopped by {outcome.stopped_by} after step {outcome.step}; checkpoint {outcome.checkpoint}")
        again = "".join(f" --set {item}" for item in set or [])
        print(f"go on with: stagewise specialise {recipe}{again} --out {run} --resume")
        number = getattr(signal, outcome.stopped_by, None)
        raise SystemExit(128 + number if number else 1)
    if not quiet:
        print(f"trained {outcome.step:,} steps in {outcome.seconds:,.0f} s: {outcome.model}")
    finish(loaded, outcome.model)


def finish(recipe: Any, folder: Path | None) -> None:
    """Calls to held-out functions, for a specialist that was trained on the embedded tool set, and what to do next."""
    names = {source.name for source in recipe.specialist.conversations}
    if folder is None or int(os.environ.get("RANK", "0")) or "embedded-tools" not in names:
        return
    from stagewise.specialist.demonstration import show_calls

    show_calls(folder)
    print("\nTry next:")
    print(f'  stagewise chat {folder} --prompt "What does math.sin do?"')
    print(f"  stagewise fold {folder} runs/{recipe.name}/flat")


def convert_delta(
    checkpoint: Path,
    out: Path,
    /,
    *,
    parent: str,
    revision: str | None = None,
    base_head: Literal["final", "last_expert"] = "final",
    keep_windows: Annotated[bool, Parameter(negative=())] = False,
    reference_layout: Annotated[bool, Parameter(negative=())] = False,
    dtype: str | None = None,
) -> None:
    """Convert a stage checkpoint (.pt) into a delta folder. Only plain tensors are read from it.

    Parameters
    ----------
    checkpoint
        File saved by torch, nanochat's layout; a whole model's is fine when its frozen tensors are the parent's.
    out
        Folder to write.
    parent
        Folder or repository of the model the stage was trained on.
    revision
        Branch, tag or commit of the parent's repository.
    base_head
        Where the stage's path branches off; nanochat's is final.
    keep_windows
        Keep the base's attention windows. nanochat recomputes all windows from the new depth, and so does this.
    reference_layout
        Keep the whole embedding table instead of its changed rows.
    dtype
        dtype to store; the checkpoint's own when left out.

    Example:
        stagewise convert-delta stage_002600.pt stage-tool --parent cognica/Cognica-PoE-v1.0-1.3B-base
    """
    from stagewise.specialist.delta import convert

    written = convert(
        checkpoint,
        parent,
        out,
        revision=revision,
        base_head=base_head,
        recompute_windows=not keep_windows,
        reference_layout=reference_layout,
        dtype=dtype,
    )
    print(f"wrote {written}")


def fold(
    specialist: str,
    out: Path,
    /,
    *,
    revision: str | None = None,
    single_path: Annotated[bool, Parameter(negative=())] = False,
    dtype: str | None = None,
) -> None:
    """Flatten a specialist and its parents into one model folder that needs no parent.

    Parameters
    ----------
    specialist
        Folder or repository of the specialist, any depth.
    out
        Folder to write.
    revision
        Branch, tag or commit of the repository.
    single_path
        Keep only the specialist's own path, as a plain model with one head; the base's experts are lost.
    dtype
        dtype to store; as it is when left out.

    Example:
        stagewise fold runs/quickstart-tools/model flat
    """
    from stagewise.specialist.delta import fold_to_folder

    print(f"wrote {fold_to_folder(specialist, out, revision=revision, single_path=single_path, dtype=dtype)}")
