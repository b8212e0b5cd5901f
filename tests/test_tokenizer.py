"""Training a tokenizer and writing its release files."""

import json

import pytest
import tiktoken
import torch
from tokenizers import Tokenizer

from stagewise.modeling.byte_encoding import SPECIAL_TOKENS
from stagewise.tokenizer import (
    save_release_files,
    train_tokenizer,
)

TEXT = (
    "The expert of a stage predicts the next token; every stage is an expert.\n\nStages 0, 12 and 345 don't agree:\n"
    "    for i in range(2048):\n        print(i * 1000)\nÜber naïve Köpfe, 東京は日本の首都です。 नमस्ते दुनिया 🙂\n"
) * 3


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], 360)


def test_vocabulary_has_the_size_asked_for_and_ends_in_the_nine_special_tokens(tokenizer):
    assert len(tokenizer) == tokenizer.vocab_size == 360
    assert list(tokenizer.special_ids.items()) == [(token, 351 + i) for i, token in enumerate(SPECIAL_TOKENS)]


def test_training_is_deterministic(tokenizer):
    again = train_tokenizer(iter([TEXT]), 360)
    assert again.token_bytes == tokenizer.token_bytes


def test_digits_are_never_grouped_by_more_than_two():
    tokenizer = train_tokenizer(["123456 " * 50], 256 + 9 + 3)
    digits = [token for token in tokenizer.token_bytes if token.strip().isdigit() and len(token) > 1]
    assert digits and all(len(token) == 2 and not token.startswith(b" ") for token in digits)


def test_combining_marks_stay_with_their_letters():
    tokenizer = train_tokenizer(["नमस्ते " * 50], 279)
    assert " नमस्ते".encode() in tokenizer.token_bytes


def test_release_files_agree_with_each_other(tokenizer, tmp_path):
    written = save_release_files(tokenizer, tmp_path)
    names = {"tokenizer.json", "tokenizer.pkl", "token_bytes.pt", "tokenizer_config.json", "special_tokens_map.json"}
    assert {path.name for path in written} == names
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    lengths = torch.load(tmp_path / "token_bytes.pt", weights_only=True)
    assert lengths.dtype == torch.int32 and lengths.shape == (360,)
    assert lengths[:351].tolist() == [len(token) for token in tokenizer.token_bytes[:351]]
    assert lengths[351:].tolist() == [0] * 9
    bare = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert bare.encode(TEXT).ids == tokenizer.encode_ordinary(TEXT)
    assert bare.encode("<|user_start|>x").ids[0] == 352
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["add_bos_token"] is False and config["tokenizer_class"] == "PoETokenizer"
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_poe.PoETokenizer", None]}
    assert not {"name_or_path", "is_local", "local_files_only", "encoding_file", "tokenizer_file"} & set(config)
    special = json.loads((tmp_path / "special_tokens_map.json").read_text())
    assert special["bos_token"] == special["eos_token"] == special["pad_token"] == "<|bos|>"
    assert sorted({special["bos_token"], *special["additional_special_tokens"]}) == sorted(SPECIAL_TOKENS)


def test_pickled_encoding_is_the_one_tiktoken_reads(tokenizer, tmp_path):
    import pickle

    save_release_files(tokenizer, tmp_path)
    encoding = pickle.loads((tmp_path / "tokenizer.pkl").read_bytes())
    assert isinstance(encoding, tiktoken.Encoding)
    assert encoding.encode(TEXT + "<|bos|>", allowed_special="all") == tokenizer(TEXT + "<|bos|>").input_ids


@pytest.mark.parametrize("size", [0, 255, 264])
def test_vocabulary_smaller_than_bytes_and_special_tokens_is_an_error(size):
    with pytest.raises(ValueError, match=f"vocab_size {size} is smaller than 265"):
        train_tokenizer([TEXT], size)


def test_smallest_vocabulary_encodes_bytes():
    assert train_tokenizer([TEXT], 265).encode_ordinary("é") == list("é".encode())


@pytest.mark.parametrize("texts", [[], [""], ["", ""]])
def test_empty_corpus_is_an_error(texts):
    with pytest.raises(ValueError, match="empty corpus"):
        train_tokenizer(texts, 300)


def test_vocabulary_larger_than_the_corpus_supports_is_an_error_that_says_how_many_it_does():
    with pytest.raises(ValueError, match="at 269 tokens"):
        train_tokenizer(["stage"], 369)
    assert len(train_tokenizer(["stage"], 269)) == 269


def test_half_a_surrogate_pair_in_a_document_is_an_error():
    with pytest.raises(ValueError, match="document 1 is no valid Unicode"):
        train_tokenizer(["fine", "a\ud800"], 300)


def test_very_long_runs_of_blanks_train(tokenizer):
    text = " " * 1_200_000 + "x"
    assert train_tokenizer([text, TEXT], 300).decode_bytes(tokenizer.encode_ordinary("x")) == b"x"
    assert tokenizer.decode_bytes(tokenizer.encode_ordinary(text)) == text.encode()
    assert tokenizer.encode_batch_ordinary([text, "a b"]) == [
        tokenizer.encode_ordinary(text),
        tokenizer.encode_ordinary("a b"),
    ]
