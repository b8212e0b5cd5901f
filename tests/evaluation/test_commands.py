from __future__ import annotations

import json

import pytest

from stagewise.evaluation.commands import evaluate, inspect, probe
from stagewise.modeling import load


@pytest.fixture
def text_file(tmp_path, sample_text):
    path = tmp_path / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in sample_text.splitlines() * 3 if line))
    return str(path)


def test_evaluating_two_models_writes_reports_a_paired_difference_and_provenance(
    model_folder, end_to_end_folder, text_file, tmp_path, capsys
):
    out = tmp_path / "results" / "compared.json"
    models = str(model_folder), str(end_to_end_folder)
    evaluate(*models, data=[text_file], json=out, resamples=50, seed=3, device="cpu")
    result = json.loads(out.read_text())
    staged, whole = result["models"]
    assert staged["tokens"] == whole["tokens"] > 100 and staged["documents"] == result["data"]["documents"] == 12
    assert staged["bytes"] == whole["bytes"] == result["data"]["bytes"]
    assert "product_bpb" in staged and "product_bpb" not in whole
    gap = whole["final_path_bpb"] - staged["product_bpb"]
    assert result["difference"]["default_output_bpb"]["difference"] == pytest.approx(gap)
    assert result["seed"] == 3 and result["setting"]["resamples"] == 50 and len(result["data"]["sha256"]) == 64
    assert {"torch", "transformers", "python"} <= set(result["versions"]) and "commit" in result
    printed = capsys.readouterr().out
    for word in ("stage 0 alone", "product of all", "entropy-weighted", "final path", "paired by document", "ECE"):
        assert word in printed


def test_the_number_of_tokens_is_what_was_asked_for_and_a_whole_document(model_folder, text_file, tmp_path):
    out = tmp_path / "few.json"
    evaluate(str(model_folder), data=[text_file], tokens=60, json=out, resamples=10, device="cpu")
    report = json.loads(out.read_text())["models"][0]
    assert 60 <= report["tokens"] < 160 and report["documents"] < 12


def test_evaluation_is_the_same_twice(model_folder, text_file, tmp_path):
    found = []
    for name in ("one", "two"):
        evaluate(str(model_folder), data=[text_file], json=tmp_path / name, resamples=20, device="cpu")
        found.append(json.loads((tmp_path / name).read_text()))
        found[-1].pop("created")
    assert found[0] == found[1]


def test_a_model_that_is_not_there_and_an_empty_list_are_refused(text_file, tmp_path):
    with pytest.raises(ValueError, match="name at least one model"):
        evaluate(data=[text_file])
    with pytest.raises(ValueError, match="name at least one model"):
        probe()
    with pytest.raises((FileNotFoundError, OSError, ValueError)):
        evaluate(str(tmp_path / "absent"), data=[text_file])


def test_probing_prints_texts_and_a_grid_by_checkpoint(model_folder, end_to_end_folder, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Early\t exits\nThe\n")
    out = tmp_path / "probes.json"
    models = str(model_folder), str(end_to_end_folder)
    probe(*models, prompts=prompts, modes=["full"], max_new_tokens=4, json=out, device="cpu")
    result = json.loads(out.read_text())
    assert [len(report["probes"]) for report in result["models"]] == [2, 2]
    assert result["models"][0]["summary"]["ranks"]["targets"] == 1
    printed = capsys.readouterr().out
    assert "wins/ties/losses" in printed and "greedy text, mode full" in printed


def test_a_preset_is_inspected_without_weights(tmp_path, capsys):
    inspect("poe-3b", context=512, json=tmp_path / "costs.json")
    result = json.loads((tmp_path / "costs.json").read_text())
    assert result["parameters"] == 3_019_900_506 and result["context"] == 512
    assert "poe-3b: 3,019,900,506 parameters" in capsys.readouterr().out


def test_a_folder_is_inspected_with_its_heads_and_a_beta_sweep(model_folder, text_file, tmp_path, capsys):
    out = tmp_path / "inspection.json"
    inspect(str(model_folder), beta_sweep=100, data=[text_file], json=out)
    result = json.loads(out.read_text())
    assert result["parameters"] == sum(p.numel() for p in load(model_folder).parameters())
    assert len(result["lambdas"]) == 3 and len(result["heads"]["unique"]) == 3
    assert len(result["heads"]["loading_tokens"][0]["positive"]) == 12
    assert [entry["beta"] for entry in result["beta_sweep"]["all"]] == [0.0, 0.5, 1.0, 1.5, 2.0]
    assert result["beta_sweep"]["tokens"] >= 100
    assert "without head 2" in capsys.readouterr().out


def test_an_end_to_end_model_is_inspected_without_stage_heads(end_to_end_folder, tmp_path):
    inspect(str(end_to_end_folder), json=tmp_path / "inspection.json")
    result = json.loads((tmp_path / "inspection.json").read_text())
    assert "heads" not in result and [mode["name"] for mode in result["modes"]] == ["final path"]
