"""Sources: where documents come from, and how a source is cut into units of work.

Design choices:
- One frozen description (`SourceSpec`) for the embedded corpus, local files and Hugging Face datasets; a `hub` source
  with a `path` reads that local copy instead, so every published mix can be rebuilt from files.
- A unit of work is a small JSON-able dict; the same units are planned on every machine with the same files, whatever
  the number of workers. Large jsonl files are cut by byte range, parquet by row groups, hub datasets by their own
  shards.
- A missing file is an error before anything is written; bad records stop the work unless told to be skipped.
"""

from __future__ import annotations

import glob
import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .documents import Complaint, Document, parquet_groups, read_jsonl, read_parquet, read_text, stop, text_of
from .embedded import embedded_documents, embedded_names

KINDS = ("embedded", "text", "jsonl", "parquet", "hub")
_SUFFIXES = {
    "text": (".txt", ".text", ".md", ".rst"),
    "jsonl": (".jsonl", ".ndjson"),
    "parquet": (".parquet",),
}
_COMPRESSED = (".gz", ".zst")
SMALLEST_UNIT, LARGEST_UNIT = 1 << 20, 256 << 20  # bytes


@dataclass(frozen=True)
class SourceSpec:
    """One source of a mixture. `share` is its target share of the training tokens (None: by its size); a
    `validation_only` source is measured on under its name and never trained on."""

    name: str
    kind: str = "text"
    path: str | list[str] | None = None
    text_key: str | list[str] = "text"
    repo: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    share: float | None = 1.0
    train_only: bool = False
    validation_only: bool = False
    separator: str | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"source {self.name!r}: unknown kind {self.kind!r}; it is one of {', '.join(KINDS)}")
        if self.kind in _SUFFIXES and not self.path:
            raise ValueError(f"source {self.name!r}: kind {self.kind} needs a path (a file, a folder or a glob)")
        if self.kind == "hub" and not (self.repo or self.path):
            raise ValueError(f"source {self.name!r}: kind hub needs repo (a dataset's name) or path (a local copy)")
        if self.share is not None and not self.share > 0:
            raise ValueError(f"source {self.name!r}: share must be above 0, got {self.share}")

    @classmethod
    def of(cls, source: Any) -> SourceSpec:
        """From a recipe's source (an object or a dict with these fields; fields it lacks keep their defaults)."""
        if isinstance(source, cls):
            return source
        values: dict[str, Any] = {}
        for field in fields(cls):
            missing = source.get(field.name) if isinstance(source, dict) else getattr(source, field.name, None)
            if missing is not None:
                values[field.name] = str(missing) if isinstance(missing, Path) else missing
        if isinstance(source, dict) and (unknown := set(source) - {field.name for field in fields(cls)}):
            raise ValueError(f"source {source.get('name')!r}: unknown fields {', '.join(sorted(unknown))}")
        if "share" not in values:
            values["share"] = None
        return cls(**values)

    def as_dict(self) -> dict:
        """The description as plain JSON types."""
        return asdict(self)


def _static_root(pattern: str) -> Path:
    """The folder part of a glob before its first wildcard."""
    parts = Path(pattern).parts
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    return Path(*fixed) if fixed else Path(".")


def source_files(spec: SourceSpec) -> list[tuple[Path, str, str]]:
    """Files of a local source, sorted: (path, name relative to the source, kind); FileNotFoundError when none match."""
    patterns = [spec.path] if isinstance(spec.path, str) else list(spec.path or [])
    found: dict[str, tuple[Path, str, str]] = {}
    for number, pattern in enumerate(patterns):
        if Path(pattern).is_file():
            root, paths = Path(pattern).parent, [Path(pattern)]
        elif Path(pattern).is_dir():
            root = Path(pattern)
            paths = [path for path in sorted(root.rglob("*")) if path.is_file() and _kind_of(path, spec)]
        elif glob.has_magic(pattern):
            root = _static_root(pattern)
            paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]
        else:
            raise FileNotFoundError(f"source {spec.name!r}: no such file or folder: {pattern}")
        if not paths:
            what = f"no file matches {pattern}" if glob.has_magic(pattern) else f"{pattern} holds no {spec.kind} files"
            raise FileNotFoundError(f"source {spec.name!r}: {what}")
        for path in paths:
            kind = _kind_of(path, spec) or (spec.kind if spec.kind in _SUFFIXES else None)
            if kind is None:
                raise ValueError(f"source {spec.name!r}: the kind of {path} is not known from its name")
            prefix = f"{number}:" if len(patterns) > 1 else ""
            found.setdefault(str(path), (path, prefix + path.relative_to(root).as_posix(), kind))
    return [found[path] for path in sorted(found)]


def kind_of_name(name: str) -> str | None:
    """The kind of data that a file's name (or a glob) says: text, jsonl or parquet; None when it says none."""
    path = Path(name)
    suffix = Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix
    return next((kind for kind, suffixes in _SUFFIXES.items() if suffix in suffixes), None)


def _kind_of(path: Path, spec: SourceSpec) -> str | None:
    """The kind of a file that `spec` reads, from its name."""
    kind = kind_of_name(path.name)
    return kind if spec.kind in (kind, "hub") else None


def _load_hub(spec: SourceSpec) -> Any:
    try:
        import datasets
    except ImportError:
        raise RuntimeError(
            f"source {spec.name!r}: reading a Hugging Face dataset needs datasets: pip install 'stagewise[data]'"
        ) from None
    try:
        return datasets.load_dataset(
            spec.repo, name=spec.subset, split=spec.split, revision=spec.revision, streaming=True
        )
    except (ValueError, OSError, RuntimeError) as error:
        raise ValueError(
            f"source {spec.name!r}: dataset {spec.repo!r} (subset {spec.subset}, split {spec.split}) cannot be opened: "
            f"{error}; a local copy can replace it: set path"
        ) from None


def _is_remote(spec: SourceSpec) -> bool:
    return spec.kind == "hub" and not spec.path


def source_size(spec: SourceSpec) -> int:
    """Bytes of a local source's files (as stored); 0 for a remote one."""
    if spec.kind == "embedded":
        return sum(size for _, size in embedded_names())
    return 0 if _is_remote(spec) else sum(path.stat().st_size for path, _, _ in source_files(spec))


def plan_units(spec: SourceSpec, unit_bytes: int = 32 << 20) -> list[dict]:
    """Cut a source into units of about `unit_bytes` bytes, each a JSON-able dict for `read_unit`."""
    if _is_remote(spec):
        shards = 1 if spec.limit else int(getattr(_load_hub(spec), "num_shards", 1) or 1)
        return [{"hub_shard": shard, "of": shards, "bytes": 0} for shard in range(shards)]
    pieces: list[dict] = []
    if spec.kind == "embedded":
        pieces = [{"names": [name], "bytes": size} for name, size in embedded_names()]
    else:
        for path, name, kind in source_files(spec):
            status = path.stat()
            file = {"file": str(path), "name": name, "kind": kind, "bytes": status.st_size, "mtime": status.st_mtime_ns}
            pieces.extend(_file_pieces(path, file, kind, unit_bytes))
    if spec.limit:  # a limit counts documents from the start: one unit reads them in order
        return [_joined(pieces)]
    units: list[dict] = []
    gathered: list[dict] = []
    for piece in pieces:
        if gathered and sum(one["bytes"] for one in gathered) + piece["bytes"] > unit_bytes:
            units.append(_joined(gathered))
            gathered = []
        gathered.append(piece)
    return [*units, _joined(gathered)] if gathered else units


def _file_pieces(path: Path, file: dict, kind: str, unit_bytes: int) -> Iterator[dict]:
    size = file["bytes"]
    if kind == "jsonl" and path.suffix not in _COMPRESSED and size > unit_bytes:
        for start in range(0, size, unit_bytes):
            end = min(start + unit_bytes, size)
            yield {**file, "range": [start, end], "bytes": end - start}
    elif kind == "parquet" and size > unit_bytes:
        groups = parquet_groups(path)
        each = max(1, len(groups) * unit_bytes // size)
        for first in range(0, len(groups), each):
            last = min(first + each, len(groups))
            yield {**file, "range": [first, last], "bytes": size * (last - first) // len(groups)}
    else:
        yield file


def _joined(pieces: list[dict]) -> dict:
    size = sum(piece["bytes"] for piece in pieces)
    if pieces and "names" in pieces[0]:
        return {"names": [name for piece in pieces for name in piece["names"]], "bytes": size}
    return {"files": pieces, "bytes": size}


def read_unit(spec: SourceSpec, unit: dict, complain: Complaint = stop) -> Iterator[Document]:
    """Documents of one unit in order; bad records go to `complain`, which raises unless told to skip."""
    documents = _unit_documents(spec, unit, complain)
    return itertools.islice(documents, spec.limit) if spec.limit else documents


def _unit_documents(spec: SourceSpec, unit: dict, complain: Complaint) -> Iterator[Document]:
    if "names" in unit:
        yield from embedded_documents(unit["names"])
    elif "hub_shard" in unit:
        yield from _hub_documents(spec, unit, complain)
    for file in unit.get("files", []):
        path, name, kind = Path(file["file"]), file["name"], file["kind"]
        first, last = file.get("range", (0, None))
        if kind == "text":
            yield from read_text(path, name, spec.separator, complain)
        elif kind == "jsonl":
            yield from read_jsonl(path, name, spec.text_key, first, last, complain)
        else:
            yield from read_parquet(path, name, spec.text_key, (first, last) if last is not None else None, complain)


def _hub_documents(spec: SourceSpec, unit: dict, complain: Complaint) -> Iterator[Document]:
    stream = _load_hub(spec)
    if unit["of"] > 1:
        stream = stream.shard(num_shards=unit["of"], index=unit["hub_shard"])
    for row, record in enumerate(stream):
        place = f"{spec.repo} shard {unit['hub_shard']} row {row}"
        try:
            text = text_of(record, spec.text_key, place)
        except ValueError as error:
            if row == 0:
                raise
            complain(str(error))
            continue
        if text.strip():
            yield Document(f"{unit['hub_shard']}/{row}", text)


def read_source(spec: SourceSpec, complain: Complaint = stop) -> Iterator[Document]:
    """Every document of a source in order."""
    for unit in plan_units(spec):
        yield from read_unit(spec, unit, complain)
