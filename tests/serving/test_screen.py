"""What reaches the terminal: whole characters only, drafts that vanish, nothing that steers it."""

from __future__ import annotations

import io
import re

import pytest

from stagewise.serving.screen import ByteText, Screen, columns, stage_legend, visible

PIECES = [b"na", b"\xc3", b"\xaf", b"ve \xf0\x9f", b"\x8c", b"\xb3!", b"\xff", b"\xe2\x82"]


def token_bytes(tokens):
    return b"".join(PIECES[t] for t in tokens)


def shown_after(output: str) -> str:
    """What a terminal shows on one line after printable text, cursor-left, erase-to-end and colours."""
    line, cursor = [], 0
    for part in re.findall(r"\x1b\[[0-9;]*[A-Za-z]|.", output):
        if part.startswith("\x1b") and part.endswith("D"):
            cursor -= int(part[2:-1])
        elif part.startswith("\x1b") and part.endswith("K"):
            del line[cursor:]
        elif not part.startswith("\x1b"):
            line[cursor : cursor + 1] = part
            cursor += 1
    return "".join(line)


def test_incomplete_characters_wait_for_their_rest():
    text = ByteText()
    assert [text.feed(p) for p in PIECES] == ["na", "", "ï", "ve ", "", "🌳!", "\ufffd", ""]
    assert text.finish() == "\ufffd"


def test_a_pipe_gets_the_committed_text_and_nothing_else():
    out = io.StringIO()
    screen = Screen(out, token_bytes, terminal=False, by_stage=True)
    screen.draft([3])
    screen.commit([0, 1], [0, 0])
    screen.commit([2, 3, 4, 5], [1, 2, 2, 2])
    screen.finish()
    assert out.getvalue() == "naïve 🌳!\n"


def test_drafts_are_dim_and_replaced_by_what_is_committed(monkeypatch):
    out = io.StringIO()
    screen = Screen(out, token_bytes, terminal=True)
    screen.commit([0], [0])
    screen.draft([0])
    screen.draft([0])
    assert shown_after(out.getvalue()) == "nanana"
    assert "\x1b[2m" in out.getvalue()
    screen.commit([1, 2], [0, 0])
    assert shown_after(out.getvalue()) == "naï"


def test_drafts_never_leave_the_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "10")
    out = io.StringIO()
    screen = Screen(out, token_bytes, terminal=True)
    screen.commit([0, 0, 0], [0, 0, 0])
    screen.draft([0] * 20)
    assert len(shown_after(out.getvalue())) <= 9
    screen.commit([0, 0, 0], [0, 0, 0])  # wraps: the column starts again
    assert screen.column == 2


@pytest.mark.parametrize("stage", [0, 3])
def test_tokens_take_the_colour_of_their_stage(stage):
    out = io.StringIO()
    screen = Screen(out, token_bytes, terminal=True, by_stage=True)
    screen.commit([0], [stage])
    assert out.getvalue().startswith("\x1b[38;5;")
    assert out.getvalue().split("m")[0] in stage_legend([[stage]], 4, terminal=True)


def test_the_legend_tells_the_share_of_every_stage():
    assert stage_legend([[0, 0, 1], [2]], 3, terminal=False) == "emitted by stage 0: 50%, stage 1: 25%, stage 2: 25%"


def test_control_characters_cannot_steer_the_terminal():
    assert visible("a\x1b[2Jb\rc\x7f\x9b\n\t") == "a\u241b[2Jb\u240dc\u2421\ufffd\n\t"


def test_wide_and_combining_characters_take_the_columns_they_take():
    assert (columns("abc"), columns("漢字"), columns("e\u0301")) == (3, 4, 1)
