"""`stagewise tokenizer train`: what it reads, and the folder it writes."""

import gzip

import pytest

from stagewise.tokenizer import load_tokenizer
from stagewise.training.tokenizer_command import read_documents, train

TEXT = "The expert of a stage predicts the next token; every stage is an expert.\nÜber naïve Köpfe, 東京 🙂\n" * 8


def test_invalid_utf8_names_file_and_offset(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine line\nbroken \xff here\n")
    with pytest.raises(ValueError, match=r"bad\.txt: invalid UTF-8 at byte 17"):
        train(str(bad), vocab_size=300, out=tmp_path / "out")


def test_documents_come_from_globs_folders_jsonl_and_gzip(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbffirst\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("größer\n".encode()))
    (tmp_path / "c.jsonl").write_text('{"body": "one"}\n\n{"body": "two"}\n')
    everything = {"first\n", "größer\n", "one", "two"}
    assert set(read_documents([str(tmp_path)], text_key="body")) == everything
    texts = list(read_documents([str(tmp_path / "*.txt*"), str(tmp_path / "c.jsonl")], text_key="body"))
    assert texts == ["first\n", "größer\n", "one", "two"]


def test_max_bytes_stops_at_a_character(tmp_path):
    (tmp_path / "a.txt").write_text("ééé")
    assert "".join(read_documents([str(tmp_path / "a.txt")], max_bytes=5)) == "éé"
    with pytest.raises(ValueError, match="max_bytes"):
        read_documents([str(tmp_path / "a.txt")], max_bytes=0)


def test_embedded_corpus_is_read_when_nothing_is_named():
    assert len("".join(read_documents([], max_bytes=10_000)).encode()) == 10_000


def test_missing_file_is_an_error_before_training(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(str(tmp_path / "nowhere*.txt"), vocab_size=300, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_it_writes_a_folder_that_loads(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    train(str(tmp_path / "*.txt"), vocab_size=320, out=tmp_path / "out", add_bos=True)
    loaded = load_tokenizer(tmp_path / "out")
    assert len(loaded) == 320 and loaded.add_bos_token
    assert "320 tokens" in capsys.readouterr().out
