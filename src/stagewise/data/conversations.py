"""Mixtures of conversations: sources read lazily, repeated by epochs, subsampled, held out and augmented, all from a
seed.

Design choices:
- A source is a sequence of records reached by index (a jsonl file keeps byte offsets, a hub set its Arrow table), so a
  mixture of millions is an array of (source, row, variant) and nothing else.
- Held-out conversations are chosen before epochs repeat anything: a conversation never stands on both sides.
- The greeting augmentation matches whole words. The reference matched prefixes, on the first user turn with the system
  text already in front, so "yo" met every "You are a helpful assistant": `reference_greetings` reproduces that. The
  published counts (631,840 -> 947,571) say that half of the matches were duplicated, hence the default share.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from .conversation_shapes import ConversationError, Messages, read_record

__all__ = [
    "ConversationError",
    "ConversationMixture",
    "ConversationSource",
    "KNOWN_SOURCES",
    "Messages",
    "add_greeting",
    "open_records",
]

GREETINGS = ("good afternoon", "good evening", "good morning", "greetings", "howdy", "hello", "hiya", "hey", "hi", "yo")
WHOLE_GREETING = re.compile(r"\s*(" + "|".join(GREETINGS) + r")(?!\w)", re.IGNORECASE)
PREFIX_GREETING = re.compile(r"\s*(" + "|".join(GREETINGS) + r")", re.IGNORECASE)

KNOWN_SOURCES: dict[str, dict[str, Any]] = {
    "embedded-tools": {"kind": "embedded"},
    "embedded-chat": {"kind": "embedded"},
    "smoltalk": {"kind": "hub", "repo": "HuggingFaceTB/smoltalk", "subset": "all", "shape": "messages"},
    "mmlu": {"kind": "hub", "repo": "cais/mmlu", "subset": "auxiliary_train", "shape": "choice"},
    "gsm8k": {"kind": "hub", "repo": "openai/gsm8k", "subset": "main", "shape": "gsm8k"},
    "mathinstruct": {"kind": "hub", "repo": "TIGER-Lab/MathInstruct", "shape": "instruction"},
    "codealpaca": {"kind": "hub", "repo": "sahil2801/CodeAlpaca-20k", "shape": "instruction"},
    "magicoder-evol": {"kind": "hub", "repo": "ise-uiuc/Magicoder-Evol-Instruct-110K", "shape": "instruction"},
    "glaive": {"kind": "hub", "repo": "glaiveai/glaive-function-calling-v2", "shape": "glaive"},
    "xlam": {"kind": "hub", "repo": "Salesforce/xlam-function-calling-60k", "shape": "xlam"},
}


@dataclass(frozen=True)
class ConversationSource:
    """Where conversations come from. `epochs` says how often each is seen (2.5: twice, and half of them once more).

    `kind`: embedded (`name` embedded-tools or embedded-chat, `count` conversations), jsonl, parquet (`path`, a glob is
    fine) or hub (`repo`, `subset`, `split`, `revision`). `invalid`: error, or skip records that are no conversation.
    """

    name: str
    kind: str = "jsonl"
    path: str | None = None
    repo: str | None = None
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    shape: str = "auto"
    epochs: float = 1.0
    limit: int | None = None
    count: int | None = None
    invalid: str = "error"

    def __post_init__(self) -> None:
        if self.kind not in ("embedded", "jsonl", "parquet", "hub"):
            raise ValueError(f"source {self.name!r}: kind {self.kind!r} is none of embedded, jsonl, parquet, hub")
        if self.epochs <= 0:
            raise ValueError(f"source {self.name!r}: epochs must be positive, not {self.epochs}")
        if self.invalid not in ("error", "skip"):
            raise ValueError(f"source {self.name!r}: invalid must be error or skip, not {self.invalid!r}")
        needed = {"jsonl": "path", "parquet": "path", "hub": "repo"}.get(self.kind)
        if needed and not getattr(self, needed):
            raise ValueError(f"source {self.name!r}: kind {self.kind} needs {needed!r}")

    @classmethod
    def parse(cls, entry: str | Mapping[str, Any] | ConversationSource | Any) -> ConversationSource:
        """A source from ``"gsm8k x4"``, a mapping of the fields, or any object that has them as attributes.

        A known name (`KNOWN_SOURCES`) fills in what is not said; a `path` replaces its hub repository by a local file.
        """
        if isinstance(entry, ConversationSource):
            return entry
        if isinstance(entry, str):
            match = re.fullmatch(r"\s*(\S+)(?:\s+x\s*(\d+(?:\.\d+)?))?\s*", entry)
            if not match or match[1] not in KNOWN_SOURCES:
                raise ValueError(
                    f"conversation source {entry!r} is not NAME or 'NAME xEPOCHS' with a known name "
                    f"({', '.join(KNOWN_SOURCES)}); give other sources as a mapping with 'name', 'kind' and 'path'"
                )
            given: dict[str, Any] = {"name": match[1], "epochs": float(match[2] or 1)}
        elif isinstance(entry, Mapping):
            given = dict(entry)
        else:
            given = {f.name: getattr(entry, f.name) for f in fields(cls) if getattr(entry, f.name, None) is not None}
        unknown = set(given) - {f.name for f in fields(cls)}
        if unknown:
            raise ValueError(f"conversation source {given.get('name')!r}: unknown key {sorted(unknown)[0]!r}")
        if "name" not in given:
            raise ValueError("a conversation source needs a 'name'")
        known = dict(KNOWN_SOURCES.get(given["name"], {}))
        given = {key: value for key, value in given.items() if value is not None}
        if given.get("path"):
            suffix = str(given["path"]).removesuffix(".gz")
            known = {"shape": known.get("shape", "auto")}
            given.setdefault("kind", "parquet" if suffix.endswith(".parquet") else "jsonl")
        return cls(**{**known, **given})


class _JsonLines(Sequence[Mapping[str, Any]]):
    """Records of jsonl files, found by byte offset; compressed files and JSON arrays are held in memory."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = list(paths)
        self.held: list[Mapping[str, Any]] = []
        places: list[tuple[int, int]] = []
        for number, path in enumerate(self.paths):
            if path.suffix == ".gz":
                with gzip.open(path, "rb") as stream:
                    self._hold(stream.read(), path, places)
                continue
            with open(path, "rb") as stream:
                if stream.read(1) == b"[":
                    self._hold(b"[" + stream.read(), path, places)
                    continue
                stream.seek(0)
                offset = 0
                for line in stream:
                    if line.strip():
                        places.append((number, offset))
                    offset += len(line)
        self.places = np.array(places, dtype=np.int64).reshape(-1, 2)

    def _hold(self, content: bytes, path: Path, places: list[tuple[int, int]]) -> None:
        try:
            if content[:1] == b"[":
                records = json.loads(content)
            else:
                records = [json.loads(line) for line in content.splitlines() if line.strip()]
        except ValueError as error:
            raise ConversationError(f"{path}: not JSON: {error}") from None
        for record in records:
            places.append((-1, len(self.held)))
            self.held.append(record)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        number, offset = map(int, self.places[index])
        if number < 0:
            return self.held[offset]
        with open(self.paths[number], "rb") as stream:
            stream.seek(offset)
            line = stream.readline()
        try:
            return json.loads(line)
        except ValueError as error:
            raise ConversationError(f"{self.paths[number]}, record {index}: not JSON: {error}") from None


class _Table(Sequence[Mapping[str, Any]]):
    """Records of an Arrow table."""

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, index: Any) -> Any:
        return self.table.slice(int(index), 1).to_pylist()[0]


def _paths(source: ConversationSource) -> list[Path]:
    pattern = Path(str(source.path)).expanduser()
    if any(mark in str(pattern) for mark in "*?["):
        root = Path(pattern.anchor or ".")
        found = sorted(root.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern)))
    else:
        found = [pattern] if pattern.is_file() else []
    if not found:
        raise FileNotFoundError(f"source {source.name!r}: no file at {source.path}")
    return found


def open_records(source: ConversationSource, seed: int = 42) -> Sequence[Mapping[str, Any]]:
    """The records of `source`, by index. Raises ValueError or FileNotFoundError naming the source when there are
    none."""
    records: Sequence[Mapping[str, Any]]
    if source.kind == "embedded":
        from . import embedded_tools

        makers = {"embedded-tools": embedded_tools.tool_records, "embedded-chat": embedded_tools.chat_records}
        if source.name not in makers:
            raise ValueError(f"source {source.name!r}: the embedded sets are {', '.join(makers)}")
        records = makers[source.name](count=source.count, seed=seed, split=source.split)
    elif source.kind == "jsonl":
        records = _JsonLines(_paths(source))
    elif source.kind == "parquet":
        try:
            import pyarrow.parquet
        except ImportError:
            raise ValueError(f"source {source.name!r}: parquet needs pyarrow: pip install 'stagewise[data]'") from None
        import pyarrow

        tables = [pyarrow.parquet.read_table(path) for path in _paths(source)]
        records = _Table(pyarrow.concat_tables(tables, promote_options="default"))
    else:
        records = _open_hub(source)
    if len(records) == 0:
        raise ValueError(f"source {source.name!r} is empty")
    return records


def _open_hub(source: ConversationSource) -> Sequence[Mapping[str, Any]]:
    try:
        import datasets
    except ImportError:
        raise ValueError(f"source {source.name!r}: the hub needs datasets: pip install 'stagewise[data]'") from None
    try:
        return datasets.load_dataset(source.repo, source.subset, split=source.split, revision=source.revision)
    except Exception as error:
        raise ValueError(
            f"source {source.name!r}: {source.repo} could not be loaded from the hub "
            f"({type(error).__name__}: {error}); give the source a 'path' to use a local file"
        ) from None


def add_greeting(messages: Messages, rng: random.Random, reference: bool = False) -> Messages | None:
    """The conversation with the greeting that opens its first user turn in another case, or None if there is none.

    `reference` matches prefixes, on the system text and the turn together, as the released specialists were trained.
    """
    first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if first is None or not isinstance(messages[first]["content"], str):
        return None
    target = 0 if reference and messages[0]["role"] == "system" else first
    text = messages[target]["content"]
    match = (PREFIX_GREETING if reference else WHOLE_GREETING).match(text)
    if not match:
        return None
    word = match[1]
    variants = [v for v in dict.fromkeys((word.lower(), word.upper(), word.capitalize())) if v != word]
    changed = text[: match.start(1)] + rng.choice(variants) + text[match.end(1) :]
    return [{**message, "content": changed} if i == target else message for i, message in enumerate(messages)]


@dataclass
class ConversationMixture:
    """Train and held-out conversations from several sources.

    `limit` subsamples the repeated conversations; `held_out` distinct ones are kept apart; `greetings` is the share of
    conversations that open with a greeting and get a re-cased copy. Everything follows from `seed`. Entries are rows
    (source, record, variant) of an int64 array, variant 1 being the re-cased copy.
    """

    sources: Sequence[Any]
    seed: int = 42
    held_out: int = 0
    limit: int | None = None
    greetings: float = 0.0
    reference_greetings: bool = False
    train: np.ndarray = field(init=False)  # (N, 3)
    validation: np.ndarray = field(init=False)  # (held_out, 3)
    skipped: dict[str, int] = field(init=False, default_factory=dict)
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        self.specs = [ConversationSource.parse(entry) for entry in self.sources]
        if not self.specs:
            raise ValueError("a mixture needs at least one conversation source")
        self.records = [open_records(spec, self.seed) for spec in self.specs]
        rng = np.random.default_rng(self.seed)
        order = rng.permutation(self._repeated(rng))
        if self.held_out < 0 or (self.limit is not None and self.limit <= 0):
            raise ValueError("held_out must not be negative and limit must be positive")
        chosen: dict[tuple[int, int], None] = {}
        for source, row in reversed(order.tolist()):
            if len(chosen) == self.held_out:
                break
            chosen[(source, row)] = None
        kept = [pair for pair in order.tolist() if tuple(pair) not in chosen] if chosen else order.tolist()
        if len(chosen) < self.held_out or not kept:
            distinct = len({tuple(pair) for pair in order.tolist()})
            raise ValueError(f"held_out={self.held_out} leaves nothing to train on: {distinct} distinct conversations")
        entries = self._readable(kept, self.limit)
        held = self._readable([list(pair) for pair in chosen], None)
        if not entries or (self.held_out and not held):
            raise ValueError("no usable conversation is left: every record was skipped as invalid")
        self.validation = np.array([(s, r, 0) for s, r in held], dtype=np.int64).reshape(-1, 3)
        extended = [(s, r, 0) for s, r in entries]
        if self.greetings > 0:
            extended += self._greeted(entries)
        self.train = rng.permutation(np.array(extended, dtype=np.int64).reshape(-1, 3))

    def _repeated(self, rng: np.random.Generator) -> np.ndarray:
        parts = []
        for number, (spec, records) in enumerate(zip(self.specs, self.records, strict=True)):
            rows = np.arange(len(records))
            if spec.limit is not None and spec.limit < len(rows):
                rows = np.sort(rng.permutation(rows)[: spec.limit])
            whole = int(spec.epochs)
            rest = rng.permutation(rows)[: round((spec.epochs - whole) * len(rows))]
            rows = np.concatenate([np.tile(rows, whole), rest])
            parts.append(np.stack([np.full(len(rows), number), rows], axis=1))
        return np.concatenate(parts)

    def _readable(self, pairs: list[list[int]], limit: int | None) -> list[tuple[int, int]]:
        """The first `limit` of `pairs` that are conversations. Sources that do not skip are not read ahead."""
        out: list[tuple[int, int]] = []
        bad: set[tuple[int, int]] = set()
        for source, row in pairs:
            if limit is not None and len(out) == limit:
                break
            if self.specs[source].invalid == "skip":
                if (source, row) in bad:
                    continue
                try:
                    self._read(source, row)
                except ConversationError:
                    bad.add((source, row))
                    name = self.specs[source].name
                    self.skipped[name] = self.skipped.get(name, 0) + 1
                    continue
            out.append((source, row))
        return out

    def _greeted(self, entries: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
        chance = random.Random(f"{self.seed} greetings")
        out = []
        for source, row in entries:
            copy = add_greeting(self._read(source, row), random.Random(0), self.reference_greetings)
            if copy is not None and chance.random() < self.greetings:
                out.append((source, row, 1))
        return out

    def _read(self, source: int, row: int) -> Messages:
        try:
            return read_record(self.records[source][int(row)], self.specs[source].shape)
        except ConversationError as error:
            raise ConversationError(
                f"source {self.specs[source].name!r}, record {row}: {error} ('invalid: skip' leaves such records out)"
            ) from None

    def conversation(self, entry: Sequence[int]) -> Messages:
        """The messages of one entry of `train` or `validation`. Raises ConversationError naming source and record."""
        source, row, variant = (int(value) for value in entry)
        messages = self._read(source, row)
        if variant:
            rng = random.Random(f"{self.seed} {source} {row}")
            messages = add_greeting(messages, rng, self.reference_greetings) or messages
        return messages

    def summary(self) -> dict[str, Any]:
        """Conversations per source and in all, for logs and model configs."""
        counts = {spec.name: int((self.train[:, 0] == number).sum()) for number, spec in enumerate(self.specs)}
        return {
            "conversations": len(self.train),
            "held_out": len(self.validation),
            "greeting_copies": int(self.train[:, 2].sum()),
            "per_source": counts,
            "skipped": dict(self.skipped),
        }

    def __iter__(self) -> Iterator[Messages]:
        return (self.conversation(entry) for entry in self.train)
