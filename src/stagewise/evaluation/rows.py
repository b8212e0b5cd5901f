"""Documents as rows of tokens: every token of a document is predicted exactly once, with a leading bos, documents
never mixed.

Design choices:
- A document that fits the context is one row. A longer one is cut into rows of full length; its last row reaches back
  for a full context and scores only what is new: the windows lm-evaluation-harness uses, so the figures agree with it.
- Rows are padded on the right, where causal attention cannot look, and sorted by length a window of rows at a time.
- A manifest says which bytes were measured: source, documents, bytes, SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IGNORED = -1


@dataclass
class Batch:
    """Rows of several documents: `inputs` and `targets` (B, T), -1 = ignored, and the document each row is of (B,)."""

    inputs: Tensor
    targets: Tensor
    documents: Tensor


def windows(tokens: Sequence[int], bos: int, context: int) -> Iterator[tuple[list[int], list[int]]]:
    """Rows (inputs, targets) of at most `context` tokens in which each token of the document is a target once."""
    if context < 1:
        raise ValueError(f"context must be at least 1 token, got {context}")
    stream = [bos, *tokens]
    scored = 0
    while scored < len(tokens):
        end = min(scored + context, len(tokens))  # targets scored..end-1 are stream[scored+1 .. end]
        start = max(0, end - context)
        yield stream[start:end], [IGNORED] * (scored - start) + stream[scored + 1 : end + 1]
        scored = end


def pad_rows(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded (inputs, targets), each (B, T)."""
    width = max(len(inputs) for inputs, _ in rows)
    inputs = torch.full((len(rows), width), pad, dtype=torch.long)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.long)
    for i, (row, target) in enumerate(rows):
        inputs[i, : len(row)] = torch.tensor(row, dtype=torch.long)
        targets[i, : len(target)] = torch.tensor(target, dtype=torch.long)
    return inputs, targets


def document_batches(
    documents: Iterable[Sequence[int]], bos: int, context: int, *, batch_tokens: int = 8192, pool_rows: int = 256
) -> Iterator[Batch]:
    """Batches of about `batch_tokens` padded tokens over documents given as token ids without bos."""

    def flush(pool: list[tuple[int, list[int], list[int]]]) -> Iterator[Batch]:
        pool.sort(key=lambda row: len(row[1]))
        while pool:
            width = len(pool[-1][1])
            take = max(1, batch_tokens // width)
            rows = pool[-take:]
            del pool[-take:]
            inputs, targets = pad_rows([row[1:] for row in rows], bos)
            yield Batch(inputs, targets, torch.tensor([row[0] for row in rows]))

    pool: list[tuple[int, list[int], list[int]]] = []
    for index, tokens in enumerate(documents):
        pool.extend((index, *row) for row in windows(tokens, bos, context))
        if len(pool) >= pool_rows:
            yield from flush(pool)
    yield from flush(pool)


def take_documents(
    texts: Iterable[str], encode: Callable[[str], list[int]], tokens: int | None
) -> tuple[list[str], list[list[int]]]:
    """The first documents that hold `tokens` tokens together (the last one whole), as texts and as token ids."""
    kept, encoded, total = [], [], 0
    for text in texts:
        ids = encode(text)
        if not ids:
            continue
        kept.append(text)
        encoded.append(ids)
        total += len(ids)
        if tokens is not None and total >= tokens:
            break
    return kept, encoded


def manifest(source: str, texts: Sequence[str]) -> dict[str, Any]:
    """What was measured: source, number of documents, bytes, and the SHA-256 over the documents in order."""
    digest = hashlib.sha256()
    total = 0
    for text in texts:
        raw = text.encode("utf-8", errors="replace")
        digest.update(len(raw).to_bytes(8, "little") + raw)
        total += len(raw)
    return {"source": source, "documents": len(texts), "bytes": total, "sha256": digest.hexdigest()}
