"""Commands of the hub: export, card, publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter


def export(
    model: Path,
    out: Path,
    *,
    dtype: str | None = None,
    max_shard_size: str = "4GB",
    parent: str | None = None,
    parent_weights: Path | None = None,
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a release folder that transformers alone can load.

    Parameters
    ----------
    model
        A model folder, a checkpoint, a specialist's delta folder, or a run.
    out
        The folder to write.
    dtype
        Convert the weights, to bfloat16 for example; as stored when not given.
    max_shard_size
        Split weights into files of at most this size.
    parent
        For a delta: the repository (owner/name) of the model it is loaded on.
    parent_weights
        For a delta whose parent is released in another dtype: the parent's export, whose hash it is to expect.
    force
        Replace the folder when it exists.

    Example: stagewise export runs/lab release/lab --dtype bfloat16
    """
    from stagewise.hub.export import export as run

    out = run(
        model,
        out,
        dtype=dtype,
        max_shard_size=max_shard_size,
        parent=parent,
        parent_weights=parent_weights,
        force=force,
    )
    print(out)


def card(
    model: Path,
    *,
    name: str | None = None,
    license: str = "apache-2.0",
    force: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Write a model's README.md from what was measured.

    Parameters
    ----------
    model
        A model folder that was evaluated, or a run.
    name
        The repository it will have, owner/name; used in the title and the snippets.
    license
        The license in the card's metadata.
    force
        Replace an existing README.md.

    Example: stagewise card runs/lab/model --name owner/lab
    """
    from stagewise.hub.model_card import write_card

    print(write_card(model, name=name, license=license, force=force))


def publish(
    model: Path,
    *,
    repo: str,
    revision: str | None = None,
    private: Annotated[bool, Parameter(negative=())] = False,
    dry_run: Annotated[bool, Parameter(negative=())] = False,
) -> None:
    """Publish a model to a Hugging Face repository: a branch per checkpoint, main on the newest.

    Parameters
    ----------
    model
        A model folder or checkpoint, or a run whose checkpoints are all published.
    repo
        The repository, owner/name; created when it does not exist.
    revision
        The branch, step-N for a checkpoint; taken from the folder's name when not given.
    private
        Create the repository private.
    dry_run
        List what would be sent and ask nothing of the hub.

    Example: stagewise publish runs/lab --repo owner/lab --dry-run
    """
    from stagewise.hub.publish import describe
    from stagewise.hub.publish import publish as run

    print(describe(run(model, repo, revision=revision, private=private, dry_run=dry_run), repo, dry_run=dry_run))
