"""Publishing model folders to a Hugging Face repository.

- A branch `step-N` per checkpoint; `main` holds the newest checkpoint of the repository and never goes back.
- Resumable: files are compared by hash with what the branch already holds, so a second run uploads only what is
  missing; each branch changes in one commit, so readers never see half a model.
- A folder is checked before the first request: weights complete, remote code and tokenizer present.
- A dry run makes no request at all.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stagewise.hub.checkpoints import is_model, list_checkpoints, model_folder, read_json, step_of

if TYPE_CHECKING:
    from huggingface_hub import HfApi

NOT_PUBLISHED = ("training_state", "__pycache__")
OURS = re.compile(r"model.*\.safetensors|delta\.safetensors|.*\.safetensors\.index\.json|[a-z_]+\.py|eval/.*\.json")


@dataclass(frozen=True)
class Target:
    """One branch to bring up to date with one folder."""

    branch: str
    folder: Path
    step: int | None


@dataclass
class Outcome:
    """What happened to one branch: paths sent and removed, files that were there already."""

    branch: str
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    unchanged: int = 0
    bytes: int = 0
    commit: str | None = None
    card: bool = True  # whether the folder has a README.md


def check_repo_name(repo: str) -> None:
    """`ValueError` unless `repo` is a name the hub accepts: `name` or `owner/name`."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(
            f"--repo {repo!r} is not a valid repository name: write owner/name with letters, digits, '-', '_' or '.' "
            f"({str(error).split(':')[0].strip()})"
        ) from error


def release_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(path in the repository, local path) of every file of a model folder that belongs in public."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") or part in NOT_PUBLISHED for part in parts)
        if path.is_file() and not hidden and path.suffix not in (".tmp", ".pyc"):
            yield "/".join(parts), path


def check_release(folder: Path) -> None:
    """`ValueError` naming what a model folder lacks before transformers alone could load it."""
    config = read_json(folder / "config.json")
    names = {name for name, _ in release_files(folder)}
    missing = []
    if "model.safetensors.index.json" in names:
        shards = set(read_json(folder / "model.safetensors.index.json").get("weight_map", {}).values())
        missing += sorted(shards - names)
    elif not names & {"model.safetensors", "delta.safetensors"}:
        missing.append("model.safetensors")
    modules = {str(target).split("--")[-1].split(".")[0] + ".py" for target in _auto_targets(config)}
    missing += sorted(modules - names) if modules else ["auto_map in config.json"]
    if not names & {"tokenizer.json", "tokenizer.pkl"}:
        missing.append("tokenizer.json")
    if missing:
        raise ValueError(
            f"{folder} is not complete for publishing, it lacks {', '.join(missing)}: "
            "write a release folder with `stagewise export`"
        )


def check_parent(folder: Path) -> None:
    """`ValueError` when a delta names a parent that only this machine has."""
    if not (folder / "delta.safetensors").is_file():
        return
    parent = str(read_json(folder / "config.json").get("base_model_name_or_path") or "")
    if parent.count("/") != 1 or parent.startswith((".", "/", "~")) or (folder / parent).exists():
        raise ValueError(
            f"{folder} is a delta on base_model_name_or_path={parent!r}, which others do not have: publish the parent, "
            "then write this folder again with `stagewise export ... --parent owner/parent`"
        )


def _auto_targets(config: dict[str, Any]) -> Iterator[str]:
    for value in (config.get("auto_map") or {}).values():
        yield from (v for v in (value if isinstance(value, list) else [value]) if v)


def plan(source: Path, revision: str | None = None) -> list[Target]:
    """Branches to write for a model folder, or for a run with its checkpoints, oldest first; `main` is added later.

    A single model goes to `revision`, to the branch its folder's name says (`step-000100` -> `step-100`), or to `main`.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder: give a model folder or a run folder")
    if is_model(source):
        step = step_of(source.name if revision is None else revision)
        branch = revision or ("main" if step is None else f"step-{step}")
        return [Target(branch, source, step)]
    checkpoints = list_checkpoints(source)
    if revision is not None:
        step = step_of(revision)
        chosen = [path for s, path in checkpoints if s == step]
        if not chosen:
            have = ", ".join(f"step-{s}" for s, _ in checkpoints) or "none"
            raise ValueError(f"--revision {revision}: {source} has no such checkpoint (it has: {have})")
        return [Target(revision, chosen[0], step)]
    if checkpoints:
        return [Target(f"step-{step}", path, step) for step, path in checkpoints]
    only = model_folder(source)
    if only is None:
        raise FileNotFoundError(f"{source} holds no model: no config.json in it, its model/ or its checkpoints/step-*/")
    return [Target("main", only, None)]


def publish(
    source: Path,
    repo: str,
    *,
    revision: str | None = None,
    private: bool = False,
    dry_run: bool = False,
    api: HfApi | None = None,
) -> list[Outcome]:
    """Bring a repository's branches up to date with a model, a checkpoint, or all checkpoints of a run.

    Returns one `Outcome` per branch in the order written. Raises `ValueError` for an invalid repository name or an
    incomplete folder (before any request) and `RuntimeError` when the hub refuses.
    """
    check_repo_name(repo)
    targets = plan(source, revision)
    for target in targets:
        check_release(target.folder)
        check_parent(target.folder)
    if dry_run:
        return [_would_send(target) for target in targets]

    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    api = api or HfApi()
    try:
        api.create_repo(repo, exist_ok=True, private=private or None)
        branches = {ref.name for ref in api.list_repo_refs(repo).branches}
        newest = max((step for name in branches if (step := step_of(name)) is not None), default=-1)
        last = targets[-1]
        if last.step is not None and last.step >= newest and last.branch != "main":
            finished = source / "model"
            folder = finished if is_model(finished) and not is_model(source) and revision is None else last.folder
            check_release(folder)
            targets = [*targets, Target("main", folder, last.step)]
        return [_update(api, repo, target, branches) for target in targets]
    except RepositoryNotFoundError as error:
        raise RuntimeError(
            f"the hub does not let you write to {repo}: log in with `hf auth login` and check the owner's name"
        ) from error
    except HfHubHTTPError as error:
        raise RuntimeError(
            f"the hub refused: {' '.join(str(error).split())}; run the command again to resume"
        ) from error


def _would_send(target: Target) -> Outcome:
    files = dict(release_files(target.folder))
    size = sum(path.stat().st_size for path in files.values())
    return Outcome(target.branch, list(files), bytes=size, card="README.md" in files)


def _update(api: HfApi, repo: str, target: Target, branches: set[str]) -> Outcome:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    if target.branch not in branches and target.branch != "main":
        api.create_branch(repo, branch=target.branch, exist_ok=True)
        branches.add(target.branch)
    remote = {
        entry.path: entry
        for entry in api.list_repo_tree(repo, recursive=True, revision=target.branch)
        if hasattr(entry, "blob_id")
    }
    outcome = Outcome(target.branch)
    operations: list[Any] = []
    local = dict(release_files(target.folder))
    outcome.card = "README.md" in local
    for name, path in local.items():
        if name in remote and _same(path, remote[name]):
            outcome.unchanged += 1
            continue
        operations.append(CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)))
        outcome.added.append(name)
        outcome.bytes += path.stat().st_size
    for name in sorted(remote):
        if name not in local and OURS.fullmatch(name):
            operations.append(CommitOperationDelete(path_in_repo=name))
            outcome.removed.append(name)
    if operations:
        label = f"Step {target.step}" if target.step is not None else "Model"
        outcome.commit = api.create_commit(
            repo, operations, commit_message=f"{label}, published by stagewise", revision=target.branch
        ).oid
    return outcome


def _same(path: Path, entry: Any) -> bool:
    """Whether a local file equals the remote one: by SHA-256 for large files, by git's blob hash for others."""
    size = path.stat().st_size
    if size != entry.size:
        return False
    digest = hashlib.sha256() if entry.lfs else hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == (entry.lfs.sha256 if entry.lfs else entry.blob_id)


def describe(outcomes: list[Outcome], repo: str, *, dry_run: bool) -> str:
    """One line per branch for people."""
    lines = []
    for o in outcomes:
        size = f"{o.bytes / 1e6:,.1f} MB"
        if dry_run:
            lines.append(f"would publish {repo}@{o.branch}: {len(o.added)} files, {size}: {', '.join(o.added)}")
        elif o.commit is None:
            lines.append(f"{repo}@{o.branch}: up to date ({o.unchanged} files)")
        else:
            removed = f", {len(o.removed)} removed" if o.removed else ""
            lines.append(f"{repo}@{o.branch}: {len(o.added)} files sent ({size}), {o.unchanged} unchanged{removed}")
    bare = [o.branch for o in outcomes if not o.card]
    if bare:
        lines.append(f"without a README.md: {', '.join(bare)} (`stagewise evaluate`, then `stagewise card` writes one)")
    return "\n".join(lines)
