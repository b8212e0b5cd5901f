"""Hashes that decide, reproducibly, what happens to a document.

Design choices:
- A document is known by the 64-bit hash of its key (its name inside the source), stored in the shard's index.
- Every decision (validation or train, case augmentation, order) is a pure function of (seed, hash), so it can be
  taken when the tokens are read: one set of shards serves every seed and every validation fraction.
- `content_sum` identifies the content of a corpus whatever the order or the division of the work.
"""

from __future__ import annotations

import hashlib

import numpy as np

_MASK_256 = (1 << 256) - 1


def key_hash(key: str) -> int:
    """The 64-bit hash of a document's key."""
    return int.from_bytes(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def derived_seed(*parts: object) -> int:
    """A 64-bit seed from any printable parts, for example `derived_seed(seed, "order", source, epoch)`."""
    return key_hash("\x1f".join(str(part) for part in parts))


def scramble(values: np.ndarray, salt: int) -> np.ndarray:
    """Well-mixed 64-bit hashes of `values` (N,) under `salt` (the finaliser of SplitMix64)."""
    mixed = np.asarray(values, dtype=np.uint64) ^ np.uint64(salt)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def uniform(values: np.ndarray, salt: int) -> np.ndarray:
    """Numbers in [0, 1), one per hash in `values` (N,), float64."""
    return (scramble(values, salt) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def validation_masks(keys: list[np.ndarray], seed: int, fraction: float) -> list[np.ndarray]:
    """Which documents of one source are held out: boolean masks (N,), one per shard.

    A source with two documents or more gets at least one on each side; a single document is for training.
    """
    if not 0.0 <= fraction < 1.0:
        raise ValueError(f"validation_fraction must be at least 0 and below 1, got {fraction}")
    salt = derived_seed(seed, "validation")
    draws = [uniform(shard_keys, salt) for shard_keys in keys]
    masks = [draw < fraction for draw in draws]
    total = sum(len(mask) for mask in masks)
    held_out = sum(int(mask.sum()) for mask in masks)
    if total < 2 or fraction == 0.0:
        return [np.zeros(len(mask), dtype=bool) for mask in masks]
    if held_out == 0 or held_out == total:  # move the document nearest to the other side
        every = np.concatenate(draws)
        chosen = int(every.argmin() if held_out == 0 else every.argmax())
        for mask in masks:
            if chosen < len(mask):
                mask[chosen] = not mask[chosen]
                break
            chosen -= len(mask)
    return masks


def document_sum(key: str, text: str) -> int:
    """The 256-bit contribution of one document to `content_sum`."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass") + b"\0" + text.encode("utf-8", "surrogatepass"))
    return int.from_bytes(digest.digest(), "big")


def content_sum(contributions: int, other: int) -> int:
    """Two content sums as one: addition modulo 2^256, independent of order and of how documents are grouped."""
    return (contributions + other) & _MASK_256


def content_hex(contribution: int) -> str:
    """A content sum as 64 hexadecimal digits."""
    return f"{contribution:064x}"
