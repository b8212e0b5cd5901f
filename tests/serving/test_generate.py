"""`stagewise generate` as users run it: streams, files, resuming, errors."""

from __future__ import annotations

import json

import pytest

from stagewise.cli import main
from stagewise.modeling import load, load_tokenizer
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.serving import generate as room

PROMPT = "The expert of a"


def expected(folder, prompt, count, mode="full"):
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.ensure_bos(tokenizer.encode_ordinary(prompt))
    (tokens,) = decode(load(folder), [ids], mode, SamplingParams(count, stop_tokens=())).tokens
    return tokenizer.decode_bytes(tokens, skip_special_tokens=True).decode("utf-8", "replace")


def run(*arguments):
    return main(["generate", *map(str, arguments)])


@pytest.mark.parametrize("mode", ["full", "prefix:2", "stage:0", "composition:0,2", "wand", "speculative:3"])
def test_the_streamed_text_is_the_decoded_text_and_figures_go_to_stderr(served_folder, capsys, mode):
    assert run(served_folder, "--prompt", PROMPT, "--mode", mode, "--max-new-tokens", 10, "--ignore-eos") == 0
    shown = capsys.readouterr()
    assert shown.out == expected(served_folder, PROMPT, 10, mode) + "\n"
    assert "tokens/s" in shown.err and "mean depth" in shown.err
    assert ("acceptance" in shown.err) == (mode == "speculative:3")


def test_lossless_modes_print_what_full_prints_and_stages_get_a_legend(served_folder, capsys):
    texts = set()
    for mode in ("full", "speculative:2", "wand-verified", "auto"):
        arguments = ["--mode", mode, "--max-new-tokens", 10, "--ignore-eos", "--show-stages"]
        assert run(served_folder, "--prompt", PROMPT, *arguments) == 0
        shown = capsys.readouterr()
        texts.add(shown.out)
        assert "emitted by stage 0:" in shown.err
    assert len(texts) == 1


def test_a_missing_bos_is_added_and_never_a_second_one(served_folder):
    tokenizer = load_tokenizer(served_folder)
    for add_bos in (False, True):
        tokenizer = load_tokenizer(served_folder, add_bos_token=add_bos)
        for text in ("Hello", "<|bos|>Hello"):
            ids = room.prompt_ids(tokenizer, text)
            assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
        assert room.prompt_ids(tokenizer, "") == [tokenizer.bos_token_id]


def test_samples_of_one_seed_repeat_and_differ_among_each_other(served_folder, capsys):
    arguments = ["--prompt", PROMPT, "--temperature", 1, "--seed", 5, "--n", 2, "--max-new-tokens", 10, "--ignore-eos"]
    outputs = []
    for _ in range(2):
        assert run(served_folder, *arguments) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]
    first, second = outputs[0].split("--- sample 1\n")
    assert first.removeprefix("--- sample 0\n") != second


def test_a_stop_string_ends_the_text(served_folder, capsys):
    text = expected(served_folder, PROMPT, 12)
    stop = text[3:5]
    arguments = ["--max-new-tokens", 12, "--ignore-eos", "--mode", "full"]
    assert run(served_folder, "--prompt", PROMPT, "--stop", stop, *arguments) == 0
    shown = capsys.readouterr().out.rstrip("\n")
    assert stop in shown and text.startswith(shown) and len(shown) < len(text)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [PROMPT, "def pool(", "x " * 300, "", "Stages 0, 12"]
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in lines), encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_file_of_prompts_gets_a_line_each_and_a_bad_one_its_error(served_folder, prompts, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    arguments = ["--mode", "speculative:3", "--max-new-tokens", 8, "--ignore-eos", "--max-batch", 2]
    assert run(served_folder, "--prompts", prompts, "--out", out, *arguments) == 0
    rows = read(out)
    assert [row["index"] for row in rows] == [0, 1, 2, 3, 4]
    assert "context" in rows[2]["error"] and rows[2]["finish"] == "error"
    for i in (0, 1, 4):
        assert rows[i]["error"] is None
        assert rows[i]["text"] == expected(served_folder, rows[i]["prompt"], 8)
        assert len(rows[i]["tokens"]) == len(rows[i]["stages_used"]) == 8
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.jsonl", "prompts.jsonl"]
    assert "1 errors" in capsys.readouterr().err
    assert run(served_folder, "--prompts", prompts, "--out", out, *arguments) == 2
    assert "--overwrite" in capsys.readouterr().err


def file_settings():
    return Strategy(), SamplingParams(6, temperature=1.0, seed=3, stop_tokens=())


def test_a_stopped_run_goes_on_and_ends_in_the_same_file(served_folder, tmp_path, monkeypatch):
    model, tokenizer = room.load_for_inference(str(served_folder))
    texts = [PROMPT, "def", "Stages", "naïve", "token"]
    strategy, params = file_settings()
    whole = tmp_path / "whole.jsonl"
    room.generate_file(model, tokenizer, texts, strategy, params, whole, max_batch=2)

    out = tmp_path / "out.jsonl"
    add, calls = room.Ledger.add, []

    def dies(self, finished):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        add(self, finished)

    monkeypatch.setattr(room.Ledger, "add", dies)
    with pytest.raises(KeyboardInterrupt):
        room.generate_file(model, tokenizer, texts, strategy, params, out, max_batch=2)
    assert not out.exists()
    part = tmp_path / "out.jsonl.part"
    part.write_text(part.read_text(encoding="utf-8") + '{"index": 3, "ro', encoding="utf-8")  # a torn last line
    seen = []
    monkeypatch.setattr(room.Ledger, "add", lambda self, finished: (seen.extend(finished), add(self, finished)))
    room.generate_file(model, tokenizer, texts, strategy, params, out, max_batch=3)
    assert seen == [2, 3, 4]
    assert out.read_bytes() == whole.read_bytes()
    assert not part.exists()


def test_remains_of_other_settings_are_not_gone_on_from(tmp_path):
    out = tmp_path / "out.jsonl"
    first = room.Ledger(out, {"mode": "full"})
    first.add({0: [{"index": 0}]})
    assert room.Ledger(out, {"mode": "full"}).lines == {0: [{"index": 0}]}
    assert room.Ledger(out, {"mode": "wand"}).lines == {}


@pytest.mark.parametrize("arguments, message", [
    (["--prompt", "x", "--mode", "fast"], "unknown mode 'fast'"),
    (["--prompt", "x", "--mode", "stage:7"], "stage=7 is out of range"),
    ([], "--prompt"),
    (["--prompt", "x", "--prompts", "f", "--out", "o"], "either"),
    (["--prompts", "missing.txt", "--out", "o"], "missing.txt"),
    (["--prompt", "x", "--max-new-tokens", "0"], "max_new_tokens=0"),
    (["--prompt", "x", "--max-new-tokens", "500"], "context"),
    (["--prompt", "x", "--specialist", "tool"], "NAME=PATH"),
])  # fmt: skip
def test_wrong_input_is_one_line_and_status_2(served_folder, capsys, arguments, message):
    assert run(served_folder, *arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_end_to_end_models_have_one_mode(end_to_end_served_folder, capsys):
    assert run(end_to_end_served_folder, "--prompt", PROMPT, "--max-new-tokens", 4) == 0
    capsys.readouterr()
    assert run(end_to_end_served_folder, "--prompt", PROMPT, "--mode", "prefix:1") == 2
    assert "no valid intermediate experts" in capsys.readouterr().err
