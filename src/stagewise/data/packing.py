"""Packing: rows of T+1 tokens that begin with a beginning-of-text token, filled by best fit.

Design choices:
- A document longer than a row is cut beforehand into pieces of T tokens; each piece gets its own beginning-of-text
  token, so every row starts with one and no token of a long document is lost.
- Best fit over a bounded buffer of pieces: the largest that fits the space left; when none fits, the shortest is
  cropped to the space (its rest is dropped for this epoch and counted). A single place left over takes the
  beginning-of-text token that would have followed anyway, and costs nothing.
- Lengths decide, tokens are only copied for rows that somebody asked for: every rank packs the same rows and keeps
  the rows i with i % world_size == rank. The rows, and the state, do not depend on the number of ranks.
- The state is integers: positions of the sources, and the coordinates of the pieces in the buffer.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from typing import Any

import numpy as np
import torch

from .augmentation import CaseAugmentation
from .mixture import Mixture, Piece, PieceOrder

BUFFER_PIECES = 256


class RowPacker:
    """Packs an endless mixture of pieces into rows (T+1,).

    `orders` and `shares` per source; T = `sequence_length`. Not thread safe.
    """

    def __init__(
        self,
        orders: list[PieceOrder],
        shares: list[float],
        sequence_length: int,
        bos: int,
        augmentation: CaseAugmentation | None = None,
        buffer_pieces: int = BUFFER_PIECES,
    ):
        if sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {sequence_length}")
        if buffer_pieces < 1:
            raise ValueError(f"buffer_pieces must be at least 1, got {buffer_pieces}")
        self.sequence_length = sequence_length
        self._orders = orders
        self._mixture = Mixture(shares)
        self._bos = bos
        self._augmentation = augmentation if augmentation and augmentation.probability > 0 else None
        self._buffer_pieces = buffer_pieces
        # Sorted by (length with bos, arrival): [length, arrival, source, piece, part, recased ids or None]
        self._buffer: list[tuple[int, int, int, Piece, int, np.ndarray | None]] = []
        self._arrivals = 0
        self.rows = 0
        self.emitted = [0] * len(orders)
        self.cropped = [0] * len(orders)
        self.recased = 0
        self.drawn = 0

    def _parts(self, source: int, piece: Piece) -> list[np.ndarray | None]:
        """The piece's ids after augmentation, cut to fit rows; [None] when the piece stays as it is."""
        if self._augmentation is None:
            return [None]
        case = int(self._augmentation.cases(np.array([piece.key], np.uint64), piece.epoch)[0])
        if case == 0:
            return [None]
        document = self._orders[source].document_ids(piece)
        ids = self._augmentation.recased_ids(document, piece.start, piece.stop, case)
        return [ids[at : at + self.sequence_length] for at in range(0, len(ids), self.sequence_length)]

    def _draw(self) -> None:
        """Move the next piece of the mixture into the buffer."""
        source = self._mixture.next()
        piece = self._orders[source].next()
        for part, ids in enumerate(self._parts(source, piece)):
            length = 1 + (piece.stop - piece.start if ids is None else len(ids))
            insort(self._buffer, (length, self._arrivals, source, piece, part, ids))
            self._arrivals += 1
            self._mixture.add(source, length - 1)
            self.drawn += length - 1
            if ids is not None:
                self.recased += length - 1

    def _place(self, entry: tuple, place: int, length: int, row: np.ndarray | None) -> None:
        full, _, source, piece, _, ids = entry
        self.emitted[source] += length - 1
        if lost := full - length:
            self.cropped[source] += lost
            self._mixture.add(source, -lost)
        if row is not None:
            row[place] = self._bos
            text = self._orders[source].ids(piece) if ids is None else ids
            row[place + 1 : place + length] = text[: length - 1]

    def next_row(self, row: np.ndarray | None = None) -> None:
        """Pack the next row, writing its ids to `row` (T+1,) unless it is None."""
        buffer, place, end = self._buffer, 0, self.sequence_length + 1
        while place < end:
            while len(buffer) < self._buffer_pieces:
                self._draw()
            space = end - place
            if space == 1:
                if row is not None:
                    row[place] = self._bos
                break
            fits = bisect_right(buffer, (space + 1,)) - 1  # the last entry of at most `space` tokens
            if fits >= 0:
                length = buffer[fits][0]
                entry = buffer.pop(bisect_left(buffer, (length,)))  # of those, the one that waits longest
            else:
                length, entry = space, buffer.pop(0)
            self._place(entry, place, length, row)
            place += length
        self.rows += 1

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue exactly, as plain integers and lists."""
        return {
            "rows": self.rows,
            "arrivals": self._arrivals,
            "drawn": self.drawn,
            "recased": self.recased,
            "emitted": list(self.emitted),
            "cropped": list(self.cropped),
            "placed": list(self._mixture.placed),
            "sources": {order.name: order.state_dict() for order in self._orders},
            "buffer": [
                [arrival, source, piece.epoch, piece.shard, piece.document, piece.start, piece.stop, part]
                for _, arrival, source, piece, part, _ in self._buffer
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; the next rows are those that would have followed."""
        if set(state["sources"]) != {order.name for order in self._orders}:
            raise ValueError(
                f"the saved data position is for sources {sorted(state['sources'])}, "
                f"this mixture has {sorted(order.name for order in self._orders)}"
            )
        for order in self._orders:
            order.load_state_dict(state["sources"][order.name])
        self.rows, self._arrivals = int(state["rows"]), int(state["arrivals"])
        self.drawn, self.recased = int(state["drawn"]), int(state["recased"])
        self.emitted, self.cropped = list(state["emitted"]), list(state["cropped"])
        self._mixture.placed = list(state["placed"])
        self._buffer = []
        for arrival, source, epoch, shard, document, start, stop, part in state["buffer"]:
            piece = self._orders[source].piece(epoch, shard, document, start, stop)
            ids = self._parts(source, piece)[part]
            length = 1 + (piece.stop - piece.start if ids is None else len(ids))
            self._buffer.append((length, arrival, source, piece, part, ids))
        self._buffer.sort(key=lambda entry: entry[:2])


class BatchStream:
    """Training batches of one rank out of a `RowPacker`.

    Rank r of W gets the rows i with i % W == r; all ranks together see every row once, whatever W is.
    """

    def __init__(self, packer: RowPacker, rank: int = 0, world_size: int = 1, fingerprint: dict | None = None):
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..{world_size - 1}, got {rank}")
        self.packer = packer
        self.rank = rank
        self.world_size = world_size
        self._fingerprint = fingerprint or {}

    def next_batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `rows` rows of this rank: inputs (rows, T) and targets (rows, T), int64."""
        batch = np.empty((rows, self.packer.sequence_length + 1), np.int64)
        for row in range(rows * self.world_size):
            mine = row % self.world_size == self.rank
            self.packer.next_row(batch[row // self.world_size] if mine else None)
        ids = torch.from_numpy(batch)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        """The position in the data: the same on every rank after equally many batches, and usable with other ranks."""
        return {"fingerprint": dict(self._fingerprint), **self.packer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly after the saved position; ValueError when the data or its settings are others."""
        saved = state.get("fingerprint", {})
        for name in sorted(set(saved) | set(self._fingerprint)):
            if saved.get(name) != self._fingerprint.get(name):
                now = self._fingerprint.get(name)
                raise ValueError(
                    f"cannot continue: the data's {name} was {saved.get(name)!r} and is now {now!r}; "
                    "resume with the same data settings or start a new run"
                )
        self.packer.load_state_dict(state)


def padded_rows(pieces: list[np.ndarray], sequence_length: int, bos: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pack pieces (each at most T ids) whole, best fit over all of them, for evaluation.

    Returns inputs (N, T) and targets (N, T): a piece's every id is a target once; targets of padding and of the
    beginning-of-text tokens between pieces are -1. Rows stand in the order of their first piece.
    """
    width = sequence_length + 1
    waiting = sorted((1 + len(ids), number) for number, ids in enumerate(pieces))
    taken = [False] * len(pieces)
    rows: list[list[int]] = []
    for number, ids in enumerate(pieces):
        if taken[number]:
            continue
        row, space = [number], width - 1 - len(ids)
        taken[number] = True
        waiting.pop(bisect_left(waiting, (1 + len(ids), number)))
        while space >= 2 and (fits := bisect_right(waiting, (space + 1,)) - 1) >= 0:
            entry = waiting.pop(bisect_left(waiting, (waiting[fits][0],)))
            row.append(entry[1])
            taken[entry[1]] = True
            space -= entry[0]
        rows.append(row)
    inputs = np.full((len(rows), sequence_length), bos, np.int64)
    targets = np.full((len(rows), sequence_length), -1, np.int64)
    for at, row in enumerate(rows):
        place = 0
        for number in row:
            ids, length = pieces[number], len(pieces[number])
            inputs[at, place] = bos
            inputs[at, place + 1 : place + length + 1] = ids[: sequence_length - place - 1]
            targets[at, place : place + length] = ids
            place += length + 1
    return torch.from_numpy(inputs), torch.from_numpy(targets)
