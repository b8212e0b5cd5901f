from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from stagewise.calibration.commands import calibrate
from stagewise.calibration.exits import exit_statistics
from stagewise.calibration.suite import calibrate_model, draw_prompts, greedy_continuations, split_documents
from stagewise.modeling import load, load_tokenizer
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy

QUICK = {"prompts": 90, "prompt_tokens": 6, "new_tokens": 6, "allow_fewer_tokens": True, "tokens": 400}


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    words = "stage expert pool exit draft token margin bound agrees differs early late".split()
    generator = np.random.default_rng(0)
    lines = [" ".join(generator.choice(words, 40)) for _ in range(150)]
    path = tmp_path_factory.mktemp("text") / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def folder(tmp_path, small_model_folder):
    return small_model_folder(tmp_path / "model")


def test_prompts_and_measured_text_are_disjoint_and_enough():
    texts = [f"{i:03d}" * 10 for i in range(100)]
    for_prompts, measured = split_documents(iter(texts), lambda text: list(text.encode()), 600, 5, 20)
    assert sum(len(ids) for _, ids in measured) >= 600 and len(for_prompts) == 5
    assert not {text for text, _ in for_prompts} & {text for text, _ in measured}
    few, rest = split_documents(iter(texts[:9]), lambda text: list(text.encode()), 10_000, 5, 20)
    assert (len(few), len(rest)) == (1, 8)


def test_prompts_spread_over_documents_before_any_gives_a_second():
    documents = [list(range(100 * i, 100 * i + 50)) for i in range(4)]
    drawn = draw_prompts(documents, 6, 10, seed=0)
    assert sorted(ids[0] // 100 for ids in drawn[:4]) == [0, 1, 2, 3] and len(drawn) == 6
    everything = draw_prompts(documents, 1000, 10, seed=0)
    assert len({token for ids in everything for token in ids}) == 10 * len(everything) == 200
    assert draw_prompts(documents, 6, 10, seed=0) == drawn != draw_prompts(documents, 6, 10, seed=1)
    assert draw_prompts([], 3, 10, seed=0) == []


def test_acceptance_is_that_of_real_speculation(folder, text_file):
    result = calibrate_model(str(folder), [text_file], draft_lengths=[1, 3], device="cpu", **QUICK)
    model, tokenizer = load(folder), load_tokenizer(folder)
    texts = [json.loads(line)["text"] for line in open(text_file)]
    documents, _ = split_documents(texts, tokenizer.encode_ordinary, 400, 90, 6)
    prompts = [[tokenizer.bos_token_id, *ids] for ids in draw_prompts([ids for _, ids in documents], 90, 6, 0)]
    params = SamplingParams(max_new_tokens=6, stop_tokens=())
    for row in result["speculation"]["rows"]:
        strategy = Strategy("speculative", draft_stage=row["draft_stage"], k_draft=row["k_draft"])
        real = decode(model, prompts, strategy, params)
        assert (row["accepted"], row["drafted"]) == (real.accepted, real.drafted)


def test_the_certificates_losses_are_those_of_real_unverified_wand(folder, text_file):
    model, tokenizer = load(folder), load_tokenizer(folder)
    texts = [json.loads(line)["text"] for line in open(text_file)][:20]
    prompts = [[tokenizer.bos_token_id, *tokenizer.encode_ordinary(text)[:6]] for text in texts]
    rows = greedy_continuations(model, prompts, 6)
    inputs, targets = (torch.tensor([row[i] for row in rows]) for i in (0, 1))
    statistics = exit_statistics(model, [(inputs, targets, torch.arange(20))])
    from stagewise.calibration.certificate import prompt_losses

    bounds = [0.5, 0.5]
    losses, _ = prompt_losses(statistics, bounds, [1.0, 0.4], "text")
    params = SamplingParams(max_new_tokens=6, stop_tokens=())
    full = decode(model, prompts, "full", params).tokens
    for row, safety in zip(losses, (1.0, 0.4), strict=True):
        early = decode(model, prompts, Strategy("wand", safety=safety, p99_bounds=tuple(bounds)), params).tokens
        assert row.tolist() == [float(a != b) for a, b in zip(early, full, strict=True)]
    assert losses.sum() > 0


def test_calibrating_writes_bounds_and_certificate_that_decoding_reads(folder, text_file, capsys):
    before = json.loads((folder / "config.json").read_text())
    calibrate(str(folder), data=[text_file], epsilon=0.3, delta=0.1, device="cpu", **QUICK)
    config = json.loads((folder / "config.json").read_text())
    report = json.loads((folder / "calibration.json").read_text())
    assert config == {**before, "poe_wand_p99_bounds_per_stage_head": report["p99_bounds"]}
    assert report["tokens"] == 400 and report["seed"] == 0 and "torch" in report["versions"]
    assert [row["cap"] for row in report["routing"]] == [0.005, 0.005, 0.01, 0.01, 0.02, 0.02, 0.05, 0.05]
    certificate = json.loads((folder / "certificate.json").read_text())
    assert certificate == report["certificate"] and certificate["p_value"] <= 0.1
    model = load(folder)
    prompt = torch.tensor([[311, 5, 6, 7]])
    settings = {"max_new_tokens": 8, "return_stages_used": True}
    ids, stages = model.generate_wand(prompt, certificate=folder / "certificate.json", **settings)
    by_safety = model.generate_wand(prompt, safety=certificate["safety"], **settings)
    assert torch.equal(ids, by_safety[0]) and torch.equal(stages, by_safety[1])
    printed = " ".join(capsys.readouterr().out.split())
    assert "certificate: with probability 0.9" in printed and "exit bounds" in printed


def test_results_are_the_same_for_a_seed(folder, text_file):
    one, two = (calibrate_model(str(folder), [text_file], device="cpu", **QUICK) for _ in range(2))
    for varying in ("created",):
        one.pop(varying), two.pop(varying)
    assert one == two


def test_a_dry_run_stores_nothing_and_a_stale_certificate_goes(folder, text_file):
    (folder / "certificate.json").write_text("{}")
    names = {path.name for path in folder.iterdir()}
    calibrate(str(folder), data=[text_file], dry_run=True, device="cpu", **QUICK)
    assert {path.name for path in folder.iterdir()} == names
    calibrate(str(folder), data=[text_file], epsilon=0.001, device="cpu", **QUICK)  # 90 prompts cannot certify this
    report = json.loads((folder / "calibration.json").read_text())
    assert "at least 2995 prompts" in report["no_certificate"] and not (folder / "certificate.json").exists()


def test_bad_input_is_named(folder, text_file, small_model_folder, tmp_path):
    with pytest.raises(ValueError, match="at least 131,072 tokens"):
        calibrate(str(folder), data=[text_file], device="cpu")
    with pytest.raises(ValueError, match="at least 131,072 tokens, the text holds 400"):
        calibrate(str(folder), data=[text_file], tokens=400, device="cpu")
    with pytest.raises(ValueError, match="prompts=0"):
        calibrate(str(folder), data=[text_file], device="cpu", **{**QUICK, "prompts": 0})
    with pytest.raises(ValueError, match="exceed the context"):
        calibrate(str(folder), data=[text_file], device="cpu", **{**QUICK, "new_tokens": 500})
    whole = small_model_folder(tmp_path / "whole", poe_mode="none", per_stage_head=False)
    with pytest.raises(ValueError, match="poe_mode is none"):
        calibrate(str(whole), data=[text_file], device="cpu", **QUICK)
    with pytest.raises(FileNotFoundError):
        calibrate(str(folder), data=[str(tmp_path / "absent.txt")], device="cpu", **QUICK)
