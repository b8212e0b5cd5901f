"""Training a tokenizer: byte-level BPE over text, saved as every file a release carries.

Design choices:
- rustbpe counts and merges; tiktoken and `tokenizers` encode. What is trained is a rank for every byte string,
  nothing else.
- The split pattern keeps digits in groups of one or two, so that numbers up to 99 are single tokens and longer ones
  stay regular, and combining marks with their letters, so that scripts that need them are not cut inside a syllable.
- A vocabulary counts everything: 256 bytes, the merges, and nine special tokens at its end. A corpus too small for
  the size asked for is an error, not a smaller vocabulary.
- Text comes as a stream of strings: where it lies is the business of whoever asks (`stagewise tokenizer train`).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from stagewise.modeling.byte_encoding import BOS, SPECIAL_TOKENS, cut_long_blanks
from stagewise.modeling.tokenization_poe import PoETokenizer, load_tokenizer

__all__ = [
    "SPLIT_PATTERN",
    "load_tokenizer",
    "save_release_files",
    "train_tokenizer",
]

SPLIT_PATTERN = "|".join(
    [
        r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])",  # English contractions
        r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+",  # a word, with the one space or sign in front of it
        r"\p{N}{1,2}",  # digits, two at a time
        r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",  # punctuation, with the line ends behind it
        r"\s*[\r\n]+",  # line ends, with the blanks in front of them
        r"\s+(?!\S)",  # blanks, but for the one that belongs to the next word
        r"\s+",
    ]
)
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    *,
    add_bos_token: bool = False,
    eos_token: str = BOS,
    pattern: str = SPLIT_PATTERN,
) -> PoETokenizer:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, the nine special ones included, trained on `texts`.

    Deterministic in the texts and their order. Raises ValueError for a vocabulary smaller than the bytes and special
    tokens, for no text at all, for text that is not valid Unicode, and for a vocabulary larger than the texts
    support.
    """
    import rustbpe
    import tiktoken

    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            f"vocab_size {vocab_size} is smaller than {MIN_VOCAB_SIZE}: 256 bytes and {len(SPECIAL_TOKENS)} special "
            "tokens must fit; ask for more"
        )
    seen = 0

    def checked() -> Iterator[str]:
        nonlocal seen
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(f"texts: document {index} is {type(text).__name__}, not text")
            try:
                seen += len(text.encode())
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"texts: document {index} is no valid Unicode: a lone surrogate at character {error.start}"
                ) from None
            yield from cut_long_blanks(text)

    trainer = rustbpe.Tokenizer()
    trainer.train_from_iterator(checked(), vocab_size - len(SPECIAL_TOKENS), pattern=pattern)
    if seen == 0:
        raise ValueError("empty corpus: there is no text to train a tokenizer on")
    ranks = {bytes(token): rank for token, rank in trainer.get_mergeable_ranks()}
    if len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
        raise ValueError(
            f"vocab_size {vocab_size} is larger than this corpus of {seen:,} bytes supports: pairs to merge ran out at "
            f"{len(ranks) + len(SPECIAL_TOKENS)} tokens; give more text or ask for at most that many"
        )
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL_TOKENS)}
    encoding = tiktoken.Encoding("stagewise", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return PoETokenizer(encoding=encoding, add_bos_token=add_bos_token, eos_token=eos_token, pad_token=BOS)


def save_release_files(tokenizer: PoETokenizer, folder: str | os.PathLike) -> list[Path]:
    """Writes tokenizer.json, tokenizer.pkl, token_bytes.pt, tokenizer_config.json, special_tokens_map.json and the
    code into `folder`.

    The folder loads through `load_tokenizer`, and with ``AutoTokenizer`` and ``trust_remote_code=True`` where
    stagewise is not installed. Returns the paths of the five files.
    """
    written = tokenizer.save_pretrained(os.fspath(folder))
    return [Path(path) for path in written]
