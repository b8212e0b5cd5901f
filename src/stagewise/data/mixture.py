"""Mixtures: which source the next piece comes from, by target share of tokens.

Design choices:
- No dice: the next piece comes from the source furthest behind its share, so the mix is deterministic and the
  achieved shares follow the targets within one piece per source. Tokens lost to cropping are given back.
- Each source has its own epochs: a small source with a large share simply comes round more often.
- A source's order is a permutation of its pieces keyed by (seed, source, epoch). Beyond a few million documents the
  permutation is made block by block (blocks of whole shards, themselves permuted), which bounds memory and keeps
  reads local.
- The position (epoch, block, place in the block) is the whole state.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .shards import Shard
from .splitting import derived_seed

BLOCK_DOCUMENTS = 1 << 22
_CHUNK = 1024


@dataclass(frozen=True)
class Piece:
    """A stretch of one document that fits a row: tokens [start, stop) of `document` in `shard`."""

    epoch: int
    shard: int
    document: int
    start: int
    stop: int
    key: int


class PieceOrder:
    """The endless, reshuffled order of one source's pieces.

    A document of more than `piece_tokens` tokens is several pieces; `masks` (one (N,) boolean array a shard) say which
    documents take part.
    """

    def __init__(self, name: str, shards: list[Shard], masks: list[np.ndarray], piece_tokens: int, seed: int):
        self.name = name
        self._shards = shards
        self._masks = masks
        self._piece_tokens = piece_tokens
        self._seed = seed
        self._blocks: list[list[int]] = []
        count = BLOCK_DOCUMENTS + 1
        for shard, mask in enumerate(masks):
            if not mask.any():
                continue
            if count + len(mask) > BLOCK_DOCUMENTS:
                self._blocks.append([])
                count = 0
            self._blocks[-1].append(shard)
            count += len(mask)
        if not self._blocks:
            raise ValueError(f"source {name!r} has no documents to read")
        self.epoch = 0
        self._block = 0
        self._position = 0
        self._chunk: list[Piece] = []
        self._chunk_at = 0
        self._enter_block()

    def _enter_block(self) -> None:
        """Lay out the pieces of the current block in their order for this epoch."""
        order = np.random.default_rng(derived_seed(self._seed, "blocks", self.name, self.epoch)).permutation(
            len(self._blocks)
        )
        block = int(order[self._block])
        shard_ids, documents, pieces = [], [], []
        for shard in self._blocks[block]:
            index = self._shards[shard].documents
            chosen = np.flatnonzero(self._masks[shard])
            shard_ids.append(np.full(len(chosen), shard))
            documents.append(chosen)
            pieces.append(np.maximum(1, -(-index["tokens"][chosen] // self._piece_tokens)))
        self._shard_of, self._document_of = np.concatenate(shard_ids), np.concatenate(documents)
        self._first_piece = np.concatenate([[0], np.cumsum(np.concatenate(pieces))])
        generator = np.random.default_rng(derived_seed(self._seed, "pieces", self.name, self.epoch, block))
        self._order = generator.permutation(int(self._first_piece[-1]))
        self._chunk = []
        self._chunk_at = 0

    def _read_chunk(self) -> None:
        """Turn the next stretch of the permutation into pieces."""
        chosen = self._order[self._position : self._position + _CHUNK]
        rows = np.searchsorted(self._first_piece, chosen, side="right") - 1
        starts = (chosen - self._first_piece[rows]) * self._piece_tokens
        shards, documents = self._shard_of[rows], self._document_of[rows]
        tokens, keys = np.empty(len(rows), np.int64), np.empty(len(rows), np.uint64)
        for shard in np.unique(shards):
            here = shards == shard
            index = self._shards[shard].documents[documents[here]]
            tokens[here], keys[here] = index["tokens"], index["key"]
        stops = np.minimum(starts + self._piece_tokens, tokens)
        columns = (shards, documents, starts, stops, keys)
        self._chunk = [Piece(self.epoch, *row) for row in zip(*(column.tolist() for column in columns), strict=True)]
        self._chunk_at = 0

    def next(self) -> Piece:
        """The next piece; after the last of an epoch comes the first of the next, reshuffled."""
        if self._position == len(self._order):
            self._position = 0
            self._block += 1
            if self._block == len(self._blocks):
                self._block = 0
                self.epoch += 1
            self._enter_block()
        if self._chunk_at == len(self._chunk):
            self._read_chunk()
        piece = self._chunk[self._chunk_at]
        self._chunk_at += 1
        self._position += 1
        return piece

    def finished(self, epochs: int) -> bool:
        """Whether `epochs` whole epochs have been read."""
        done_this = self._block == len(self._blocks) - 1 and self._position == len(self._order)
        return self.epoch + done_this >= epochs

    def ids(self, piece: Piece) -> np.ndarray:
        """Token ids of a piece (n,)."""
        return self._shards[piece.shard].ids(piece.document, piece.start, piece.stop)

    def document_ids(self, piece: Piece) -> np.ndarray:
        """Token ids of the whole document of a piece (n,)."""
        return self._shards[piece.shard].ids(piece.document)

    def piece(self, epoch: int, shard: int, document: int, start: int, stop: int) -> Piece:
        """The piece with these coordinates, as a saved state names it."""
        return Piece(epoch, shard, document, start, stop, int(self._shards[shard].documents["key"][document]))

    def state_dict(self) -> dict:
        """The position, as plain integers."""
        return {"epoch": self.epoch, "block": self._block, "position": self._position}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a position saved by `state_dict`."""
        self.epoch, self._block = int(state["epoch"]), int(state["block"])
        self._enter_block()
        self._position = int(state["position"])


class Mixture:
    """Chooses sources by target share of tokens: always the one furthest behind."""

    def __init__(self, shares: list[float]):
        total = sum(shares)
        self.shares = [share / total for share in shares]
        self.placed = [0] * len(shares)

    def next(self) -> int:
        """Index of the source that the next piece comes from."""
        return min(range(len(self.shares)), key=lambda source: (self.placed[source] / self.shares[source], source))

    def add(self, source: int, tokens: int) -> None:
        """Count `tokens` (negative to give back) for `source`."""
        self.placed[source] += tokens
