"""`stagewise data prepare` from the command line."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from stagewise.cli import main
from stagewise.data import open_training_data
from stagewise.tokenizer import save_release_files, train_tokenizer

TEXTS = [f"The {i}th line talks about number {i * i} and nothing else." for i in range(80)]


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    save_release_files(train_tokenizer(TEXTS, 280), folder)
    return folder


@pytest.fixture
def files(tmp_path):
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in TEXTS))
    (tmp_path / "notes.txt").write_text("Some notes.")
    return tmp_path


def test_files_are_prepared_reported_and_open_for_training(files, tokenizer_folder, capsys):
    out = files / "out"
    arguments = ["data", "prepare", str(files / "lines.jsonl"), str(files / "notes.txt"), "--out", str(out)]
    arguments += ["--tokenizer", str(tokenizer_folder), "--text-key", "body", "--workers", "1", "--dedup", "exact"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "lines.jsonl" in shown and "81" in shown and "--set data.shards=" in shown
    assert main(arguments) == 0  # again: nothing left to do
    from stagewise import load_tokenizer

    tokenizer = load_tokenizer(tokenizer_folder)
    data = open_training_data(
        SimpleNamespace(sources=[], shards=out, validation_fraction=0.1, case_augmentation=0.3), tokenizer, 32, 0
    )
    inputs, _ = data.train.next_batch(40)
    assert "THE" in tokenizer.decode(inputs.flatten().tolist()) and int(inputs.max()) == tokenizer.bos_token_id
    assert {document.text for document in data.validation_documents()} <= set(TEXTS)


def test_a_recipe_names_sources_and_tokenizer(files, tokenizer_folder, capsys):
    out = files / "out"
    changes = [
        f"data.sources.0.{key}={value}" for key, value in {"kind": "jsonl", "path": files / "lines.jsonl"}.items()
    ]
    changes += ["data.sources.0.text_key=body", f"tokenizer.path={tokenizer_folder}"]
    options = [option for change in changes for option in ("--set", change)]
    assert main(["data", "prepare", "quickstart", "--out", str(out), "--workers", "1", *options]) == 0
    assert json.loads((out / "report.json").read_text())["total"]["documents"] == 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lines.jsonl"], "shards need a tokenizer"),
        (["lines.jsonl", "--tokenizer", "nowhere"], "no tokenizer folder nowhere"),
        (["lines.csv"], "lines.csv"),
        ([], "name a recipe"),
        (["lines.jsonl", "--tokenizer", ".", "--set", "seed=1"], "--set changes a recipe"),
        (["lines.jsonl", "--tokenizer", "TOKENIZER", "--executor-option", "oops"], "takes KEY=VALUE"),
        (["lines.jsonl", "--tokenizer", "TOKENIZER", "--dedup", "fuzzy"], "fuzzy"),
        (["lines.jsonl", "--tokenizer", "TOKENIZER"], "no column 'text'; the columns are: body"),
    ],
)
def test_bad_input_is_one_clear_line(files, tokenizer_folder, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(files)
    arguments = [str(tokenizer_folder) if argument == "TOKENIZER" else argument for argument in arguments]
    assert main(["data", "prepare", *arguments, "--out", "out"]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
