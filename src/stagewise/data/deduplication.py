"""Duplicate documents: exact ones by hash, near ones by MinHash with locality-sensitive hashing.

Design choices:
- Exact: the same text after NFC normalisation and with every run of white space as one space.
- Near: 112 minimum hashes over runs of five words, 14 bands of 8; documents that share a band are compared by their
  whole signatures and count as duplicates from an estimated Jaccard similarity of 0.8.
- The first document in the order of the work units stays. Signatures are computed unit by unit in parallel, the
  decision is one pass over them.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib

import numpy as np

from .splitting import scramble

BANDS, ROWS_PER_BAND = 14, 8
SIMILARITY = 0.8
_SHINGLE_WORDS = 5
_WORD = re.compile(r"\w+")
_SALTS = [int(salt) for salt in scramble(np.arange(1, BANDS * ROWS_PER_BAND + 1, dtype=np.uint64), 0x5EED)]
_WEIGHTS = scramble(np.arange(_SHINGLE_WORDS, dtype=np.uint64), 0xFACE) | np.uint64(1)


def exact_signature(text: str) -> np.ndarray:
    """Hash of the normalised text, uint64 (2,)."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    digest = hashlib.sha256(normal.encode("utf-8", "surrogatepass")).digest()
    return np.frombuffer(digest[:16], dtype="<u8")


def near_signature(text: str) -> np.ndarray:
    """Minimum hashes of the text's word runs, uint64 (112,)."""
    words = np.array([zlib.crc32(word.encode()) for word in _WORD.findall(text.lower())] or [0], dtype=np.uint64)
    if len(words) < _SHINGLE_WORDS:
        words = np.pad(words, (0, _SHINGLE_WORDS - len(words)))
    runs = np.lib.stride_tricks.sliding_window_view(words, _SHINGLE_WORDS)
    shingles = np.unique((runs * _WEIGHTS).sum(axis=1, dtype=np.uint64))
    return np.array([scramble(shingles, salt).min() for salt in _SALTS], dtype=np.uint64)


def duplicates(signatures: np.ndarray, near: bool) -> np.ndarray:
    """Which documents repeat an earlier one: boolean (N,), from signatures (N, 2) or (N, 112) in document order."""
    repeated = np.zeros(len(signatures), dtype=bool)
    if not near:
        _, first = np.unique(signatures, axis=0, return_index=True)
        repeated[:] = True
        repeated[first] = False
        return repeated
    bands = np.ascontiguousarray(signatures.reshape(len(signatures), BANDS, ROWS_PER_BAND))
    seen: dict[bytes, list[int]] = {}
    for document in range(len(signatures)):
        names = [bytes([band]) + bands[document, band].tobytes() for band in range(BANDS)]
        candidates = {other for name in names for other in seen.get(name, ())}
        if any(np.mean(signatures[document] == signatures[other]) >= SIMILARITY for other in candidates):
            repeated[document] = True
            continue
        for name in names:
            seen.setdefault(name, []).append(document)
    return repeated
