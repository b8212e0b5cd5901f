from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from stagewise.modeling import PoEConfig, load
from stagewise.modeling.cascade import read_weights
from stagewise.specialist.delta import convert, delta_tensors, fold_to_folder, write_delta
from stagewise.specialist.growth import grow, grow_on_meta, open_parent, trainable_names


def same(found, expected):
    """Equal but for the order of sums, which may follow from where in memory a file was mapped."""
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def trained(parent, layers=2, tokenizer=None, seed=3):
    """A specialist whose new tensors all matter."""
    model = grow(parent, layers, tokenizer=tokenizer, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    first = parent.config.num_hidden_layers
    with torch.no_grad():
        for name in trainable_names(model):
            parameter = model.get_parameter(name)
            change = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter[first if name.endswith("lambdas") else 0 :] += change[first if name.endswith("lambdas") else 0 :]
    return model


@pytest.fixture
def ids():
    plain = torch.randint(0, 256, (2, 60), generator=torch.Generator().manual_seed(5))
    return torch.cat((plain, torch.arange(256, 265).expand(2, 9)), dim=1)  # chat tokens included


@pytest.mark.parametrize("reference_layout", [False, True])
def test_a_written_delta_loads_to_the_same_logits_and_leaves_base_paths_alone(
    base_folder, tokenizer, tmp_path, ids, reference_layout
):
    parent = open_parent(base_folder("staged"))
    model = trained(parent, tokenizer=tokenizer)
    facts = {"steps": 7}
    folder = write_delta(
        tmp_path / "d", model, tokenizer, parent, stage_training=facts, reference_layout=reference_layout
    )
    again = load(folder)
    same(again(ids).logits, model(ids).logits)
    assert torch.equal(again.forward_aggregated(ids), load(base_folder("staged")).forward_aggregated(ids))
    assert again.config.stage_training == {"steps": 7}
    assert not again.config.overlay_lambdas


@pytest.mark.parametrize(("layers", "tensors", "numbers"), [(2, 16, 157_286_452), (4, 28, 213_909_560)])
def test_the_reference_layout_has_the_released_tensors_and_counts(layers, tensors, numbers):
    model = grow_on_meta(PoEConfig.preset("poe-1.3b"), layers)
    lambdas = {name: torch.zeros(24 + layers) for name in ("resid_lambdas", "x0_lambdas")}
    state = {name: tensor for name, tensor in model.state_dict().items()} | lambdas

    class Shapes:
        config = model.config

        def state_dict(self):
            return {name: torch.empty(0).new_empty(tensor.shape, device="meta") for name, tensor in state.items()}

    import unittest.mock

    with unittest.mock.patch.object(torch.Tensor, "cpu", lambda self: self):
        found = delta_tensors(Shapes(), reference_layout=True)
    assert len(found) == tensors
    assert sum(tensor.numel() for tensor in found.values()) == numbers
    assert set(found) == {
        *(
            f"transformer.h.{i}.{name}.weight"
            for i in range(24, 24 + layers)
            for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
        ),
        "lm_head_stage.weight",
        "transformer.wte.weight",
        "resid_lambdas",
        "x0_lambdas",
    }


def test_the_default_layout_holds_only_the_changed_embedding_rows(base_folder, tokenizer, tmp_path):
    parent = open_parent(base_folder("staged"))
    tensors = load_file(
        write_delta(tmp_path / "d", trained(parent, tokenizer=tokenizer), tokenizer, parent) / "delta.safetensors"
    )
    assert "transformer.wte.weight" not in tensors
    assert tensors["overlay.wte_rows"].shape == (8, 32)


def test_a_chain_of_any_depth_loads_and_inherits_rows(base_folder, tokenizer, tmp_path, ids):
    folder = base_folder("staged")
    for depth in range(3):
        parent = open_parent(folder)
        model = trained(parent, 1, tokenizer, seed=depth)
        folder = write_delta(tmp_path / f"s{depth}", model, tokenizer, parent)
        same(load(folder)(ids).logits, model(ids).logits)
    assert load(folder).config.specialist_layers == [1, 1, 1]
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for depth in range(3):
        shutil.copytree(tmp_path / f"s{depth}", moved / f"s{depth}")
    config = json.loads((moved / "s0" / "config.json").read_text())
    config["base_model_name_or_path"] = str(base_folder("staged"))
    (moved / "s0" / "config.json").write_text(json.dumps(config))
    same(load(moved / "s2")(ids).logits, model(ids).logits)  # parents are named relative to the folder


def test_a_delta_on_another_base_is_refused_naming_both(base_folder, tokenizer, tmp_path):
    parent = open_parent(base_folder("staged"))
    folder = write_delta(tmp_path / "d", grow(parent, 1), tokenizer, parent)
    config = json.loads((folder / "config.json").read_text())
    other = base_folder("staged", 1)
    config["base_model_name_or_path"] = str(other)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError) as error:
        load(folder)
    assert config["base_model_hash"][:16] in str(error.value) and str(other) in str(error.value)


def test_a_delta_loads_through_transformers_in_a_process_without_the_package(base_folder, tokenizer, tmp_path, ids):
    parent = open_parent(base_folder("staged"))
    model = trained(parent, tokenizer=tokenizer)
    folder = write_delta(tmp_path / "d", model, tokenizer, parent)
    torch.save({"ids": ids, "logits": model(ids).logits}, tmp_path / "expected.pt")
    program = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
assert "stagewise" not in sys.modules
expected = torch.load({str(tmp_path / "expected.pt")!r})
torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"], atol=2e-5, rtol=1e-5)
assert len(tokenizer) == 265
"""
    environment = {
        "PATH": "/usr/bin:/bin",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("kind", ["staged", "shared", "plain"])
def test_a_folded_specialist_needs_no_parent_and_predicts_the_same(base_folder, tokenizer, tmp_path, ids, kind):
    parent = open_parent(base_folder(kind))
    model = trained(parent, tokenizer=tokenizer)
    first = write_delta(tmp_path / "first", model, tokenizer, parent)
    above = open_parent(first)
    model = trained(above, 1, tokenizer, seed=9)
    folder = write_delta(tmp_path / "second", model, tokenizer, above)
    whole = load(fold_to_folder(folder, tmp_path / "whole"))
    same(whole(ids).logits, model(ids).logits)
    if kind != "plain":
        assert torch.equal(whole.forward_aggregated(ids), load(base_folder(kind)).forward_aggregated(ids))
    single = load(fold_to_folder(folder, tmp_path / "single", single_path=True))
    torch.testing.assert_close(single(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not any(name.startswith(("lm_head_", "overlay")) for name in read_weights(tmp_path / "single"))
    with pytest.raises(ValueError, match="nothing to fold"):
        fold_to_folder(base_folder(kind), tmp_path / "no")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_a_stage_checkpoint_becomes_the_delta_it_was(base_folder, tokenizer, tmp_path, ids, nested, whole):
    parent = open_parent(base_folder("shared"))
    model = trained(parent, tokenizer=tokenizer)
    tensors = delta_tensors(model, reference_layout=True)
    if whole:
        tensors = {**parent.found.tensors, **tensors}
    tensors = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"step": 7, "model": tensors} if nested else tensors, tmp_path / "stage.pt")
    folder = convert(tmp_path / "stage.pt", str(base_folder("shared")), tmp_path / "d", recompute_windows=False)
    same(load(folder)(ids).logits, model(ids).logits)
    assert "transformer.wte.weight" not in load_file(folder / "delta.safetensors")


def test_lambdas_that_a_foreign_stage_changed_below_are_kept_as_its_own(base_folder, tokenizer, tmp_path, ids):
    parent = open_parent(base_folder("shared"))
    tensors = delta_tensors(trained(parent, tokenizer=tokenizer), reference_layout=True)
    tensors["resid_lambdas"][0] += 0.1
    torch.save(tensors, tmp_path / "stage.pt")
    folder = convert(tmp_path / "stage.pt", str(base_folder("shared")), tmp_path / "d")
    again = load(folder)
    assert again.config.overlay_lambdas
    assert torch.equal(again.forward_aggregated(ids), load(base_folder("shared")).forward_aggregated(ids))
    above = open_parent(folder)  # and one more trains on top of it
    model = trained(above, 1, tokenizer)
    from stagewise.specialist.growth import refresh_overlay

    refresh_overlay(model)
    chain = write_delta(tmp_path / "chain", model, tokenizer, above)
    same(load(chain)(ids).logits, model(ids).logits)


class Evil:
    def __reduce__(self):
        return (print, ("executed",))


def test_stage_checkpoints_that_are_unusable_are_refused(base_folder, tokenizer, tmp_path, capsys):
    base = str(base_folder("shared"))
    parent = open_parent(base)
    tensors = delta_tensors(trained(parent, tokenizer=tokenizer), reference_layout=True)
    cases = {
        "holds no tensors": {"step": 1},
        "no lm_head_stage.weight": {n: t for n, t in tensors.items() if n != "lm_head_stage.weight"},
        "differs from the parent's": tensors | {"lm_head.weight": parent.found.tensors["lm_head.weight"] + 1},
        "neither the stage's nor the parent's": tensors | {"router.weight": torch.ones(2, 2)},
        "weights-only load failed": {"tensors": tensors, "payload": Evil()},
    }
    for words, content in cases.items():
        torch.save(content, tmp_path / "stage.pt")
        with pytest.raises(ValueError, match=words):
            convert(tmp_path / "stage.pt", base, tmp_path / "d")
        assert not (tmp_path / "d").exists()
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="no stage checkpoint"):
        convert(tmp_path / "missing.pt", base, tmp_path / "d")


def test_damaged_and_orphaned_deltas_say_what_is_wrong(base_folder, tokenizer, tmp_path):
    parent = open_parent(base_folder("staged"))
    folder = write_delta(tmp_path / "d", grow(parent, 1, tokenizer=tokenizer), tokenizer, parent)
    whole = (folder / "delta.safetensors").read_bytes()
    (folder / "delta.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(folder)
    (folder / "delta.safetensors").write_bytes(whole)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": "./gone"}))
    with pytest.raises(FileNotFoundError, match="parent './gone' of the specialist"):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(ValueError, match="has hidden_size=64, its parent"):
        load(folder)
