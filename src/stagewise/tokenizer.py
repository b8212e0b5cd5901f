"""Training a tokenizer: byte-level BPE over text, saved as every file a release carries.

Design choices:
- rustbpe counts and merges; tiktoken and `tokenizers` encode. What is trained is a rank for every byte string,
  nothing else.
- The split pattern keeps digits in groups of one or two, so that numbers up to 99 are single tokens and longer ones
  stay regular, and combining marks with their letters, so that scripts that need them are not cut inside a syllable.
- A vocabulary counts everything: 256 bytes, the merges, and nine special tokens at its end. A corpus too small for
  the size asked for is an error, not a smaller vocabulary.
- Text is read as a stream with the position kept: invalid UTF-8 is reported by file and byte.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

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
PIECE_BYTES = 1 << 20  # plain text is read in pieces of about this size, cut at line ends
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


def read_documents(
    paths: Sequence[str | os.PathLike], *, text_key: str = "text", max_bytes: int | None = None
) -> Iterator[str]:
    """Texts of files and globs, in order: .jsonl by line under `text_key`, others as plain UTF-8; .gz is opened.

    Stops after `max_bytes` of UTF-8. Raises FileNotFoundError for a name that matches nothing, ValueError with file
    and byte offset for invalid UTF-8, and with file and line for a jsonl line without text.
    """
    readers = (
        _jsonl_texts(path, text_key) if path.name.removesuffix(".gz").endswith(".jsonl") else _plain_texts(path)
        for path in _expand(paths)
    )
    return _limited(chain.from_iterable(readers), max_bytes)


def train_command(
    *inputs: str,
    vocab_size: int = 32768,
    out: Path = Path("tokenizer"),
    max_bytes: int | None = None,
    text_key: str = "text",
    add_bos: Annotated[bool, Parameter(negative="--no-add-bos")] = False,
) -> None:
    """Train a byte-level BPE tokenizer and write all files of a release.

    Parameters
    ----------
    inputs
        Files or globs of plain text or .jsonl (also .gz); none: the installed Python's own library, the embedded
        corpus.
    vocab_size
        Number of tokens, nine special ones included.
    out
        Folder to write.
    max_bytes
        Read at most this many bytes of text.
    text_key
        Where the text stands in a .jsonl line.
    add_bos
        Have tok(text) put a bos first; bos is needed in front of every prompt either way.

    Example: stagewise tokenizer train "books/*.txt" --vocab-size 8192 --out my-tokenizer
    """
    import time

    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    if inputs:
        documents = read_documents(inputs, text_key=text_key, max_bytes=max_bytes)
    else:
        documents = _limited(_embedded_texts(), max_bytes)
    console, started = Console(), time.perf_counter()
    count, size, sample, sample_size = 0, 0, [], 0
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("reading")

        def counted() -> Iterator[str]:
            nonlocal count, size, sample_size
            for text in documents:
                length = len(text.encode("utf-8", "surrogatepass"))
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


def _embedded_texts() -> Iterator[str]:
    from stagewise.data.sources import embedded_documents

    for document in embedded_documents():
        yield document if isinstance(document, str) else document.text


def _limited(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    budget = max_bytes
    for text in texts:
        if budget is not None:
            data = text.encode("utf-8", "surrogatepass")
            if len(data) > budget:
                text = data[:budget].decode("utf-8", "ignore")
            budget -= min(len(data), budget)
        if text:
            yield text
        if budget == 0:
            return


def _expand(paths: Sequence[str | os.PathLike]) -> list[Path]:
    found: list[Path] = []
    for name in map(os.fspath, paths):
        matches = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))
        if not matches:
            raise FileNotFoundError(f"{name}: no such file, and as a pattern it matches none")
        found += map(Path, matches)
    return found


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Lines of a file with the byte offset each begins at (in the uncompressed bytes)."""
    offset = 0
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        for line in file:
            yield offset, line
            offset += len(line)


def _decoded(data: bytes, path: Path, offset: int) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: invalid UTF-8 at byte {offset + error.start} ({error.reason}); convert the file, or leave it out"
        ) from None


def _plain_texts(path: Path) -> Iterator[str]:
    begin, piece = 0, bytearray()
    for offset, line in chain(_lines(path), [(-1, b"")]):  # the last, empty line flushes
        if offset < 0 or len(piece) >= PIECE_BYTES:
            text = _decoded(bytes(piece), path, begin)
            yield text.removeprefix("\ufeff") if begin == 0 else text
            piece.clear()
        if not piece:
            begin = offset
        piece += line


def _jsonl_texts(path: Path, text_key: str) -> Iterator[str]:
    for number, (offset, line) in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(_decoded(line, path, offset))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from None
        text = record.get(text_key) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise ValueError(f"{path}: line {number} has no text under {text_key!r}; name the key with --text-key")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ValueError(
                f"{path}: line {number} is no valid Unicode: half a surrogate pair in {text_key!r}"
            ) from None
        yield text
