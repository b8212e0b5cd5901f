"""Preparing data: text to token shards, in parallel, resumable, the same on every executor.

Design choices:
- `plan.json` fixes sources and units of work before anything is done. A unit reads its documents, encodes them and
  writes one shard; last of all it writes its mark, `units/NNNNN.json`. What has a mark is finished; what has none is
  done (again) from its start. So a killed run resumes without duplicates or losses, whoever runs the units.
- Workers share nothing but the folder. The local executor is a process pool; `executors` runs the same units through
  datatrove on one machine, on Slurm or on Ray.
- With deduplication a first pass leaves a signature per document and one step decides which documents stay.
- `manifest.json` comes last and makes the folder complete; `report.json` compares what is there with the target
  shares.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .deduplication import duplicates, exact_signature, near_signature
from .shards import token_dtype, write_shard, write_text_atomically
from .sources import LARGEST_UNIT, SMALLEST_UNIT, SourceSpec, plan_units, read_unit, source_size
from .splitting import content_hex, content_sum, document_sum, key_hash
from .token_identity import tokenizer_hash

FORMAT = 1
DEDUPLICATIONS = ("none", "exact", "near")
EXECUTORS = ("local", "datatrove", "slurm", "ray")
LoadTokenizer = Callable[[], Any]
_BATCH_CHARACTERS = 1 << 20


def make_plan(
    sources: list[SourceSpec],
    out: str | Path,
    tokenizer: Any,
    *,
    deduplicate: str = "none",
    skip_bad: bool = False,
    unit_bytes: int | None = None,
) -> dict:
    """Write `plan.json` into `out`, or check that the plan there is the same; returns it."""
    if deduplicate not in DEDUPLICATIONS:
        raise ValueError(f"dedup must be one of {', '.join(DEDUPLICATIONS)}, got {deduplicate!r}")
    if not sources:
        raise ValueError("no sources to prepare")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"source names must differ, got {', '.join(names)}")
    if unit_bytes is None:
        total = sum(source_size(source) for source in sources)
        unit_bytes = min(max(total // 64, SMALLEST_UNIT), LARGEST_UNIT)
    units = [
        {"source": number, **unit} for number, source in enumerate(sources) for unit in plan_units(source, unit_bytes)
    ]
    plan = {
        "format": FORMAT,
        "sources": [source.as_dict() for source in sources],
        "tokenizer": tokenizer_hash(tokenizer),
        "dtype": token_dtype(tokenizer.vocab_size).str,
        "deduplicate": deduplicate,
        "skip_bad": skip_bad,
        "units": units,
    }
    plan = json.loads(json.dumps(plan))
    path = Path(out) / "plan.json"
    if path.exists():
        before = read_json(path)
        differing = sorted(key for key in plan.keys() | before.keys() if plan.get(key) != before.get(key))
        if differing:
            raise ValueError(
                f"{out} holds another preparation: {', '.join(differing)} changed; choose another --out or remove it"
            )
        return before
    write_text_atomically(path, json.dumps(plan, indent=1))
    return plan


def read_json(path: str | Path) -> dict:
    """A JSON file of this folder; ValueError naming the file when it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _mark(out: Path, unit: int) -> Path:
    return out / "units" / f"{unit:05d}.json"


def shard_name(plan: dict, unit: int) -> str:
    """Path of a unit's shard inside the folder."""
    return f"shards/{plan['units'][unit]['source']:02d}-{unit:05d}"


def signature_units(plan: dict, out: str | Path) -> list[int]:
    """Units whose documents still need a signature; empty without deduplication."""
    if plan["deduplicate"] == "none" or (Path(out) / "dropped.npz").exists():
        return []
    return [unit for unit in range(len(plan["units"])) if not _signatures(Path(out), unit).exists()]


def token_units(plan: dict, out: str | Path) -> list[int]:
    """Units that are not finished."""
    return [unit for unit in range(len(plan["units"])) if not _mark(Path(out), unit).exists()]


def _signatures(out: Path, unit: int) -> Path:
    return out / "signatures" / f"{unit:05d}.npy"


def _documents(plan: dict, unit: int, bad: list[str]) -> Iterator[Any]:
    work = plan["units"][unit]
    spec = SourceSpec(**plan["sources"][work["source"]])
    return read_unit(spec, work, bad.append) if plan["skip_bad"] else read_unit(spec, work)


def _save_array(path: Path, save: Callable[[Any], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        save(file)
    os.replace(temporary, path)


def write_signatures(out: str | Path, unit: int) -> None:
    """First pass of one unit: a signature per document, in order."""
    out = Path(out)
    path = _signatures(out, unit)
    if path.exists() or (out / "dropped.npz").exists():
        return
    plan = read_json(out / "plan.json")
    near = plan["deduplicate"] == "near"
    sign = near_signature if near else exact_signature
    rows = [sign(document.text) for document in _documents(plan, unit, [])]
    width = 112 if near else 2
    signatures = np.array(rows, dtype=np.uint64).reshape(len(rows), width)
    _save_array(path, lambda file: np.save(file, signatures))


def decide_duplicates(out: str | Path) -> None:
    """Between the passes: write which documents of which unit repeat an earlier document."""
    out = Path(out)
    plan = read_json(out / "plan.json")
    if plan["deduplicate"] == "none" or (out / "dropped.npz").exists():
        return
    signatures = [np.load(_signatures(out, unit)) for unit in range(len(plan["units"]))]
    repeated = duplicates(np.concatenate(signatures), near=plan["deduplicate"] == "near")
    ends = np.cumsum([len(one) for one in signatures])
    dropped = {f"unit{unit}": np.flatnonzero(part) for unit, part in enumerate(np.split(repeated, ends[:-1]))}
    _save_array(out / "dropped.npz", lambda file: np.savez(file, allow_pickle=False, **dropped))


def encode_unit(out: str | Path, unit: int, tokenizer: Any, threads: int = 1) -> None:
    """Second pass of one unit: encode its documents, write the shard and, last, the mark."""
    out = Path(out)
    if _mark(out, unit).exists():
        return
    plan = read_json(out / "plan.json")
    if plan["tokenizer"] != tokenizer_hash(tokenizer):
        raise ValueError(f"{out} is being prepared with another tokenizer")
    dropped: set[int] = set()
    if plan["deduplicate"] != "none":
        with np.load(out / "dropped.npz") as file:
            dropped = set(file[f"unit{unit}"].tolist())
    bad: list[str] = []
    total = 0

    def kept() -> Iterator[Any]:
        nonlocal total
        for number, document in enumerate(_documents(plan, unit, bad)):
            if number not in dropped:
                total = content_sum(total, document_sum(document.key, document.text))
                yield document

    documents, tokens, size = write_shard(
        out / shard_name(plan, unit), encoded(kept(), tokenizer, threads), np.dtype(plan["dtype"])
    )
    finished = {
        "unit": unit,
        "documents": documents,
        "tokens": tokens,
        "bytes": size,
        "duplicates": len(dropped),
        "skipped": len(bad),
        "first_skipped": bad[:3],
        "content_sha256": content_hex(total),
    }
    write_text_atomically(_mark(out, unit), json.dumps(finished))


def encoded(documents: Iterator[Any], tokenizer: Any, threads: int = 1) -> Iterator[tuple[int, int, np.ndarray]]:
    """(key hash, bytes, token ids (n,)) of documents, encoded in batches of about a megabyte."""
    batch: list[Any] = []
    characters = 0

    def flush() -> Iterator[tuple[int, int, np.ndarray]]:
        texts = [document.text for document in batch]
        for document, ids in zip(batch, tokenizer.encode_batch_ordinary(texts, threads), strict=True):
            yield key_hash(document.key), len(document.text.encode("utf-8", "replace")), np.array(ids, np.uint32)

    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= _BATCH_CHARACTERS:
            yield from flush()
            batch, characters = [], 0
    if batch:
        yield from flush()


def finish(out: str | Path) -> dict:
    """When every unit is finished: write `manifest.json` and `report.json`; returns the report."""
    out = Path(out)
    plan = read_json(out / "plan.json")
    if left := token_units(plan, out):
        raise RuntimeError(f"{len(left)} of {len(plan['units'])} units are not finished; run the same command again")
    marks = [read_json(_mark(out, unit)) for unit in range(len(plan["units"]))]
    sources = []
    for number, described in enumerate(plan["sources"]):
        own = [mark for mark in marks if plan["units"][mark["unit"]]["source"] == number]
        total = 0
        for mark in own:
            total = content_sum(total, int(mark["content_sha256"], 16))
        counts = {key: sum(mark[key] for mark in own) for key in _COUNTS}
        if counts["documents"] == 0:
            raise ValueError(f"source {described['name']!r} is an empty corpus: it holds no documents")
        sources.append({
            **described,
            **counts,
            "content_sha256": content_hex(total),
            "shards": [shard_name(plan, mark["unit"]) for mark in own if mark["documents"]],
        })  # fmt: skip
    manifest = {key: plan[key] for key in ("format", "tokenizer", "dtype", "deduplicate")}
    write_text_atomically(out / "manifest.json", json.dumps({**manifest, "sources": sources}, indent=1))
    report = share_report(sources)
    write_text_atomically(out / "report.json", json.dumps(report, indent=1))
    for leftover in out.rglob("*.tmp-*"):  # of killed processes
        leftover.unlink(missing_ok=True)
    return report


_COUNTS = ("documents", "tokens", "bytes", "duplicates", "skipped")


def share_report(sources: list[dict]) -> dict:
    """Documents, tokens and bytes of each source, its share of all tokens, its target share of training tokens, and how
    often it comes round while the training reads as many tokens as all sources hold."""
    targets = iter(target_shares([source for source in sources if not source.get("validation_only")]))
    total = {key: sum(source.get(key, 0) for source in sources) for key in _COUNTS}
    rows = []
    for source in sources:
        target = None if source.get("validation_only") else next(targets)
        share = source["tokens"] / max(1, total["tokens"])
        rows.append({
            "name": source["name"],
            "kind": source["kind"],
            **{key: source.get(key, 0) for key in _COUNTS},
            "share": share,
            "target_share": target,
            "epochs_per_total": target / share if share and target else None,
        })  # fmt: skip
    return {"sources": rows, "total": total}


def target_shares(sources: list[dict]) -> list[float]:
    """Target shares that sum to 1 (none for no sources).

    Sources without one take theirs by size when none has one, else the mean of the others.
    """
    if not sources:
        return []
    given = [source.get("share") for source in sources]
    if all(share is None for share in given):
        given = [source["tokens"] for source in sources]
    stated = [float(share) for share in given if share is not None]
    mean = sum(stated) / len(stated)
    shares = [mean if share is None else float(share) for share in given]
    return [share / sum(shares) for share in shares]


def prepare_shards(
    sources: list[SourceSpec],
    out: str | Path,
    load_tokenizer: LoadTokenizer,
    *,
    workers: int = 1,
    deduplicate: str = "none",
    skip_bad: bool = False,
    executor: str = "local",
    executor_options: dict | None = None,
    unit_bytes: int | None = None,
    progress: bool = True,
) -> dict | None:
    """Tokenise `sources` into shards under `out`; run again after an interruption, it continues.

    `load_tokenizer` must be picklable (every worker calls it once). Returns the report; None when a cluster took the
    work and will write it later. ValueError for bad input, and when `out` holds another preparation.
    """
    from . import executors

    if executor not in EXECUTORS:
        raise ValueError(f"executor must be one of {', '.join(EXECUTORS)}, got {executor!r}")
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    out = Path(out)
    plan = make_plan(sources, out, load_tokenizer(), deduplicate=deduplicate, skip_bad=skip_bad, unit_bytes=unit_bytes)
    if executor == "local":
        executors.run_locally(plan, out, load_tokenizer, workers, progress)
        return finish(out)
    return executors.run_datatrove(plan, out, load_tokenizer, executor, workers, executor_options or {})
