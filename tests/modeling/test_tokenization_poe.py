"""PoETokenizer: bos rules, bytes, files, hostile pickles, and the lines of the model cards."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import tiktoken
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.modeling.byte_encoding import SPECIAL_TOKENS, read_encoding
from stagewise.modeling.tokenization_poe import PoETokenizer, load_tokenizer
from stagewise.tokenizer import SPLIT_PATTERN, save_release_files, train_tokenizer

TEXT = (
    "The capital of France is Paris. What's 12 * 345? I'LL say 4140!\n\n  def f(x):\n\treturn x ** 2\n"
    "Über naïve Köpfe, 東京は日本の首都です。 대한민국의 수도는 서울 नमस्ते 🙂🙂\n"
) * 3
BASE = train_tokenizer([TEXT], 340)
WITH_BOS = train_tokenizer([TEXT], 340, add_bos_token=True)
BOS = 331
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)
TRICKY_TEXT = st.lists(
    st.sampled_from([*SPECIAL_TOKENS, "<|", "|>", "bos", " ", "\n", "x", "é", "1", "<|endoftext|>"])
).map("".join)


@pytest.fixture
def folder(tmp_path):
    save_release_files(WITH_BOS, tmp_path / "ours")
    return tmp_path / "ours"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(ANY_TEXT | TRICKY_TEXT)
def test_both_engines_give_the_same_ids(text):
    assert BASE(text).input_ids == BASE.encoding.encode(text, allowed_special="all")
    assert BASE(text, split_special_tokens=True).input_ids == BASE.encode_ordinary(text)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=40))
def test_every_byte_string_survives_encode_bytes_and_decode_bytes(data):
    ids = BASE.encode_bytes(data)
    assert BASE.decode_bytes(ids) == data
    assert BASE.decode(ids) == data.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 339), max_size=20))
def test_decode_replaces_invalid_utf8_of_any_ids(ids):
    assert BASE.decode(ids) == BASE.decode_bytes(ids).decode("utf-8", "replace")
    kept = BASE.decode_bytes(ids, skip_special_tokens=True)
    assert BASE.decode(ids, skip_special_tokens=True) == kept.decode("utf-8", "replace")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(TRICKY_TEXT)
def test_ordinary_encoding_never_yields_a_special_id(text):
    ids = BASE.encode_ordinary(text)
    assert BASE.decode_bytes(ids) == text.encode()
    assert not set(ids) & set(BASE.special_ids.values())
    assert BASE.encode_batch_ordinary([text, "a"], num_threads=2) == [ids, BASE.encode_ordinary("a")]


@pytest.mark.parametrize("bad", [-1, 340])
def test_id_outside_the_vocabulary_is_an_error(bad):
    with pytest.raises(ValueError, match=f"token id {bad} is outside the vocabulary of 340"):
        BASE.decode_bytes([1, bad])


def test_lone_surrogates_are_replaced_by_ordinary_encoding():
    assert BASE.decode_bytes(BASE.encode_ordinary("a\ud83d")) == "a\ufffd".encode()


def test_byte_lengths_count_raw_bytes_and_nothing_for_special_tokens():
    lengths = BASE.token_byte_lengths
    assert lengths.dtype == torch.int64 and lengths.shape == (340,)
    assert lengths[BOS:].tolist() == [0] * 9
    assert lengths[torch.tensor(BASE.encode_ordinary(TEXT))].sum().item() == len(TEXT.encode())


# ---- bos ------------------------------------------------------------------------------------------------------------


def test_exactly_one_bos_where_the_release_adds_it():
    plain = BASE("hello").input_ids
    assert BOS not in plain
    assert WITH_BOS("hello").input_ids == [BOS, *plain]
    assert WITH_BOS("<|bos|>hello").input_ids == [BOS, *plain]
    assert WITH_BOS.encode("<|bos|>hello", return_tensors="pt").tolist() == [[BOS, *plain]]
    assert WITH_BOS(["hello", "<|bos|>hello"]).input_ids == [[BOS, *plain]] * 2
    assert WITH_BOS([["he", "llo"], ["<|bos|>he", "llo"]], is_split_into_words=True).input_ids[1].count(BOS) == 1
    assert WITH_BOS("<|bos|>hello", "pair").input_ids.count(BOS) == 1
    assert WITH_BOS([("<|bos|>hello", "pair"), ("hello", "pair")]).input_ids[0].count(BOS) == 1
    assert WITH_BOS("").input_ids == [BOS]


def test_no_bos_where_the_release_adds_none_or_special_tokens_are_off():
    assert BASE("<|bos|>hello").input_ids == [BOS, *BASE("hello").input_ids]
    assert WITH_BOS("hello", add_special_tokens=False).input_ids == BASE("hello").input_ids
    assert WITH_BOS.encode("<|bos|>hello", add_special_tokens=False) == [BOS, *BASE("hello").input_ids]


def test_literal_bos_text_is_text_when_special_tokens_are_split():
    ids = WITH_BOS("<|bos|>x", split_special_tokens=True).input_ids
    assert ids == [BOS, *BASE.encode_ordinary("<|bos|>x")]


def test_ensure_bos_adds_one_and_never_a_second():
    assert BASE.ensure_bos([5, 6]) == BASE.ensure_bos([BOS, 5, 6]) == [BOS, 5, 6]
    assert BASE.ensure_bos(torch.tensor([])) == [BOS]


def test_batches_are_padded_on_the_left_with_masked_bos():
    batch = BASE(["a", "abc abc"], padding=True, return_tensors="pt")
    width = batch.input_ids.shape[1]
    assert batch.input_ids[0].tolist() == [BOS] * (width - 1) + BASE.encode("a")
    assert batch.attention_mask[0].tolist() == [0] * (width - 1) + [1]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_stop_ids_are_bos_for_bases_and_assistant_end_first_for_specialists():
    assert BASE.base_stop_ids == [BOS]
    assert BASE.chat_stop_ids == [BASE.convert_tokens_to_ids("<|assistant_end|>"), BOS]
    assert BASE.eos_token_id == BASE.bos_token_id == BASE.pad_token_id == BOS


# ---- the lines of the model cards -----------------------------------------------------------------------------------


def test_tokenizer_lines_of_the_base_cards_work(folder, tmp_path):
    tok = load_tokenizer(folder)
    ids = tok("대한민국의 수도는", return_tensors="pt").to("cpu")
    assert ids.input_ids[0, 0] == tok.bos_token_id and ids["attention_mask"].shape == ids.input_ids.shape
    assert tok.decode(ids.input_ids[0], skip_special_tokens=True) == "대한민국의 수도는"
    save_release_files(BASE, tmp_path / "plain")
    tok = load_tokenizer(tmp_path / "plain")
    ids = tok.encode("<|bos|>The capital of France is", return_tensors="pt")
    assert ids[0].tolist().count(tok.eos_token_id) == 1
    assert tok.decode(ids[0]) == "<|bos|>The capital of France is"
    prompt = "The capital of France is"
    listed = [tok.bos_token_id] + tok.encode(prompt, add_special_tokens=False)
    assert listed == ids[0].tolist() and tok.decode(torch.tensor([listed])[0].tolist()) == "<|bos|>" + prompt


def test_tokenizer_lines_of_the_specialist_cards_work():
    start, user, user_end, assistant = (BOS + i for i in range(4))
    ids = [start, user] + BASE.encode("What is the boiling point?") + [user_end, assistant]
    assert ids == BASE.render_for_completion([{"role": "user", "content": "What is the boiling point?"}])
    out = torch.tensor([ids + BASE.encode_ordinary("100 degrees")])
    assert BASE.decode(out[0, len(ids) :]) == "100 degrees"


# ---- files ----------------------------------------------------------------------------------------------------------


def test_saving_and_loading_keeps_everything(folder, tmp_path):
    first = load_tokenizer(folder)
    first(["a", "longer text"], padding=True, truncation=True, max_length=3)  # must leave no trace in the files
    first.save_pretrained(tmp_path / "again")
    for name in sorted(os.listdir(folder)):
        saved, source = tmp_path / "again" / name, folder / name
        assert saved.read_bytes() == source.read_bytes(), name
    again = load_tokenizer(tmp_path / "again")
    assert again.add_bos_token and again.padding_side == "left" and again.token_bytes == WITH_BOS.token_bytes
    assert again(TEXT).input_ids == WITH_BOS(TEXT).input_ids


def test_eos_of_a_specialist_is_kept(tmp_path):
    tokenizer = train_tokenizer([TEXT], 300, eos_token="<|assistant_end|>")
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).eos_token == "<|assistant_end|>"


def test_keyword_overrides_what_the_folder_says(folder):
    assert load_tokenizer(folder, add_bos_token=False)("a").input_ids == BASE("a").input_ids


def test_lone_tokenizer_json_still_says_whether_it_adds_bos(folder):
    (folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(folder)("a").input_ids == WITH_BOS("a").input_ids


def test_copies_and_pickles_encode_alike():
    for other in (copy.deepcopy(WITH_BOS), pickle.loads(pickle.dumps(WITH_BOS))):
        assert other("a b").input_ids == WITH_BOS("a b").input_ids
        assert other.encode_ordinary(TEXT) == WITH_BOS.encode_ordinary(TEXT)


def test_foreign_folder_with_only_a_pickle_loads(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(BASE.encoding))
    config = {"add_bos_token": True, "unk_token": "<unk>", "auto_map": {"AutoTokenizer": ["foreign.Tokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer(TEXT).input_ids == WITH_BOS(TEXT).input_ids
    assert len(tokenizer) == 340 and tokenizer.unk_token is None  # a token outside the vocabulary is not added to it
    tokenizer.save_pretrained(tmp_path / "ours")
    saved = json.loads((tmp_path / "ours" / "tokenizer_config.json").read_text())
    assert saved["auto_map"] == {"AutoTokenizer": ["tokenization_poe.PoETokenizer", None]}


def test_autotokenizer_works_in_a_process_without_the_package(folder, tmp_path):
    (folder / "tokenizer.json").rename(folder / "moved.json")  # first from the pickle alone, then from tokenizer.json
    pickled_only = tmp_path / "pickled"
    shutil.copytree(folder, pickled_only)
    (folder / "moved.json").rename(folder / "tokenizer.json")
    script = """
import json, sys
from transformers import AutoTokenizer
results = []
for folder in sys.argv[1:3]:
    tok = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    messages = [{"role": "user", "content": "<|bos|> hi"}, {"role": "assistant", "content": "yes"}]
    ids, mask = tok.render_conversation(messages)
    tok.save_pretrained(folder + "-again")
    again = AutoTokenizer.from_pretrained(folder + "-again", trust_remote_code=True)
    results.append([tok("<|bos|>hi").input_ids, ids, mask, again("hi").input_ids, type(tok).__name__])
assert "stagewise" not in sys.modules
print(json.dumps(results))
"""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(pickled_only)],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    messages = [{"role": "user", "content": "<|bos|> hi"}, {"role": "assistant", "content": "yes"}]
    expected = WITH_BOS("hi").input_ids
    ids, mask = WITH_BOS.render_conversation(messages)
    assert json.loads(run.stdout) == [[expected, ids, mask, expected, "PoETokenizer"]] * 2


def test_folder_without_tokenizer_files_is_a_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor tokenizer.pkl"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


def test_broken_tokenizer_json_is_a_clear_error(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": []}')
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a readable"):
        load_tokenizer(folder)


# ---- hostile pickles ------------------------------------------------------------------------------------------------


class Hostile:
    def __init__(self, call, *arguments):
        self.call, self.arguments = call, arguments

    def __reduce__(self):
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_and_not_executed(tmp_path, protocol):
    marker = tmp_path / "executed"
    contents = {"trap": Hostile(os.mkdir, str(marker)), "encoding": BASE.encoding}
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(contents, protocol=protocol))
    with pytest.raises(ValueError, match=r"refused.*asks for .*\.mkdir"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_trap_inside_a_genuine_encoding_is_refused_and_not_executed(tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    state = _state(name=Hostile(os.mkdir, str(marker)))
    monkeypatch.setattr(tiktoken.Encoding, "__getstate__", lambda self: state)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(BASE.encoding))
    with pytest.raises(ValueError, match=r"refused.*asks for .*\.mkdir"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("call", [eval, getattr, __import__, tiktoken.get_encoding, tiktoken.Encoding.__init__])
def test_pickle_that_asks_for_any_other_name_is_refused(tmp_path, call):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(Hostile(call, "1")))
    with pytest.raises(ValueError, match="refused"):
        read_encoding(tmp_path / "tokenizer.pkl")


@pytest.mark.parametrize("protocol", range(3, pickle.HIGHEST_PROTOCOL + 1))
def test_genuine_pickles_of_every_python_3_protocol_are_read(tmp_path, protocol):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(BASE.encoding, protocol=protocol))
    assert read_encoding(tmp_path / "tokenizer.pkl").encode_ordinary(TEXT) == BASE.encode_ordinary(TEXT)


def _state(**changes):
    state = copy.deepcopy(BASE.encoding.__getstate__())
    state.update(changes)
    return {key: value for key, value in state.items() if value is not None}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("gpt2", "does not hold name"),  # by reference: tiktoken would go and download it
        (_state(pat_str=None), "does not hold name"),
        (_state(extra=1), "does not hold name"),
        (_state(mergeable_ranks={"a": 1}), "must map bytes"),
        (_state(mergeable_ranks={b"a": 0}), "no token for 255 of the 256 bytes"),
        (_state(special_tokens={"<|bos|>": 331}), "the last nine ids"),
        (_state(special_tokens={t: 331 + i for i, t in enumerate(reversed(SPECIAL_TOKENS))}), "the last nine ids"),
        (_state(special_tokens={t: 400 + i for i, t in enumerate(SPECIAL_TOKENS)}), "not 0 to 339"),
        (_state(pat_str="("), "tokenizer.pkl"),
    ],
)
def test_pickle_with_a_wrong_state_is_refused(tmp_path, monkeypatch, state, message):
    monkeypatch.setattr(tiktoken.Encoding, "__getstate__", lambda self: state)
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(BASE.encoding))
    with pytest.raises(ValueError, match=message):
        read_encoding(tmp_path / "tokenizer.pkl")


def test_truncated_pickle_is_refused(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(BASE.encoding)[:-100])
    with pytest.raises(ValueError, match="refused"):
        read_encoding(tmp_path / "tokenizer.pkl")


def test_vocabulary_of_another_kind_is_refused(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="not a byte-level BPE"):
        PoETokenizer.from_pretrained(tmp_path)


def test_split_pattern_matches_every_character_once():
    text = "don't  STOP\n\n 12345 ñé नमस्ते\t…!?\r\n  x "
    pieces = [BASE.decode_bytes([i]) for i in train_tokenizer([text], 265).encode_ordinary(text)]
    assert b"".join(pieces) == text.encode() and BASE.encoding._pat_str == SPLIT_PATTERN
