"""`prepare_shards`: the same shards whoever makes them, and after any interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stagewise.data import open_training_data, prepare_shards
from stagewise.data.prepare import make_plan
from stagewise.data.shards import Shard
from stagewise.data.sources import SourceSpec

SOURCE_FOLDER = str(Path(__file__).parents[2] / "src")


@pytest.fixture
def sources(tmp_path):
    """Two jsonl sources: 240 and 60 documents."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    specs = []
    for name, count, share in (("web", 240, 0.5), ("books", 60, 0.5)):
        lines = [json.dumps({"text": f"{name} {i} " + f"{name}{i * 37 % 101} " * (i % 17)}) for i in range(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        specs.append(SourceSpec(name, kind="jsonl", path=str(folder / f"{name}.jsonl"), share=share))
    return specs


def documents_in(out):
    """Every document of a prepared folder: (source, key, bytes, ids), sorted."""
    manifest = json.loads((out / "manifest.json").read_text())
    found = []
    for source in manifest["sources"]:
        for name in source["shards"]:
            shard = Shard.open(out / name, np.dtype(manifest["dtype"]))
            for number, record in enumerate(shard.documents):
                ids = bytes(shard.ids(number).astype(np.uint8))
                found.append((source["name"], int(record["key"]), int(record["bytes"]), ids))
    return sorted(found)


def texts_of(specs):
    return [json.loads(line)["text"] for spec in specs for line in Path(spec.path).read_text().splitlines()]


def test_every_document_is_prepared_once_whatever_the_unit_size(sources, tmp_path, byte_tokenizer_class):
    expected = Counter(texts_of(sources))
    results = []
    for unit_bytes in (700, 5000, None):
        out = tmp_path / f"out-{unit_bytes}"
        report = prepare_shards(sources, out, byte_tokenizer_class, unit_bytes=unit_bytes, progress=False)
        results.append(documents_in(out))
        assert Counter(document[3].decode() for document in results[-1]) == expected
        assert report["total"]["documents"] == 300 and report == json.loads((out / "report.json").read_text())
        assert report["total"]["tokens"] == report["total"]["bytes"] == sum(len(t) for t in texts_of(sources))
    assert results[0] == results[1] == results[2]
    hashes = {
        tuple(
            source["content_sha256"]
            for source in json.loads((tmp_path / f"out-{size}" / "manifest.json").read_text())["sources"]
        )
        for size in (700, 5000, None)
    }
    assert len(hashes) == 1


def test_worker_processes_write_the_same_files_as_one_process(sources, tmp_path, byte_tokenizer_class):
    for workers in (1, 2):
        prepare_shards(
            sources, tmp_path / str(workers), byte_tokenizer_class, workers=workers, unit_bytes=4000, progress=False
        )
    files = [
        {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
        for folder in (tmp_path / "1", tmp_path / "2")
    ]
    assert files[0] == files[1] and len(files[0]) > 10


def test_killed_preparation_resumes_without_duplicates_or_losses(sources, tmp_path, byte_tokenizer_class):
    script = tmp_path / "killed.py"
    script.write_text(
        textwrap.dedent(
            """
            import json, sys, time
            sys.path[:0] = sys.argv[2:4]
            sys.argv[0] = "stagewise"  # as the command does: start without the model code
            import byte_tokenizer
            from stagewise.data import SourceSpec, prepare_shards

            class Slow(byte_tokenizer.ByteTokenizer):
                def encode_batch_ordinary(self, texts, num_threads=1):
                    time.sleep(0.05)
                    return super().encode_batch_ordinary(texts, num_threads)

            if __name__ == "__main__":
                specs = [SourceSpec(**spec) for spec in json.loads(sys.argv[4])]
                prepare_shards(specs, sys.argv[1], Slow, workers=1, unit_bytes=600, progress=False)
                print("finished")
            """
        )
    )
    out = tmp_path / "out"
    arguments = [str(out), SOURCE_FOLDER, str(Path(__file__).parent), json.dumps([spec.as_dict() for spec in sources])]
    command = [sys.executable, str(script), *arguments]
    kills = 0
    while kills < 2:
        before = len(list(out.glob("units/*.json")))
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 60
        while len(list(out.glob("units/*.json"))) < before + 3 and time.monotonic() < deadline:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        kills += 1
    assert not (out / "manifest.json").exists()
    done = {path: path.stat().st_mtime_ns for path in out.glob("units/*.json")}
    (out / "shards" / "00-00000.bin.tmp-1").write_bytes(b"left by a killed process")
    prepare_shards(sources, out, byte_tokenizer_class, unit_bytes=600, progress=False)
    assert all(path.stat().st_mtime_ns == at for path, at in done.items())  # finished units were not done again
    assert not list(out.rglob("*.tmp-*"))
    prepare_shards(sources, tmp_path / "whole", byte_tokenizer_class, progress=False)
    assert documents_in(out) == documents_in(tmp_path / "whole")
    assert Counter(document[3].decode() for document in documents_in(out)) == Counter(texts_of(sources))


def test_training_on_shards_reads_the_same_documents_as_training_on_files(sources, tmp_path, byte_tokenizer_class):
    tokenizer = byte_tokenizer_class()
    prepare_shards(sources, tmp_path / "out", byte_tokenizer_class, unit_bytes=3000, progress=False)
    settings = {"validation_fraction": 0.1, "case_augmentation": 0.0}
    files = open_training_data(SimpleNamespace(sources=sources, **settings), tokenizer, 32, 0)
    shards = open_training_data(SimpleNamespace(sources=[], shards=tmp_path / "out", **settings), tokenizer, 32, 0)
    for key in ("train", "validation"):
        assert files.manifest[key] == shards.manifest[key]
    for one, two in zip(files.manifest["sources"], shards.manifest["sources"], strict=True):
        assert (one["content_sha256"], one["target_share"]) == (two["content_sha256"], two["target_share"])
    held_out = [sorted(document.text for document in data.validation_documents()) for data in (files, shards)]
    assert held_out[0] == held_out[1]
    shards.train.next_batch(30)
    state = shards.train.state_dict()
    again = open_training_data(SimpleNamespace(sources=sources, shards=tmp_path / "out", **settings), tokenizer, 32, 0)
    again.train.load_state_dict(state)
    assert torch.equal(shards.train.next_batch(9)[0], again.train.next_batch(9)[0])


@pytest.mark.parametrize(("how", "left"), [("none", 5), ("exact", 4), ("near", 3)])
@pytest.mark.parametrize("workers", [1, 2])
def test_repeated_documents_are_removed_across_units_and_sources(tmp_path, byte_tokenizer_class, how, left, workers):
    long = [f"word{i}" for i in range(300)]
    texts = [
        ["something else entirely", " ".join(long)],
        ["  ".join(long), "third", " ".join([*long[:150], "changed", *long[151:]])],
    ]
    specs = []
    for number, source in enumerate(texts):
        path = tmp_path / f"{number}.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in source))
        specs.append(SourceSpec(str(number), kind="jsonl", path=str(path)))
    out = tmp_path / "out"
    report = prepare_shards(
        specs, out, byte_tokenizer_class, deduplicate=how, unit_bytes=1000, workers=workers, progress=False
    )
    kept = [document[3].decode() for document in documents_in(out)]
    assert len(kept) == left == report["total"]["documents"] == 5 - report["total"]["duplicates"]
    assert {texts[0][0], texts[0][1], "third"} <= set(kept)  # the first of each stays


def test_bad_records_stop_the_work_or_are_counted(tmp_path, byte_tokenizer_class):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\nnot json\n{"body": "x"}\n{"text": "two"}\n')
    spec = SourceSpec("a", kind="jsonl", path=str(path))
    for workers in (1, 2):
        with pytest.raises(ValueError, match=r"a\.jsonl:2: not a JSON line"):
            prepare_shards([spec], tmp_path / f"stop{workers}", byte_tokenizer_class, workers=workers, progress=False)
    report = prepare_shards([spec], tmp_path / "skip", byte_tokenizer_class, skip_bad=True, progress=False)
    assert (report["total"]["documents"], report["total"]["skipped"]) == (2, 2)


def test_report_compares_shares_with_targets(sources, tmp_path, byte_tokenizer_class):
    report = prepare_shards(sources, tmp_path / "out", byte_tokenizer_class, progress=False)
    web, books = report["sources"]
    assert web["share"] + books["share"] == pytest.approx(1.0) and web["share"] > 0.75
    assert web["target_share"] == books["target_share"] == 0.5
    assert books["epochs_per_total"] == pytest.approx(0.5 / books["share"])


def test_a_folder_is_refused_when_it_holds_something_else(sources, tmp_path, byte_tokenizer_class):
    tokenizer, out = byte_tokenizer_class(), tmp_path / "out"
    recipe = SimpleNamespace(sources=[], shards=out)
    with pytest.raises(FileNotFoundError, match="not a folder of token shards"):
        open_training_data(recipe, tokenizer, 32, 0)
    make_plan(sources, out, tokenizer)
    with pytest.raises(FileNotFoundError, match="not finished"):
        open_training_data(recipe, tokenizer, 32, 0)
    prepare_shards(sources, out, byte_tokenizer_class, progress=False)
    with pytest.raises(ValueError, match="holds another preparation: deduplicate changed"):
        prepare_shards(sources, out, byte_tokenizer_class, deduplicate="exact", progress=False)
    with open(sources[0].path, "a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(ValueError, match="holds another preparation: units changed"):
        prepare_shards(sources, out, byte_tokenizer_class, progress=False)
    with pytest.raises(ValueError, match="has no source 'news'|has no source news; it has: web, books"):
        open_training_data(
            SimpleNamespace(sources=[{"name": "news", "kind": "embedded"}], shards=out), tokenizer, 32, 0
        )
    tokenizer.vocab_size = 300
    with pytest.raises(ValueError, match="made with another tokenizer"):
        open_training_data(recipe, tokenizer, 32, 0)


def test_a_prepared_validation_set_is_measured_on_and_never_trained_on(sources, tmp_path, byte_tokenizer_class):
    from dataclasses import replace

    out, tokenizer = tmp_path / "out", byte_tokenizer_class()
    web, books = sources[0], replace(sources[1], validation_only=True)
    report = prepare_shards([web, books], out, byte_tokenizer_class, progress=False)
    assert [row["target_share"] for row in report["sources"]] == [1.0, None]
    for recipe in (
        SimpleNamespace(sources=[], shards=out),
        SimpleNamespace(sources=[web], validation_sources=[sources[1]], shards=out),
    ):
        data = open_training_data(recipe, tokenizer, 32, 0)
        assert data.validation_names == ["web", "books"]
        assert len(list(data.validation_documents("books"))) == 60
        assert [source["name"] for source in data.manifest["sources"]] == ["web"]


def test_an_empty_source_is_named(tmp_path, byte_tokenizer_class):
    (tmp_path / "a.jsonl").write_text('{"text": "  "}\n')
    spec = SourceSpec("a", kind="jsonl", path=str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="source 'a' is an empty corpus"):
        prepare_shards([spec], tmp_path / "out", byte_tokenizer_class, progress=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"executor": "cluster"}, "executor must be one of"),
        ({"deduplicate": "fuzzy"}, "dedup must be one of"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(sources, tmp_path, byte_tokenizer_class, changes, message):
    with pytest.raises(ValueError, match=message):
        prepare_shards(sources, tmp_path / "out", byte_tokenizer_class, **changes)
