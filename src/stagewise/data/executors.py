"""Who runs the units of a preparation: a process pool here, or datatrove on one machine, on Slurm or on Ray.

Design choices:
- A task is (folder, unit): everything else is in the folder's plan, and a finished unit is skipped, so any executor
  may be interrupted, repeated or replaced by another.
- Three stages depend on each other: signatures, the decision which duplicates go (both only with deduplication),
  tokens; on a cluster the manifest is a last task of its own.
- Workers are forked from a clean server process, never from this one: encoding libraries have threads.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

from . import prepare

_tokenizer: Any = None


def _start_worker(load_tokenizer: Callable[[], Any] | None) -> None:
    global _tokenizer
    _tokenizer = load_tokenizer() if load_tokenizer else None


def _encode(out: Path, unit: int) -> int:
    prepare.encode_unit(out, unit, _tokenizer)
    return unit


def _sign(out: Path, unit: int) -> int:
    prepare.write_signatures(out, unit)
    return unit


def run_locally(plan: dict, out: Path, load_tokenizer: Callable[[], Any], workers: int, progress: bool) -> None:
    """Run every unfinished unit on a pool of `workers` processes (in this process when there is one)."""
    sizes = [max(1, unit["bytes"]) for unit in plan["units"]]
    to_sign = prepare.signature_units(plan, out)
    if to_sign:
        _run_stage("fingerprints", partial(_sign, out), to_sign, sizes, None, workers, progress)
    prepare.decide_duplicates(out)
    to_encode = prepare.token_units(plan, out)
    if to_encode:
        _run_stage("tokens", partial(_encode, out), to_encode, sizes, load_tokenizer, workers, progress)


def _worker_context() -> Any:
    """Processes that start from a clean one which has imported this module once; spawned where that is not offered."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def _run_stage(
    name: str,
    work: Callable[[int], int],
    units: Sequence[int],
    sizes: list[int],
    load_tokenizer: Callable[[], Any] | None,
    workers: int,
    progress: bool,
) -> None:
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not progress) as bar:
        task = bar.add_task(f"{name} ({len(units)} units)", total=sum(sizes), completed=0)
        bar.update(task, completed=sum(sizes) - sum(sizes[unit] for unit in units))
        if workers == 1:
            _start_worker(load_tokenizer)
            for unit in units:
                bar.update(task, advance=sizes[work(unit)])
            return
        pool = ProcessPoolExecutor(
            min(workers, len(units)),
            mp_context=_worker_context(),
            initializer=_start_worker,
            initargs=(load_tokenizer,),
        )
        try:
            pending: set[Future[int]] = {pool.submit(work, unit) for unit in units}
            while pending:
                done, pending = wait(pending, timeout=1.0, return_when=FIRST_EXCEPTION)
                for future in done:
                    bar.update(task, advance=sizes[future.result()])
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


# Tasks as datatrove calls them: (data, rank, world_size).


def sign_task(data: Any, rank: int, world_size: int, *, out: str) -> None:
    """Signatures of unit `rank`."""
    prepare.write_signatures(out, rank)


def decide_task(data: Any, rank: int, world_size: int, *, out: str) -> None:
    """Which duplicates go."""
    prepare.decide_duplicates(out)


def encode_task(data: Any, rank: int, world_size: int, *, out: str, load_tokenizer: Callable[[], Any]) -> None:
    """Tokens of unit `rank`."""
    prepare.encode_unit(out, rank, load_tokenizer())


def finish_task(data: Any, rank: int, world_size: int, *, out: str) -> None:
    """Manifest and report."""
    prepare.finish(out)


def _check_stage(name: str, plan: dict, out: Path) -> None:
    """RuntimeError when a stage left work undone (an executor may only log what failed)."""
    left = {
        "signatures": lambda: prepare.signature_units(plan, out),
        "tokens": lambda: prepare.token_units(plan, out),
        "manifest": lambda: [] if (out / "report.json").exists() else [0],
    }.get(name, list)()
    if left:
        raise RuntimeError(f"{len(left)} tasks of stage {name} failed; why is in {out}/logs/{name}/logs")


def run_datatrove(
    plan: dict, out: Path, load_tokenizer: Callable[[], Any], executor: str, workers: int, options: dict
) -> dict | None:
    """Run the preparation through datatrove's executor `executor`: datatrove (this machine), slurm or ray.

    `options` go to datatrove's executor class as they are (for Slurm at least partition and time). Returns the
    report, or None when Slurm has queued the jobs.
    """
    try:
        if executor == "slurm":
            from datatrove.executor import SlurmPipelineExecutor as Executor
        elif executor == "ray":
            import ray
            from datatrove.executor import RayPipelineExecutor as Executor

            if not ray.is_initialized():
                ray.init(**options.pop("ray_init", {"log_to_driver": False}))
        else:
            from datatrove.executor import LocalPipelineExecutor as Executor
    except ImportError as error:
        raise RuntimeError(
            f"executor {executor} needs {error.name}: pip install 'stagewise[scale]'" + (" ray" * (executor == "ray"))
        ) from None
    folder = str(out.resolve())
    units = len(plan["units"])
    stages: list[tuple[str, Callable[..., None], int]] = []
    if plan["deduplicate"] != "none":
        stages += [
            ("signatures", partial(sign_task, out=folder), units),
            ("duplicates", partial(decide_task, out=folder), 1),
        ]
    stages.append(("tokens", partial(encode_task, out=folder, load_tokenizer=load_tokenizer), units))
    stages.append(("manifest", partial(finish_task, out=folder), 1))
    previous = None
    for name, task, tasks in stages:
        arguments: dict[str, Any] = {"logging_dir": f"{folder}/logs/{name}", "workers": min(workers, tasks), **options}
        if executor == "slurm":
            arguments.setdefault("job_name", f"stagewise-{name}")
            missing = [key for key in ("partition", "time") if key not in arguments]
            if missing:
                raise ValueError(
                    f"executor slurm needs {' and '.join(missing)}: for example --executor-option partition=cpu "
                    "--executor-option time=12:00:00"
                )
        else:
            arguments["skip_completed"] = False  # the units' own marks decide
        try:
            stage = Executor(
                pipeline=[task], tasks=tasks, depends=previous if executor == "slurm" else None, **arguments
            )
        except TypeError as error:
            raise ValueError(f"executor option: {error}") from None
        if executor != "slurm":
            stage.run()
            _check_stage(name, plan, out)
        previous = stage
    if executor == "slurm":
        previous.run()  # type: ignore[union-attr]  # launches what it depends on first
        return None
    return prepare.read_json(out / "report.json")
