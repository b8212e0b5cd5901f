"""The identity of a tokenizer: a hash that token shards carry, so that ids are never read with another vocabulary."""

from __future__ import annotations

import hashlib
from typing import Any

_PROBE = "def probe(x):\n    return x['key'] + 12345.678  # naïve café, 東京, \U0001f642\tEND  \r\n"


def tokenizer_hash(tokenizer: Any) -> str:
    """Sixteen hexadecimal digits over the vocabulary's bytes (or byte lengths) and the encoding of a fixed text."""
    digest = hashlib.sha256(f"{tokenizer.vocab_size} {tokenizer.bos_token_id}".encode())
    table = getattr(tokenizer, "token_bytes", None)
    if table is not None:
        for raw in table:
            digest.update(len(raw).to_bytes(4, "little") + raw)
    else:
        digest.update(repr(tokenizer.token_byte_lengths.tolist()).encode())
    digest.update(repr(list(tokenizer.encode_ordinary(_PROBE))).encode())
    return digest.hexdigest()[:16]
