"""Datatrove's executors: the same shards as the local pool."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path

import pytest

from stagewise.data import SourceSpec, prepare_shards


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = [f"document {i} " * (1 + i % 7) for i in range(60)] + ["document 3 " * 4]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return SourceSpec("a", kind="jsonl", path=str(path))


@pytest.fixture
def expected(source, tmp_path, byte_tokenizer_class):
    """Files and report of the local executor."""
    report = prepare_shards(
        [source], tmp_path / "local", byte_tokenizer_class, deduplicate="exact", unit_bytes=1500, progress=False
    )
    assert report["total"]["duplicates"] == 1
    return files_of(tmp_path / "local"), report


def files_of(out):
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.relative_to(out).parts[0] != "logs"
    }


def test_datatrove_on_this_machine_writes_the_same_files(source, expected, tmp_path, byte_tokenizer_class):
    out = tmp_path / "out"
    report = prepare_shards(
        [source], out, byte_tokenizer_class, deduplicate="exact", unit_bytes=1500, executor="datatrove"
    )
    assert (files_of(out), report) == expected


def test_datatrove_continues_what_another_executor_began(source, expected, tmp_path, byte_tokenizer_class):
    out = tmp_path / "local"
    for name in ("manifest.json", "report.json", "units/00001.json", "shards/00-00001.bin"):
        (out / name).unlink()
    kept = (out / "units" / "00000.json").stat().st_mtime_ns
    prepare_shards([source], out, byte_tokenizer_class, deduplicate="exact", unit_bytes=1500, executor="datatrove")
    assert files_of(out) == expected[0]
    assert (out / "units" / "00000.json").stat().st_mtime_ns == kept


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster of three commands: sbatch writes down what it is given, scontrol knows one host."""
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, body in (
        ("sbatch", f'for last; do :; done; n=$(ls {tmp_path}/jobs | wc -l); cp "$last" {tmp_path}/jobs/$n; '
         f'echo "$@" > {tmp_path}/jobs/$n.arguments; echo Submitted batch job $n'),
        ("scontrol", "echo localhost"),
    ):  # fmt: skip
        (commands / name).write_text(f"#!/bin/sh\n{body}\n")
        (commands / name).chmod(0o755)
    (tmp_path / "jobs").mkdir()
    monkeypatch.setenv("PATH", f"{commands}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "jobs"


def test_slurm_jobs_wait_for_each_other_and_do_the_whole_work(
    source, expected, slurm, tmp_path, byte_tokenizer_class, monkeypatch
):
    import dill

    out = tmp_path / "out"
    report = prepare_shards(
        [source],
        out,
        byte_tokenizer_class,
        deduplicate="exact",
        unit_bytes=1500,
        workers=2,
        executor="slurm",
        executor_options={"partition": "cpu", "time": "1:00:00", "mem_per_cpu_gb": 4},
    )
    assert report is None and not (out / "manifest.json").exists()
    queued = []
    for script in sorted(slurm.glob("*[0-9]"), key=lambda path: int(path.name)):
        name = re.search(r"job-name=stagewise-(\w+)", script.read_text())[1]
        if "launch_pickled_pipeline" in script.read_text():
            queued.append(
                (name, int(script.name), (slurm / f"{script.name}.arguments").read_text(), script.read_text())
            )
    assert [name for name, *_ in queued] == ["signatures", "duplicates", "tokens", "manifest"]
    for before, after in zip(queued, queued[1:], strict=False):
        assert f"--dependency=afterok:{before[1]} " in after[2]
    units = len(json.loads((out / "plan.json").read_text())["units"])
    assert f"--array=0-{units - 1}%2" in queued[2][3] and "--partition=cpu" in queued[2][3]
    monkeypatch.setenv("SLURM_NODELIST", "localhost")
    monkeypatch.setenv("RUN_OFFSET", "0")
    monkeypatch.setattr(sys, "argv", ["launch_pickled_pipeline"])
    for name, *_ in queued:  # what a node does with each element of the arrays
        for rank in range(units if name in ("signatures", "tokens") else 1):
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(rank))
            dill.loads(Path(out, "logs", name, "executor.pik").read_bytes()).run()
    assert files_of(out) == expected[0]


def test_slurm_without_partition_or_time_says_how_to_give_them(source, tmp_path, byte_tokenizer_class):
    with pytest.raises(ValueError, match="needs partition and time: for example --executor-option partition=cpu"):
        prepare_shards([source], tmp_path / "out", byte_tokenizer_class, executor="slurm")
    with pytest.raises(ValueError, match="executor option: .*colour"):
        prepare_shards(
            [source], tmp_path / "out", byte_tokenizer_class, executor="datatrove", executor_options={"colour": 1}
        )


@pytest.mark.parametrize("executor", ["datatrove", "ray"])
def test_a_missing_library_names_the_extra(source, tmp_path, byte_tokenizer_class, monkeypatch, executor):
    monkeypatch.setitem(sys.modules, "ray" if executor == "ray" else "datatrove.executor", None)
    with pytest.raises(RuntimeError, match=r"stagewise\[scale\]"):
        prepare_shards([source], tmp_path / "out", byte_tokenizer_class, executor=executor)


def test_a_stage_that_failed_is_an_error_even_when_the_executor_only_logs_it(
    source, tmp_path, byte_tokenizer_class, monkeypatch
):
    from datatrove.executor import LocalPipelineExecutor

    monkeypatch.setattr(LocalPipelineExecutor, "run", lambda self: None)
    with pytest.raises(RuntimeError, match="tasks of stage tokens failed; why is in"):
        prepare_shards([source], tmp_path / "out", byte_tokenizer_class, executor="datatrove")
