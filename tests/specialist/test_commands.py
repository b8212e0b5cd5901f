from __future__ import annotations

import json

import pytest
import torch

from stagewise.cli import main
from stagewise.modeling import load
from stagewise.specialist.delta import delta_tensors, write_delta
from stagewise.specialist.demonstration import show_calls
from stagewise.specialist.growth import grow, open_parent


def test_specialise_trains_once_and_shows_what_it_has_the_second_time(base_folder, recipe_for, tmp_path, capsys):
    file = tmp_path / "sums.yaml"
    file.write_text(recipe_for(base_folder("staged"), training__steps=2, training__eval_every=0).to_yaml())
    assert main(["specialise", str(file), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "2 layers on" in out and "bits per assistant token" in out and "trained 2 steps" in out
    assert main(["specialise", str(file), "--out", str(tmp_path / "run"), "--device", "cpu"]) == 0
    assert "reusing" in capsys.readouterr().out
    assert main(["specialise", str(file), "--dry-run"]) == 0
    assert "tensors     15 train" in capsys.readouterr().out
    assert load(tmp_path / "run" / "model").config.stage_training["steps"] == 2
    changed = ["--set", "training.steps=3"]
    assert main(["specialise", str(file), "--out", str(tmp_path / "run"), *changed]) == 2
    assert "already holds checkpoints" in capsys.readouterr().err


def test_convert_delta_and_fold_write_folders_that_load(base_folder, tokenizer, tmp_path, capsys):
    base = base_folder("shared")
    parent = open_parent(base)
    model = grow(parent, 1, tokenizer=tokenizer)
    torch.save(delta_tensors(model, reference_layout=True), tmp_path / "stage.pt")
    assert main(["convert-delta", str(tmp_path / "stage.pt"), str(tmp_path / "d"), "--parent", str(base)]) == 0
    assert main(["fold", str(tmp_path / "d"), str(tmp_path / "flat"), "--single-path", "--dtype", "bfloat16"]) == 0
    assert load(tmp_path / "flat").dtype == torch.bfloat16
    assert main(["fold", str(base), str(tmp_path / "none")]) == 2
    assert "nothing to fold" in capsys.readouterr().err


def test_the_demonstration_counts_and_keeps_the_rates(base_folder, tokenizer, tmp_path, capsys):
    from stagewise.modeling import PoEForCausalLM

    wide = load(base_folder("staged"))
    config = type(wide.config)(**{**{k: getattr(wide.config, k) for k in (
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "num_hidden_layers", "vocab_size",
        "poe_stage_layers", "per_stage_head", "poe_mode",
    )}, "max_position_embeddings": 2048})  # fmt: skip
    base = tmp_path / "base"
    PoEForCausalLM(config).init_weights(0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    parent = open_parent(base)
    folder = write_delta(tmp_path / "tools", grow(parent, 1, tokenizer=tokenizer), tokenizer, parent)
    found = show_calls(folder, count=4)
    out = capsys.readouterr().out
    assert "functions that training never showed" in out and "constrained" in out
    assert found["constrained"]["valid_of_calls"] in (None, 1.0)
    assert json.loads((folder / "eval" / "tools.json").read_text())["rates"] == found


@pytest.mark.parametrize("command", ["specialise", "convert-delta", "fold", "chat"])
def test_help_has_an_example(command, capsys):
    main([command, "--help"])
    assert "Example:" in capsys.readouterr().out
