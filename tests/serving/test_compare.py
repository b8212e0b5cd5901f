"""`stagewise compare`: agreement means what it says, models and modes come side by side."""

from __future__ import annotations

import json

import pytest

from stagewise.cli import main
from stagewise.serving.compare import agreement, split_modes


@pytest.mark.parametrize("texts, share", [
    ([b"abcd", b"xy"], 1.0),
    ([b"abXX", b"xy"], 4 / 6),
    ([b"abcdef", b"xy"], 6 / 8),
    ([b"", b"zz"], 0.0),
])  # fmt: skip
def test_agreement_is_the_share_repeated_before_the_first_difference(texts, share):
    assert agreement([b"abcd", b"xy"], texts) == pytest.approx(share)


def test_texts_that_are_all_empty_agree():
    assert agreement([b""], [b""]) == 1.0


def test_commas_separate_modes_but_not_the_stages_of_a_composition():
    assert split_modes(["full,composition:0,2,prefix:1", "full", "wand"]) == [
        "full",
        "composition:0,2",
        "prefix:1",
        "wand",
    ]


def test_models_and_modes_stand_side_by_side(served_folder, end_to_end_served_folder, tmp_path, capsys):
    out = tmp_path / "compared.json"
    models = [str(served_folder), str(end_to_end_served_folder)]
    modes = ["--modes", "prefix:1,speculative:2,wand-verified"]
    arguments = [*modes, "--max-new-tokens", "8", "--json", str(out)]
    assert main(["compare", *models, "--prompt", "The expert", "--prompt", "def pool(", *arguments]) == 0
    shown = capsys.readouterr().out
    assert "agreement" in shown and "'def pool('" in shown
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [(row["model"], row["mode"]) for row in rows] == [
        (m, mode) for m in models for mode in ("prefix:1", "speculative:2", "wand-verified")
    ]
    assert [row["agreement"] for row in rows[1:3]] == [1.0, 1.0]
    assert rows[0]["agreement"] < 1 and all("tokens_per_second" in row for row in rows[:3])
    assert all("no valid intermediate experts" in row["error"] for row in rows[3:])


def test_sampled_lossless_modes_agree_with_full(served_folder, tmp_path):
    out = tmp_path / "compared.json"
    arguments = ["--modes", "full,speculative:3", "--temperature", "0.8", "--seed", "4", "--max-new-tokens", "8"]
    assert main(["compare", str(served_folder), "--prompt", "The", *arguments, "--json", str(out)]) == 0
    assert [row["agreement"] for row in json.loads(out.read_text(encoding="utf-8"))["rows"]] == [1.0, 1.0]


def test_prompts_come_from_one_place(served_folder, capsys):
    assert main(["compare", str(served_folder)]) == 2
    assert "--prompt" in capsys.readouterr().err
