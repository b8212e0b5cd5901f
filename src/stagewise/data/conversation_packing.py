"""Conversations as rows of tokens: rendered with a loss mask, shortened to the context, packed by best fit.

Design choices:
- The tokenizer renders (special-token text in a content is plain text there, always); this file only counts and cuts.
- What does not fit loses its oldest exchanges, then the beginning of the user's text; the assistant's turn stays whole.
- Rows hold T + 1 tokens and whole conversations only; what is left over is bos padding without loss.
- The packer's position is a count and a short list of indices, so a run resumes bit-identically.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stagewise.modeling.byte_encoding import USER_END

from .conversation_shapes import ConversationError, Messages

IGNORED = -1  # target of a position without loss
LONG_TURNS = ("error", "cut", "skip")


@dataclass(frozen=True)
class Rendered:
    """One conversation as tokens: `ids` and `mask` (n,), mask 1 where a token is to be learnt."""

    ids: np.ndarray  # int64
    mask: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.ids)


def render(tokenizer: Any, messages: Messages, limit: int, long_turns: str = "error") -> Rendered | None:
    """Render `messages` into at most `limit` tokens.

    Too long: the oldest exchanges go first, then the beginning of the (system and) user text. When the last assistant
    turn does not fit by itself, `long_turns` decides: error raises ConversationError, cut shortens it (its end token is
    lost), skip returns None.
    """
    if long_turns not in LONG_TURNS:
        raise ValueError(f"long_turns must be one of {', '.join(LONG_TURNS)}, not {long_turns!r}")
    system = messages[:1] if messages[0]["role"] == "system" else []
    turns = list(messages[len(system) :])
    while turns and turns[-1]["role"] == "user":  # nothing follows it: nothing to learn
        turns.pop()
    ids, mask = tokenizer.render_conversation([*system, *turns])
    while len(ids) > limit and len(turns) > 2:
        turns = turns[2:]
        ids, mask = tokenizer.render_conversation([*system, *turns])
    if len(ids) > limit:
        fitted = _fit_exchange(tokenizer, list(ids), list(mask), limit, long_turns)
        if fitted is None:
            return None
        ids, mask = fitted
    return Rendered(np.asarray(ids, dtype=np.int64), np.asarray(mask, dtype=bool))


def _fit_exchange(
    tokenizer: Any, ids: list[int], mask: list[int], limit: int, long_turns: str
) -> tuple[list[int], list[int]] | None:
    """Shorten one exchange: bos, user_start, user text, user_end, assistant_start, assistant text, assistant_end."""
    head = 2
    user_end = ids.index(tokenizer.special_ids[USER_END])
    around = head + len(ids) - user_end  # all but the user's text
    room = limit - around
    if room < 1:
        if long_turns == "skip":
            return None
        if long_turns == "error":
            raise ConversationError(
                f"the assistant's turn is longer than the context: {around} tokens with its frame, {limit} allowed; "
                "use a longer sequence_length, or long_turns: cut or skip"
            )
        room = min(user_end - head, max(1, limit // 4))
    keep = list(range(head)) + list(range(user_end - room, len(ids)))
    keep = keep[:limit]
    return [ids[i] for i in keep], [mask[i] for i in keep]


class ConversationPacker:
    """Endless rows (ids (T + 1,), mask (T + 1,)) from conversations in a seeded order, a new order each epoch.

    Each row takes the longest waiting conversation that still fits, out of `buffer` waiting ones; the rest of the row
    is padding. `rank` of `world` gets every world-th row. `state_dict` and `load_state_dict` save and restore the
    position.
    """

    def __init__(
        self,
        mixture: Any,
        entries: np.ndarray,
        tokenizer: Any,
        row_tokens: int,
        *,
        seed: int = 42,
        buffer: int = 128,
        long_turns: str = "error",
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.mixture, self.entries, self.tokenizer = mixture, entries, tokenizer
        self.row_tokens, self.seed, self.buffer_size = row_tokens, seed, buffer
        self.long_turns, self.shuffle = long_turns, shuffle
        self.rank, self.world = rank, world
        self.pad_id = int(tokenizer.bos_token_id)
        self.position = 0  # conversations taken so far, over all epochs
        self.waiting: list[tuple[int, Rendered]] = []  # (position, rendered), oldest first
        self.tokens = self.padding = self.left_out = 0
        self._epoch, self._order = -1, np.arange(len(entries))

    @property
    def epoch(self) -> float:
        """Passes over the conversations so far."""
        return (self.position - len(self.waiting)) / len(self.entries)

    def _render(self, position: int) -> Rendered | None:
        epoch, index = divmod(position, len(self.entries))
        if epoch != self._epoch:
            self._epoch = epoch
            rng = np.random.default_rng([self.seed, epoch])
            self._order = rng.permutation(len(self.entries)) if self.shuffle else np.arange(len(self.entries))
        messages = self.mixture.conversation(self.entries[self._order[index]])
        return render(self.tokenizer, messages, self.row_tokens, self.long_turns)

    def _fill(self, end: int | None) -> None:
        misses = 0
        while len(self.waiting) < self.buffer_size and (end is None or self.position < end):
            rendered = self._render(self.position)
            if rendered is None:
                self.left_out += 1
                misses += 1
                if misses > len(self.entries):
                    raise ConversationError(f"no conversation fits into {self.row_tokens} tokens; use a longer context")
            else:
                misses = 0
                self.waiting.append((self.position, rendered))
            self.position += 1

    def next_row(self, end: int | None = None) -> tuple[np.ndarray, np.ndarray] | None:
        """The next row; None once `end` conversations have been packed."""
        self._fill(end)
        if not self.waiting:
            return None
        ids = np.full(self.row_tokens, self.pad_id, dtype=np.int64)
        mask = np.zeros(self.row_tokens, dtype=bool)
        used = 0
        while True:
            room = self.row_tokens - used
            best = -1
            for place, (_, item) in enumerate(self.waiting):
                if len(item) <= room and (best < 0 or len(item) > len(self.waiting[best][1])):
                    best = place
            if best < 0:
                break
            _, item = self.waiting.pop(best)
            ids[used : used + len(item)] = item.ids
            mask[used : used + len(item)] = item.mask
            used += len(item)
            self._fill(end)
        self.tokens += used
        self.padding += self.row_tokens - used
        return ids, mask

    def rows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every conversation once, packed."""
        while (row := self.next_row(end=len(self.entries))) is not None:
            yield row

    def next_batch(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets (rows, T) of this rank; -1 marks targets without loss."""
        packed = [self.next_row() for _ in range(rows * self.world)]
        return batch([row for row in packed[self.rank :: self.world] if row is not None])

    def state_dict(self) -> dict[str, Any]:
        """The position, small and JSON-able."""
        return {
            "position": self.position,
            "waiting": [position for position, _ in self.waiting],
            "conversations": len(self.entries),
            "tokens": self.tokens,
            "padding": self.padding,
            "left_out": self.left_out,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken. Raises ValueError when the conversations are others."""
        if state["conversations"] != len(self.entries):
            raise ValueError(
                f"the position was saved over {state['conversations']} conversations and there are "
                f"{len(self.entries)} now: resume with the data the run began with"
            )
        self.position = int(state["position"])
        self.tokens, self.padding, self.left_out = state["tokens"], state["padding"], state["left_out"]
        self.waiting = []
        for position in state["waiting"]:
            rendered = self._render(int(position))
            assert rendered is not None, "a waiting conversation fitted when the state was saved"
            self.waiting.append((int(position), rendered))


def batch(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of T + 1 tokens as inputs and targets (B, T); the target of a masked token is -1."""
    ids = torch.from_numpy(np.stack([row[0] for row in rows]))  # (B, T + 1)
    mask = torch.from_numpy(np.stack([row[1] for row in rows]))  # (B, T + 1)
    return ids[:, :-1].contiguous(), ids[:, 1:].masked_fill(~mask[:, 1:], IGNORED).contiguous()
