"""`open_training_data`: the one function a training run uses."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from stagewise.data import corpus_texts, embedded_manifest, open_training_data


@pytest.fixture
def corpus(tmp_path):
    """Three jsonl sources: web, books, and a train-only overlay."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, count, words in (("web", 60, 12), ("books", 30, 60), ("dialog", 20, 5)):
        lines = [
            json.dumps({"text": f"{name} {i} " + " ".join(f"{name}{i}-{w}" for w in range(words))})
            for i in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def recipe(corpus, **changes):
    def source(name, **fields):
        return {"name": name, "kind": "jsonl", "path": str(corpus / f"{name}.jsonl"), **fields}

    settings = {
        "sources": [
            source("web", share=0.5),
            source("books", share=0.3),
            source("dialog", share=0.2, train_only=True),
        ],
        "validation_fraction": 0.2,
        **changes,
    }
    return SimpleNamespace(**settings)


def test_training_and_validation_documents_are_disjoint_and_train_only_sources_are_never_held_out(corpus, tokenizer):
    data = open_training_data(recipe(corpus), tokenizer, 64, 0)
    held_out = {document.text for document in data.validation_documents()}
    assert {text.split()[0] for text in held_out} == {"web", "books"}
    seen = set()
    while data.report()["sources"][1]["epochs"] < 2:
        inputs, _ = data.train.next_batch(8)
        seen.update(tokenizer.decode_bytes(row.tolist()).decode("utf-8", "replace") for row in inputs)
    trained = " ".join(seen)
    for text in held_out:
        assert text.split()[3] not in trained.split()
    assert "dialog3-1" in trained


def test_achieved_shares_follow_the_targets(corpus, tokenizer):
    data = open_training_data(recipe(corpus), tokenizer, 64, 0, buffer_pieces=16)
    data.train.next_batch(600)
    report = data.report()
    for source in report["sources"]:
        assert abs(source["share"] - source["target_share"]) < 0.03
    assert report["rows"] == 600 and 0 <= report["cropped_share"] < 0.2
    assert report["sources"][2]["epochs"] > 2 * report["sources"][1]["epochs"]


def test_a_source_without_a_share_counts_by_its_size(corpus, tokenizer):
    plain = recipe(corpus)
    for source in plain.sources:
        source["share"] = None
    data = open_training_data(plain, tokenizer, 64, 0)
    sizes = [source["train"]["tokens"] for source in data.manifest["sources"]]
    assert np.allclose([source["target_share"] for source in data.manifest["sources"]], np.array(sizes) / sum(sizes))


def test_validation_rows_hold_exactly_the_tokens_asked_for_and_are_the_same_everywhere(corpus, tokenizer):
    data = open_training_data(recipe(corpus), tokenizer, 64, 0)
    inputs, targets = data.validation_rows(1000)
    assert int((targets >= 0).sum()) == 1000 and not (targets == tokenizer.bos_token_id).any()
    assert (inputs[:, 0] == tokenizer.bos_token_id).all()
    data.train.next_batch(50)
    other = open_training_data(recipe(corpus), tokenizer, 64, 0, rank=1, world_size=2)
    for again in (data.validation_rows(1000), other.validation_rows(1000)):
        assert torch.equal(again[0], inputs) and torch.equal(again[1], targets)


def test_validation_rows_stop_at_what_is_held_out(corpus, tokenizer):
    data = open_training_data(recipe(corpus), tokenizer, 64, 0)
    _, targets = data.validation_rows(10**9)
    documents = list(data.validation_documents())
    assert int((targets >= 0).sum()) == sum(len(document.ids) for document in documents)
    assert sum(document.bytes for document in documents) == data.manifest["validation"]["bytes"]
    assert sorted(targets[targets >= 0].tolist()) == sorted(i for document in documents for i in document.ids.tolist())


def test_sources_and_validation_sets_are_measured_apart_under_their_names(corpus, tokenizer):
    (corpus / "other.txt").write_text("a set of its own")
    extra = [{"name": "other", "kind": "text", "path": str(corpus / "other.txt")}]
    data = open_training_data(recipe(corpus, validation_sources=extra), tokenizer, 64, 0)
    assert data.validation_names == ["web", "books", "other"]
    assert [document.text for document in data.validation_documents("other")] == ["a set of its own"]
    assert {document.source for document in data.validation_documents()} == {"web", "books"}
    assert int((data.validation_rows(10, "other")[1] >= 0).sum()) == 10
    with pytest.raises(ValueError, match="no validation source 'nobody'; there are: web, books, other"):
        data.validation_rows(10, "nobody")


def test_tokens_are_cached_by_content_and_tokenizer(corpus, tokenizer, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = open_training_data(recipe(corpus), tokenizer, 32, 1, cache_dir=cache)

    def forbidden(texts, threads=1):
        raise AssertionError("encoded again")

    monkeypatch.setattr(tokenizer, "encode_batch_ordinary", forbidden)
    second = open_training_data(recipe(corpus), tokenizer, 32, 1, cache_dir=cache)
    assert torch.equal(first.train.next_batch(9)[0], second.train.next_batch(9)[0])
    assert first.manifest == second.manifest
    with open(corpus / "web.jsonl", "a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(AssertionError, match="encoded again"):
        open_training_data(recipe(corpus), tokenizer, 32, 1, cache_dir=cache)


def test_cached_and_uncached_data_give_the_same_rows(corpus, tokenizer, tmp_path):
    rows = [
        open_training_data(recipe(corpus), tokenizer, 32, 1, cache_dir=cache).train.next_batch(20)[0]
        for cache in (None, tmp_path)
    ]
    assert torch.equal(*rows)


def test_a_run_resumes_exactly_with_augmentation_and_refuses_other_data(corpus, tokenizer):
    settings = recipe(corpus, case_augmentation=0.4)
    data = open_training_data(settings, tokenizer, 48, 2)
    data.train.next_batch(70)
    state = json.loads(json.dumps(data.train.state_dict()))
    expected = data.train.next_batch(40)
    again = open_training_data(settings, tokenizer, 48, 2)
    again.train.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(expected, again.train.next_batch(40), strict=True))
    assert again.report() == data.report() and data.report()["recased_share"] > 0.2
    for change, word in (({"case_augmentation": 0.1}, "case_augmentation"), ({"validation_fraction": 0.1}, "fraction")):
        with pytest.raises(ValueError, match=word):
            open_training_data(
                recipe(corpus, **{"case_augmentation": 0.4, **change}), tokenizer, 48, 2
            ).train.load_state_dict(state)
    (corpus / "web.jsonl").write_text('{"text": "other content"}\n{"text": "altogether"}')
    with pytest.raises(ValueError, match="the data's sources"):
        open_training_data(settings, tokenizer, 48, 2).train.load_state_dict(state)


def test_seeds_change_the_order_and_nothing_else_does(corpus, tokenizer):
    first, same, other = (
        open_training_data(recipe(corpus), tokenizer, 32, seed).train.next_batch(12)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_the_embedded_corpus_carries_its_manifest_with_the_python_version(tokenizer):
    data = SimpleNamespace(sources=[{"name": "embedded", "kind": "embedded", "limit": 30}], validation_fraction=0.1)
    manifest = open_training_data(data, tokenizer, 128, 0).manifest
    assert manifest["sources"][0]["python"] == embedded_manifest()["python"]
    assert manifest["sources"][0]["documents"] == 30
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 30
    assert json.loads(json.dumps(manifest)) == manifest


def test_tokenizer_texts_come_from_all_sources_at_their_shares(corpus):
    texts = list(corpus_texts(recipe(corpus), characters=4000))
    sizes = {name: sum(len(text) for text in texts if text.startswith(name)) for name in ("web", "books", "dialog")}
    assert abs(sizes["web"] / sum(sizes.values()) - 0.5) < 0.1
    assert len(list(corpus_texts(recipe(corpus)))) == 110


def test_corpora_that_cannot_be_used_are_refused_with_the_reason(corpus, tokenizer, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n")
    one = {"name": "only", "kind": "text", "path": str(tmp_path / "empty.txt")}
    with pytest.raises(ValueError, match="source 'only' is an empty corpus"):
        open_training_data(SimpleNamespace(sources=[one]), tokenizer, 32, 0)
    (tmp_path / "empty.txt").write_text("one document")
    with pytest.raises(ValueError, match="cannot be split into training and validation"):
        open_training_data(SimpleNamespace(sources=[one]), tokenizer, 32, 0)
    with pytest.raises(ValueError, match="data.sources is empty"):
        open_training_data(SimpleNamespace(sources=[]), tokenizer, 32, 0)
    with pytest.raises(ValueError, match="sequence_length"):
        open_training_data(recipe(corpus), tokenizer, 1, 0)
    whole = open_training_data(SimpleNamespace(sources=[one], validation_fraction=0.0), tokenizer, 32, 0)
    with pytest.raises(ValueError, match="validation_fraction is 0"):
        whole.validation_rows(5)
