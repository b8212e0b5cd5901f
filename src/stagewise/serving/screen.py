"""Text on a terminal while it is being decoded: bytes held back until they are characters, drafts dim until they count.

Design choices:
- Tokens are bytes. An incomplete UTF-8 sequence waits for its rest; what never becomes text is shown as U+FFFD.
- Drafts are shown dim in what is left of the current line, never more, so that erasing them needs no knowledge of how
  a terminal wraps. Where output is no terminal only committed text is written.
- Control characters other than newline and tab become pictures: a model's text cannot move the cursor.
"""

from __future__ import annotations

import codecs
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from typing import TextIO

COLOURS = (39, 208, 42, 201, 226, 196, 51, 141)  # of the 256-colour palette, one per stage
DIM, RESET = "\x1b[2m", "\x1b[0m"


class ByteText:
    """Turns the bytes of tokens into text as soon as they are whole characters."""

    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, data: bytes) -> str:
        return self.decoder.decode(data)

    def finish(self) -> str:
        return self.decoder.decode(b"", final=True)


def visible(text: str) -> str:
    """Text without characters that would steer a terminal: C0 and C1 controls become pictures or U+FFFD."""

    def picture(c: str) -> str:
        code = ord(c)
        if code < 0x20 and c not in "\n\t":
            return chr(0x2400 + code)
        return "\u2421" if code == 0x7F else "\ufffd" if 0x80 <= code < 0xA0 else c

    return "".join(map(picture, text))


def columns(text: str) -> int:
    """Terminal columns a line of text takes."""
    wide = (0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
    return sum(wide)


class Screen:
    """Writes one row's text to a stream as it is committed, drafts behind it.

    Args:
        stream: where to. token_bytes: bytes of a list of ids, special tokens left out.
        terminal: whether drafts, colours and erasing make sense there. by_stage: colour tokens by emitting stage.
    """

    def __init__(
        self, stream: TextIO, token_bytes: Callable[[list[int]], bytes], terminal: bool, by_stage: bool = False
    ):
        self.stream, self.token_bytes, self.terminal = stream, token_bytes, terminal
        self.by_stage = by_stage and terminal
        self.text, self.column, self.drafted = ByteText(), 0, 0
        self.drafts: list[int] = []

    def _erase(self) -> None:
        if self.drafted:
            self.stream.write(f"\x1b[{self.drafted}D\x1b[K")
        self.drafted = 0

    def _write(self, text: str, stage: int | None = None) -> None:
        if not text:
            return
        if self.terminal:
            text = visible(text)
            line = text.rpartition("\n")[2].expandtabs(8)
            self.column = (columns(line) + (0 if "\n" in text else self.column)) % shutil.get_terminal_size().columns
        if self.by_stage and stage is not None:
            text = f"\x1b[38;5;{COLOURS[stage % len(COLOURS)]}m{text}{RESET}"
        self.stream.write(text)

    def commit(self, tokens: Sequence[int], stages: Sequence[int]) -> None:
        """Show tokens for good; the drafts go."""
        self._erase()
        self.drafts = []
        for token, stage in zip(tokens, stages, strict=True):
            self._write(self.text.feed(self.token_bytes([token])), stage)
        self.stream.flush()

    def draft(self, tokens: Sequence[int]) -> None:
        """Show further provisional tokens, as far as the line goes."""
        if not self.terminal:
            return
        self.drafts += tokens
        self._erase()
        room = shutil.get_terminal_size().columns - self.column - 1
        line = (
            visible(self.token_bytes(self.drafts).decode("utf-8", "ignore")).replace("\n", "\u23ce").replace("\t", " ")
        )
        while columns(line) > room:
            line = line[:-1]
        if line:
            self.stream.write(f"{DIM}{line}{RESET}")
            self.drafted = columns(line)
        self.stream.flush()

    def finish(self) -> None:
        """Write what is left and end the line."""
        self._erase()
        self._write(self.text.finish())
        self.stream.write("\n")
        self.stream.flush()


def stage_legend(stages_used: Sequence[Sequence[int]], count: int, terminal: bool) -> str:
    """One line: each stage in its colour with the share of tokens it emitted."""
    flat = [s for row in stages_used for s in row]
    parts = []
    for stage in range(count):
        share = f"stage {stage}: {flat.count(stage) / len(flat):.0%}" if flat else f"stage {stage}"
        parts.append(f"\x1b[38;5;{COLOURS[stage % len(COLOURS)]}m{share}{RESET}" if terminal else share)
    return "emitted by " + ", ".join(parts)
