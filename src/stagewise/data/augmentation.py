"""Case augmentation: now and then a document is seen in lower or in upper case.

Design choices:
- The choice is a pure function of (seed, epoch, document), so every rank and every resumed run sees the same text.
- It works on tokens: the piece of a document that a row needs is decoded, recased and encoded again, so prepared
  shards serve every probability and every epoch draws anew. Bytes are kept together across token boundaries: nothing
  is lost.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from .splitting import derived_seed, uniform

LOWER_SHARE = 0.8  # of the augmented documents (model card); the others are uppercased


class Tokenizer(Protocol):
    """What the data room asks of a tokenizer."""

    bos_token_id: int
    vocab_size: int

    def encode_ordinary(self, text: str) -> list[int]: ...
    def decode_bytes(self, ids: list[int]) -> bytes: ...


def recase(text: str, case: str) -> str:
    """`text` in the case "plain", "lower" or "upper"."""
    return text.lower() if case == "lower" else text.upper() if case == "upper" else text


class CaseAugmentation:
    """Chooses the case of documents and recases pieces of them.

    `probability` per document; of those 80% are lowercased and 20% uppercased.
    """

    def __init__(self, probability: float, seed: int, tokenizer: Tokenizer):
        if not 0.0 <= probability <= 1.0:
            raise ValueError(f"case_augmentation must lie between 0 and 1, got {probability}")
        self.probability = probability
        self.seed = seed
        self._tokenizer = tokenizer

    def cases(self, keys: np.ndarray, epoch: int) -> np.ndarray:
        """Per document key (N,): 0 plain, 1 lower, 2 upper, as int8 (N,)."""
        draw = uniform(keys, derived_seed(self.seed, "case", epoch))
        chosen = draw < self.probability
        upper = draw >= self.probability * LOWER_SHARE
        return np.where(chosen, np.where(upper, 2, 1), 0).astype(np.int8)

    def recased_ids(self, document: np.ndarray, start: int, stop: int, case: int) -> np.ndarray:
        """Token ids of tokens [start, stop) of `document` (n,) after recasing their text.

        A character whose bytes straddle `start` belongs to the piece before, one that straddles `stop` to this piece.
        """
        before = self._tokenizer.decode_bytes(document[start:stop].tolist())
        after = self._tokenizer.decode_bytes(document[stop : stop + 4].tolist())
        head = _continuation_bytes(before) if start > 0 else 0
        if head == len(before):  # nothing but the end of a character of the piece before
            return np.zeros(0, np.int64)
        raw = before[head:] + after[: _continuation_bytes(after)]
        text = recase(raw.decode("utf-8", "replace"), "lower" if case == 1 else "upper")
        return np.asarray(self._tokenizer.encode_ordinary(text), dtype=np.int64)


def _continuation_bytes(raw: bytes) -> int:
    """How many bytes at the start of `raw` continue a character begun earlier."""
    count = 0
    while count < len(raw) and raw[count] & 0xC0 == 0x80:
        count += 1
    return count
