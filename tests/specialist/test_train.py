from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from stagewise.modeling import load
from stagewise.recipe import load_recipe
from stagewise.specialist import train
from stagewise.specialist.growth import trainable_names
from stagewise.specialist.train import build_trainer, dry_run, train_specialist


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_leaves_the_base_as_it_is_and_writes_a_complete_delta(base_folder, recipe_for, tmp_path):
    parent = base_folder("staged")
    before = (parent / "model.safetensors").read_bytes()
    outcome = train_specialist(recipe_for(parent, training__steps=12), tmp_path / "run", quiet=True)
    assert (parent / "model.safetensors").read_bytes() == before
    rows = rows_of(tmp_path / "run")
    validation = [row for row in rows if "bits_per_assistant_token" in row]
    assert [row["step"] for row in validation] == [3, 6, 9, 12]
    assert validation[-1]["bits_per_assistant_token"] < validation[0]["bits_per_assistant_token"]
    assert validation[-1]["final_path_bpb"] > 0 and len(validation[-1]["samples"]) == 2
    model = load(outcome.model)
    base = load(parent)
    for name, tensor in base.state_dict().items():
        mine = model.state_dict()[name]
        assert torch.equal(mine[: len(tensor)] if name.endswith("lambdas") else mine, tensor)
    facts = model.config.stage_training
    assert facts["steps"] == 12 and facts["conversations"] == 112 and facts["held_out"] == 8
    assert len(facts["validation"]) == 4
    assert facts["trainable_parameters"] == sum(model.get_parameter(n).numel() for n in trainable_names(model))
    assert (outcome.model / "tokenizer.json").is_file() and (outcome.model / "modeling_poe.py").is_file()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_run_ends_with_the_same_bits(base_folder, recipe_for, tmp_path, dtype):
    recipe = recipe_for(base_folder("staged"), training__dtype=dtype)
    whole = train_specialist(recipe, tmp_path / "whole", quiet=True)
    trainer = build_trainer(recipe, tmp_path / "parts", quiet=True)
    trainer.pace.steps = 3
    trainer.fit()
    (tmp_path / "parts" / "model").rename(tmp_path / "aside")
    again = train_specialist(recipe, tmp_path / "parts", resume=True, quiet=True)
    one, two = load_file(whole.model / "delta.safetensors"), load_file(again.model / "delta.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_a_frozen_tensor_that_changes_ends_the_run_in_an_error(base_folder, recipe_for, tmp_path, monkeypatch):
    class Careless(train.SpecialistCompute):
        def refresh(self):
            super().refresh()
            with torch.no_grad():
                self.master.lm_head.weight[0, 0] += 1.0

    monkeypatch.setattr(train, "SpecialistCompute", Careless)
    with pytest.raises(RuntimeError, match="frozen tensor changed"):
        train_specialist(recipe_for(base_folder("staged"), training__steps=1), None, quiet=True)


def test_two_ranks_train_what_one_rank_trains(base_folder, recipe_for, tmp_path):
    import subprocess
    import sys

    recipe = recipe_for(base_folder("staged"), training__micro_batch=2)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    alone = train_specialist(load_recipe(file), tmp_path / "one", quiet=True)
    program = "import sys; from stagewise.specialist.commands import specialise; from pathlib import Path; " \
        "specialise(sys.argv[1], out=Path(sys.argv[2]), device='cpu', quiet=True)"  # fmt: skip
    (tmp_path / "go.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(tmp_path / "go.py"), str(file), str(tmp_path / "two")],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    losses = [[row["loss"] for row in rows_of(tmp_path / n) if "loss" in row] for n in ("one", "two")]
    assert losses[0][:2] == pytest.approx(losses[1][:2], abs=1e-5)
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)  # rounding, which orthogonalised updates amplify
    assert alone.step == 6


def test_a_run_refuses_what_does_not_fit(base_folder, recipe_for, tmp_path):
    parent = base_folder("staged")
    with pytest.raises(ValueError, match="the recipe's model has intermediate_size"):
        build_trainer(recipe_for(parent, model__intermediate_size=64))
    with pytest.raises(FileNotFoundError, match="no model folder"):
        build_trainer(recipe_for("./missing"))
    train_specialist(recipe_for(parent, training__steps=1), tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        build_trainer(recipe_for(parent, training__steps=1), tmp_path / "run")
    with pytest.raises(ValueError, match="specialist.head_lr"):
        build_trainer(recipe_for(parent, training__steps=1, specialist__head_lr=0.5), tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="has no specialist section"):
        train_specialist(load_recipe("quickstart"))


@pytest.mark.parametrize(
    ("name", "trainable", "tensors"),
    [
        ("stage-chat", 106_954_804, 15),
        ("stage-tool", 163_577_912, 27),
        ("stage-math", 163_577_912, 27),
        ("stage-code", 163_577_912, 27),
    ],
)
def test_released_recipes_are_built_on_the_meta_device(name, trainable, tensors):
    text = dry_run(load_recipe(name))
    assert f"{trainable:,} train" in text and f"{tensors} train" in text
    assert "rate        head     7.07e-05, decay 0.1" in text
