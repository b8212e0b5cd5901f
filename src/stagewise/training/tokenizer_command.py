"""`stagewise tokenizer train`: files, folders or the embedded corpus in, a tokenizer's folder out.

Design choices:
- Text is read by the data room's readers, so everything that can be trained on can be counted here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from stagewise.data.sources import SourceSpec, kind_of_name, read_source
from stagewise.tokenizer import save_release_files, train_tokenizer

SAMPLE_BYTES = 1 << 20


def read_documents(inputs: Sequence[str], *, text_key: str = "text", max_bytes: int | None = None) -> Iterator[str]:
    """Texts of files, folders and globs in order, read as `stagewise data prepare` does; ``embedded`` or none: the
    embedded corpus.

    Stops after `max_bytes` of UTF-8. Raises FileNotFoundError for a name that matches nothing, ValueError with the
    file and the place (byte offset, line) for what is no valid text.
    """
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


def train(
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
