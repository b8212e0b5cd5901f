"""Documents and the readers that take them out of local files: text, jsonl and parquet, plain, `.gz` or `.zst`.

Design choices:
- Readers are generators; nothing holds a whole file except a text file's own document.
- Every error names the file and the place: byte offset for invalid UTF-8, line for jsonl, columns for a missing
  column.
- A document's key is the file's name relative to the source plus its place in the file, never an absolute path.
- A text file above 64 KiB is cut at the first blank line after every 32 KiB (a single long text still has documents
  on both sides of the split); a `separator` cuts exactly where it stands instead.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_LONG_TEXT = 64 * 1024  # characters
_CUT_AFTER = 32 * 1024
Complaint = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """One text and the key that identifies it inside its source."""

    key: str
    text: str


def stop(message: str) -> None:
    """The default treatment of a bad record: a ValueError with `message`."""
    raise ValueError(message)


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading bytes, decompressing `.gz` and `.zst`."""
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        try:
            import zstandard
        except ImportError:
            raise RuntimeError(f"reading {path} needs zstandard: pip install 'stagewise[data]'") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(open(path, "rb"), closefd=True))
    return open(path, "rb")


def text_of(record: dict[str, Any], text_key: str | list[str], place: str) -> str:
    """The text of a record: a column, several columns joined by a blank line, or a template over columns such as
    "{question}\\n{answer}"."""
    if isinstance(text_key, list):
        return "\n\n".join(text_of(record, key, place) for key in text_key)
    try:
        value = text_key.format_map(record) if "{" in text_key else record[text_key]
    except (KeyError, IndexError) as error:
        columns = ", ".join(sorted(map(str, record))) or "none"
        raise ValueError(f"{place}: no column {error.args[0]!r}; the columns are: {columns} (set text_key)") from None
    except ValueError as error:
        raise ValueError(f"text_key {text_key!r} is not a valid template: {error}") from None
    if not isinstance(value, str):
        raise ValueError(f"{place}: column {text_key!r} holds {type(value).__name__}, not text")
    return value


def _usable(text: str, place: str, complain: Complaint) -> bool:
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
        return True
    except UnicodeEncodeError as error:
        complain(f"{place}: a lone surrogate at character {error.start} cannot be written as UTF-8")
        return False


def read_text(path: Path, name: str, separator: str | None = None, complain: Complaint = stop) -> Iterator[Document]:
    """Documents of one text file; invalid UTF-8 is an error that gives the byte offset."""
    try:
        with open_bytes(path) as file:
            raw = file.read()
    except (OSError, EOFError) as error:
        raise OSError(f"{path}: cannot be read: {error}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        offset = error.start + (3 if raw.startswith(b"\xef\xbb\xbf") else 0)
        complain(f"{path}: invalid UTF-8 at byte {offset} ({error.reason})")
        return
    text = text.replace("\r\n", "\n")
    pieces = text.split(separator) if separator else cut_long_text(text)
    for number, piece in enumerate(pieces):
        if piece.strip():
            yield Document(name if len(pieces) == 1 else f"{name}#{number}", piece)


def cut_long_text(text: str) -> list[str]:
    """A text of ordinary length as it is, a long one in parts that end at blank lines; parts join to the text."""
    if len(text) <= _LONG_TEXT:
        return [text]
    parts, start = [], 0
    while len(text) - start > _LONG_TEXT:
        for mark in ("\n\n", "\n", " "):
            found = text.find(mark, start + _CUT_AFTER, start + _LONG_TEXT)
            if found >= 0:
                break
        end = found + len(mark) if found >= 0 else start + _LONG_TEXT
        parts.append(text[start:end])
        start = end
    return [*parts, text[start:]]


def _line_number(path: Path, offset: int) -> int:
    """1-based number of the line that starts at `offset` of the (decompressed) file."""
    number, left = 1, offset
    with open_bytes(path) as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            number += block.count(b"\n")
            left -= len(block)
    return number


def read_jsonl(
    path: Path,
    name: str,
    text_key: str | list[str] = "text",
    start: int = 0,
    stop_at: int | None = None,
    complain: Complaint = stop,
) -> Iterator[Document]:
    """Documents of the lines that begin in bytes [start, stop_at) of a jsonl file; blank lines are skipped."""
    try:
        with open_bytes(path) as file:
            position = start
            if start > 0:  # the line that holds byte start-1 belongs to the range before
                file.seek(start - 1)
                position = start - 1 + len(file.readline())
            while (stop_at is None or position < stop_at) and (line := file.readline()):
                place, begin = position, position
                position += len(line)
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except UnicodeDecodeError as error:
                    offset = begin + error.start
                    complain(f"{path}:{_line_number(path, begin)}: invalid UTF-8 at byte {offset} of the file")
                    continue
                except ValueError as error:
                    complain(f"{path}:{_line_number(path, begin)}: not a JSON line: {error}")
                    continue
                if not isinstance(record, dict):
                    complain(
                        f"{path}:{_line_number(path, begin)}: a JSON object is needed, not {type(record).__name__}"
                    )
                    continue
                try:
                    text = text_of(record, text_key, str(path))
                except ValueError as error:
                    complain(str(error).replace(f"{path}:", f"{path}:{_line_number(path, begin)}:", 1))
                    continue
                if text.strip() and _usable(text, f"{path} at byte {begin}", complain):
                    yield Document(f"{name}@{place}", text)
    except (OSError, EOFError) as error:
        raise OSError(f"{path}: cannot be read: {error}") from None


def parquet_groups(path: Path) -> list[int]:
    """Rows in each row group of a parquet file."""
    metadata = _parquet(path).metadata
    return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]


def _parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RuntimeError(f"reading {path} needs pyarrow: pip install 'stagewise[data]'") from None
    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowException) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from None


def read_parquet(
    path: Path,
    name: str,
    text_key: str | list[str] = "text",
    groups: tuple[int, int] | None = None,
    complain: Complaint = stop,
) -> Iterator[Document]:
    """Documents of row groups [first, last) of a parquet file; a missing column's error lists the columns."""
    file = _parquet(path)
    columns = file.schema_arrow.names
    keys = [text_key] if isinstance(text_key, str) else text_key
    template = any("{" in key for key in keys)
    for key in () if template else keys:
        if key not in columns:
            raise ValueError(f"{path}: no column {key!r}; the columns are: {', '.join(columns)} (set text_key)")
    first, last = groups or (0, file.metadata.num_row_groups)
    row = sum(file.metadata.row_group(group).num_rows for group in range(first))
    wanted = None if template else keys
    for batch in file.iter_batches(batch_size=1024, row_groups=list(range(first, last)), columns=wanted):
        for record in batch.to_pylist():
            place, row = row, row + 1
            try:
                text = text_of(record, text_key, f"{path} row {place}")
            except ValueError as error:
                complain(str(error))
                continue
            if text.strip() and _usable(text, f"{path} row {place}", complain):
                yield Document(f"{name}@{place}", text)
