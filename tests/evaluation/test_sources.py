from __future__ import annotations

import json

import pytest

from stagewise.data.training_data import open_training_data
from stagewise.evaluation.sources import evaluation_texts, held_out, run_recipe
from stagewise.recipe import load_recipe
from stagewise.tokenizer import train_tokenizer


@pytest.fixture
def corpus(tmp_path):
    """Sixty documents, each its own number in words."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    rows = [{"text": f"document number {i} speaks of stage {i % 7}"} for i in range(60)]
    (folder / "part.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(tmp_path, corpus):
    """A run folder with a recipe over the corpus, and a place for its model."""
    changes = {
        "data.sources": [{"name": "numbers", "kind": "jsonl", "path": str(corpus)}],
        "data.validation_fraction": 0.25,
        "seed": 7,
    }
    recipe = load_recipe("quickstart", changes)
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.to_yaml())
    return tmp_path / "run"


def test_a_model_is_measured_on_what_its_own_run_held_out(run):
    recipe = run_recipe(run / "model")
    texts = list(evaluation_texts(None, run / "model").documents)
    tokenizer = train_tokenizer([f"document number {i} speaks of stage" for i in range(100)], 290)
    data = open_training_data(recipe.data, tokenizer, 32, recipe.seed)
    assert sorted(texts) == sorted(document.text for document in data.validation_documents())
    assert 5 <= len(texts) <= 25
    assert texts == list(evaluation_texts(None, run / "model").documents)  # in a fixed order
    assert texts != sorted(texts, key=lambda text: int(text.split()[2]))  # that is not the corpus's


def test_a_checkpoint_finds_the_recipe_of_its_run(run):
    checkpoint = run / "checkpoints" / "step-000100"
    checkpoint.mkdir(parents=True)
    assert run_recipe(checkpoint).name == run_recipe(run).name == "quickstart"
    assert run_recipe(run.parent / "elsewhere") is None and run_recipe("a/repository") is None


def test_named_files_are_read_whole_and_in_order(corpus, tmp_path):
    texts = evaluation_texts([str(corpus / "part.jsonl")], None)
    assert [text.split()[2] for text in texts.documents] == [str(i) for i in range(60)]
    assert texts.name == "part.jsonl"
    plain = tmp_path / "notes.txt"
    plain.write_text("only this")
    assert list(evaluation_texts([str(plain)]).documents) == ["only this"]


def test_bad_sources_are_named(corpus, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        list(evaluation_texts([str(tmp_path / "absent.txt")]).documents)
    with pytest.raises(ValueError, match="embedded alone"):
        evaluation_texts(["embedded", str(corpus)])
    with pytest.raises(ValueError, match="no documents are held out"):
        held_out([], 0, 0.1)
