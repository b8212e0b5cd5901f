"""Training a tokenizer: byte-level BPE over text, saved as every file a release carries.

Design choices:
- rustbpe counts and merges; tiktoken and `tokenizers` encode. What is trained is a rank for every byte string,
  nothing else.
- The split pattern keeps digits in groups of one or two, so that numbers up to 99 are single tokens and longer ones
  stay regular, and combining marks with their letters, so that scripts that need them are not cut inside a syllable.
- A vocabulary counts everything: 256 bytes, the merges, and nine special tokens at its end. A corpus too small for
  the size asked for is an error, not a smaller vocabulary.
- Text comes as a stream from the data room's readers, so everything that can be trained on can be counted here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from stagewise.modeling.byte_encoding import BOS, SPECIAL_TOKENS, cut_long_blanks
from stagewise.modeling.tokenization_poe import PoETokenizer, load_tokenizer

__all__ = [
    "SPLIT_PATTERN",
    "load_tokenizer",
    "read_documents",
    "save_release_files",
    "train_command",
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
SAMPLE_BYTES = 1 << 20


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


def read_documents(inputs: Sequence[str], *, text_key: str = "text", max_bytes: int | None = None) -> Iterator[str]:
    """Texts of files, folders and globs in order, read as `stagewise data prepare` does; ``embedded`` or none: the
    embedded corpus.

    Stops after `max_bytes` of UTF-8. Raises FileNotFoundError for a name that matches nothing, ValueError with the
    file and the place (byte offset, line) for what is no valid text.
    """
    from stagewise.data.sources import SourceSpec, kind_of_name, read_source

    if max_bytes is not None and max_bytes < 1:
        raise ValueError(f"max_bytes must be at least 1, got {max_bytes}")
    specs = []
    for name in inputs or ("embedded",):
        kinds = {kind_of_name(name) or "text"}
        if name == "embedded":
            kinds = {"embedded"}
        elif os.path.isdir(name):
            found = {kind_of_name(path.name) for path in Path(name).rglob("*") if path.is_file()}
            kinds = {kind for kind in found if kind} or {"text"}
        specs += [SourceSpec(name, kind=kind, path=name, text_key=text_key) for kind in sorted(kinds)]
    texts = (document.text for spec in specs for document in read_source(spec))
    return texts if max_bytes is None else _limited(texts, max_bytes)


def train_command(
    *inputs: str,
    vocab_size: int = 32768,
    out: Path = Path("tokenizer"),
    max_bytes: int | None = None,
    text_key: str = "text",
    add_bos: bool = False,
) -> None:
    """Train a byte-level BPE tokenizer and write all files of a release.

    Parameters
    ----------
    inputs
        Files, folders and globs of text, .jsonl and .parquet (also .gz, .zst); none, or the word embedded: the
        installed Python's own library.
    vocab_size
        Number of tokens, nine special ones included.
    out
        Folder to write.
    max_bytes
        Read at most this many bytes of text.
    text_key
        Column with the text in .jsonl and .parquet files.
    add_bos
        Have tok(text) put a bos first; bos is needed in front of every prompt either way.

    Example: stagewise tokenizer train "books/*.txt" --vocab-size 8192 --out my-tokenizer
    """
    import time

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    documents = read_documents(inputs, text_key=text_key, max_bytes=max_bytes)
    console, started = Console(), time.perf_counter()
    count, size, sample, sample_size = 0, 0, [], 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading")

        def counted() -> Iterator[str]:
            nonlocal count, size, sample_size
            for text in documents:
                length = len(text.encode())
                count, size = count + 1, size + length
                if sample_size < SAMPLE_BYTES:
                    sample.append(text)
                    sample_size += length
                progress.update(task, description=f"{count:,} pieces, {size / 1e6:,.1f} MB")
                yield text

        tokenizer = train_tokenizer(counted(), vocab_size, add_bos_token=add_bos)
    save_release_files(tokenizer, out)
    tokens = sum(map(len, tokenizer.encode_batch_ordinary(sample)))
    console.print(
        f"{vocab_size:,} tokens from {size / 1e6:,.1f} MB in {time.perf_counter() - started:.1f} s; "
        f"{sample_size / max(tokens, 1):.2f} bytes a token on the first {sample_size / 1e6:.1f} MB; written to {out}"
    )


def _limited(texts: Iterable[str], max_bytes: int) -> Iterator[str]:
    left = max_bytes
    for text in texts:
        data = text.encode()
        yield text if len(data) <= left else data[:left].decode("utf-8", "ignore")
        left -= len(data)
        if left <= 0:
            return
