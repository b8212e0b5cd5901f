"""Token shards: documents as one flat array of token ids on disk, mapped into memory.

Design choices:
- A shard NAME is two files: `NAME.bin`, the ids of all documents one after the other (uint16, or uint32 for a
  vocabulary above 65,536), and `NAME.docs.npy`, one record per document: offset, tokens, bytes of text, hash of its
  key.
- Beginning-of-text tokens are not stored: rows add them, so shards do not depend on the sequence length.
- Both files are written under temporary names and renamed; a shard counts only once its work unit is marked finished.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

DOCUMENT = np.dtype([("offset", "<i8"), ("tokens", "<i8"), ("bytes", "<i8"), ("key", "<u8")])


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest integer type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class Shard:
    """Documents as token ids: `tokens` (all ids, flat), `documents` (N,) of dtype DOCUMENT."""

    name: str
    tokens: np.ndarray
    documents: np.ndarray

    @classmethod
    def open(cls, path: str | Path, dtype: np.dtype) -> Shard:
        """Map the shard at `path` (without suffix) into memory; ValueError when a file was cut short."""
        path = Path(path)
        binary, index = path.with_name(path.name + ".bin"), path.with_name(path.name + ".docs.npy")
        for file in (binary, index):
            if not file.is_file():
                raise FileNotFoundError(f"token shard {file} is missing; prepare the data again")
        try:
            documents = np.load(index, mmap_mode="r")
        except ValueError as error:
            raise ValueError(f"token shard index {index} is damaged ({error}); prepare the data again") from None
        if documents.dtype != DOCUMENT:
            raise ValueError(f"{index} is not the index of a token shard")
        expected = int(documents["tokens"].sum()) * dtype.itemsize
        if binary.stat().st_size != expected:
            raise ValueError(
                f"token shard {binary} has {binary.stat().st_size:,} bytes where its index promises {expected:,}; "
                "delete it with the mark of its work unit and prepare the data again"
            )
        tokens = np.memmap(binary, dtype=dtype, mode="r") if expected else np.zeros(0, dtype)
        return cls(path.name, tokens, documents)

    @classmethod
    def from_documents(cls, name: str, documents: Iterable[tuple[int, int, np.ndarray]], dtype: np.dtype) -> Shard:
        """A shard in memory from (key hash, bytes, token ids (n,)) triples."""
        arrays, records, offset = [], [], 0
        for key, size, ids in documents:
            arrays.append(np.asarray(ids, dtype=dtype))
            records.append((offset, len(ids), size, key))
            offset += len(ids)
        tokens = np.concatenate(arrays) if arrays else np.zeros(0, dtype)
        return cls(name, tokens, np.array(records, dtype=DOCUMENT))

    def ids(self, document: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Token ids [start, stop) of one document (n,)."""
        record = self.documents[document]
        offset, count = int(record["offset"]), int(record["tokens"])
        stop = count if stop is None else min(stop, count)
        return self.tokens[offset + start : offset + stop]


def write_shard(
    path: str | Path, documents: Iterable[tuple[int, int, np.ndarray]], dtype: np.dtype
) -> tuple[int, int, int]:
    """Write (key hash, bytes, token ids (n,)) triples as the shard `path`; returns (documents, tokens, bytes)."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = f".tmp-{os.getpid()}"
    binary, index = path.with_name(path.name + ".bin"), path.with_name(path.name + ".docs.npy")
    new_binary, new_index = Path(str(binary) + temporary), Path(str(index) + temporary)
    records, offset, size_total = [], 0, 0
    try:
        with open(new_binary, "wb") as file:
            for key, size, ids in documents:
                file.write(np.ascontiguousarray(ids, dtype=dtype).tobytes())
                records.append((offset, len(ids), size, key))
                offset += len(ids)
                size_total += size
            file.flush()
            os.fsync(file.fileno())
        with open(new_index, "wb") as file:
            np.save(file, np.array(records, dtype=DOCUMENT))
            file.flush()
            os.fsync(file.fileno())
        os.replace(new_binary, binary)
        os.replace(new_index, index)
    finally:
        new_binary.unlink(missing_ok=True)
        new_index.unlink(missing_ok=True)
    return len(records), offset, size_total


def write_text_atomically(path: str | Path, text: str) -> None:
    """Write `text` under a temporary name and rename it: readers see the old file or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
