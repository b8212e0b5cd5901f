"""Loading: foreign folders with a warning, our own strictly, damage with one clear error."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import stagewise
from stagewise.modeling.cascade import assemble, content_hash, load, resolve_folder


@pytest.fixture
def ours(tiny_model, tmp_path):
    """A folder of our own and the model in it."""
    model = tiny_model()
    model.save_pretrained(tmp_path / "ours")
    return tmp_path / "ours", model


@pytest.fixture
def foreign(fixture_dir, tmp_path):
    """A copy of a reference folder that a test may change."""
    shutil.copytree(fixture_dir / "gqa-6x64", tmp_path / "gqa")
    return tmp_path / "gqa"


def edit_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    raw.update(changes)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v is not None}))


def edit_tensors(folder, change, name="model.safetensors"):
    tensors = {k: v.clone() for k, v in load_file(folder / name).items()}
    tensors = change(tensors) or tensors
    save_file(tensors, folder / name)


def drop(tensors, name):
    del tensors[name]


@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(ours):
    folder, model = ours
    ids = torch.randint(0, 87, (2, 9))
    for other in (stagewise.load(folder), AutoModelForCausalLM.from_pretrained(folder)):
        assert torch.equal(other(ids).logits, model(ids).logits)
        assert not other.training
    assert (folder / "generation_config.json").is_file()
    assert AutoConfig.from_pretrained(folder).poe_stage_layers == [2, 1, 2]


def test_dtype_is_honoured_and_kept_by_default(ours, tmp_path):
    folder, model = ours
    assert load(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert load(tmp_path / "half", dtype="float32").dtype == torch.float32
    with pytest.raises(ValueError, match="dtype='int8'"):
        load(folder, dtype="int8")


def test_weights_stay_memory_mapped_until_they_change(ours):
    folder, _ = ours
    first, second = load(folder), load(folder)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert torch.equal(first.get_parameter(name), second.get_parameter(name))
    with torch.no_grad():
        first.get_parameter(name).zero_()  # copy on write: neither the file nor the other model changes
    assert second.get_parameter(name).abs().sum() > 0
    assert load(folder).get_parameter(name).abs().sum() > 0


def test_prefixes_of_training_wrappers_are_stripped(foreign):
    before = load(foreign).state_dict()
    edit_tensors(foreign, lambda t: {f"_orig_mod.module.{k}": v for k, v in t.items()})
    after = load(foreign).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_foreign_facts_come_from_the_tensors_and_are_announced(foreign, caplog):
    edit_config(foreign, intermediate_size=999, num_key_value_heads=4, per_stage_head=False, surprise=1)
    model = load(foreign)
    config = model.config
    assert (config.intermediate_size, config.num_key_value_heads, config.per_stage_head) == (256, 2, True)
    for word in ("surprise", "intermediate_size=999", "num_key_value_heads=4", "per_stage_head=False"):
        assert word in caplog.text


def test_a_foreign_buffer_is_a_warning_and_padding_no_disagreement(foreign, caplog):
    def change(tensors):
        tensors["cos"] = torch.zeros(3)
        for name in list(tensors):
            if name.startswith("lm_head") or "wte" in name or "value_embeds" in name:
                tensors[name] = tensors[name][:300].contiguous()

    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = load(foreign)(ids).logits
        edit_tensors(foreign, change)
        assert torch.equal(load(foreign)(ids).logits, expected)
    assert "cos ignored" in caplog.text


def test_an_unknown_key_in_our_own_folder_is_an_error_with_the_nearest_known_one(ours):
    edit_config(ours[0], window_patern="SSSL")
    with pytest.raises(ValueError, match="unknown key 'window_patern'; did you mean window_pattern"):
        load(ours[0])


@pytest.mark.parametrize("entry", ["stagewise", "auto"])
@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: drop(t, "lm_head.weight"), r"1 tensors missing: lm_head.weight \(128, 32\)"),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 tensors unexpected: extra \(2,\)"),
        (lambda t: t.update(x0_lambdas=torch.zeros(4)), r"x0_lambdas \(4,\), expected \(5,\)"),
    ],
)
def test_missing_unexpected_and_misshapen_tensors_abort_every_load(ours, entry, change, message):
    edit_tensors(ours[0], change)
    with pytest.raises(ValueError, match=message):
        load(ours[0]) if entry == "stagewise" else AutoModelForCausalLM.from_pretrained(ours[0])


def test_a_file_cut_short_is_named(ours):
    file = ours[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read \(cut short or damaged"):
        load(ours[0])


def test_missing_folders_and_files_are_named(ours, tmp_path):
    with pytest.raises(FileNotFoundError, match="no model folder at"):
        load(tmp_path / "nothing")
    (ours[0] / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors"):
        load(ours[0])
    (ours[0] / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(ours[0])
    (ours[0] / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        load(ours[0])


def test_a_router_that_is_on_is_refused_and_one_that_is_off_accepted(foreign):
    edit_config(foreign, poe_router=False)
    load(foreign)
    edit_config(foreign, poe_router=True)
    with pytest.raises(ValueError, match="router"):
        load(foreign)


def test_cycles_missing_parents_and_wrong_parents_are_named(foreign):
    edit_config(foreign / "specialist", base_model_name_or_path="../chain")
    with pytest.raises(ValueError, match="forms a cycle"):
        load(foreign / "chain")
    edit_config(foreign / "specialist", base_model_name_or_path="../gone")
    with pytest.raises(FileNotFoundError, match="parent '../gone' of the specialist"):
        load(foreign / "specialist")
    edit_config(foreign / "specialist", base_model_name_or_path="..", base_model_hash="0" * 64)
    with pytest.raises(ValueError, match="content hash 0000000000000000, but .*gqa has"):
        load(foreign / "specialist")
    edit_config(foreign / "specialist", base_model_hash=content_hash(assemble(resolve_folder(foreign)).tensors))
    load(foreign / "specialist")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({"transformer.h.2.mlp.c_fc.weight": torch.zeros(2, 2)}), "would change the frozen base"),
        (lambda t: drop(t, "resid_lambdas"), "no resid_lambdas"),
        (lambda t: t.update(resid_lambdas=torch.zeros(3)), r"shape \(3,\), expected \(8,\)"),
        (lambda t: drop(t, "lm_head_stage.weight"), "missing: lm_head_stage.weight"),
    ],
)
def test_a_delta_that_does_not_fit_its_parent_is_refused(foreign, change, message):
    edit_tensors(foreign / "specialist", change, "delta.safetensors")
    with pytest.raises(ValueError, match=message):
        load(foreign / "specialist")


def test_a_delta_for_another_shape_names_both_folders(foreign, fixture_dir):
    edit_config(foreign / "specialist", base_model_name_or_path=str(fixture_dir / "mha-4x64"))
    with pytest.raises(ValueError, match="vocab_size=300, its parent .*mha-4x64 has 256"):
        load(foreign / "specialist")
