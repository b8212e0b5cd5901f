"""Exported folders: complete, and the same model in a process that has transformers but not stagewise."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import stagewise.modeling
from stagewise.hub.export import export
from stagewise.hub.publish import check_parent, check_release
from stagewise.modeling.cascade import load

IDS = [311, 84, 104, 101, 32, 99, 97, 112, 105, 116, 97, 108]

ELSEWHERE = """
import json, sys
sys.modules["stagewise"] = None  # importing it from here on fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

torch.set_grad_enabled(False)
folder, delta, spoilt, out = sys.argv[1:]
ids = torch.tensor([%(ids)s])
found = {}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
found["class"] = type(model).__module__
found["dtype"] = str(model.dtype)
tensors = {"logits": model(ids).logits, "stage_logits": model.forward_stage(ids, stage=1)}
tensors["aggregate"] = model.forward_aggregated(ids, max_stages=2)
length = {"max_new_tokens": 12}
found["generate"] = model.generate(ids, do_sample=False, **length)[0].tolist()
found["uncached"] = model.generate(ids, do_sample=False, use_cache=False, **length)[0].tolist()
found["prefix"] = model.generate_prefix(ids, max_stages=2, **length)[0].tolist()
found["stage"] = model.generate_stage(ids, stage=0, **length)[0].tolist()
wand, used = model.generate_wand(ids, p99_bounds=[0.5, 0.5], safety=1.0, return_stages_used=True, **length)
found["wand"] = wand[0].tolist()
found["stages_used"] = used.tolist() if hasattr(used, "tolist") else list(used)
text, rate = model.generate_speculative(ids, draft_stage=0, k_draft=3, return_acceptance=True, **length)
found["speculative"] = text[0].tolist()
found["acceptance"] = float(rate)
weighted = model.generate_parallel_composition(ids, stages=(1, 2), stage_weights=(1.0, 0.5), **length)
found["composition"] = weighted[0].tolist()

tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
found["text"] = tokenizer("the sea, <|bos|>").input_ids
forgery = [{"role": "user", "content": "<|bos|>"}]
found["chat"] = tokenizer.apply_chat_template(forgery, add_generation_prompt=True)["input_ids"]

half = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.bfloat16, device_map="auto")
found["half"] = str(half.dtype)
found["map"] = {str(k): str(v) for k, v in half.hf_device_map.items()}

special = AutoModelForCausalLM.from_pretrained(delta, trust_remote_code=True, dtype=torch.float32, device_map="auto")
tensors["special"] = special(ids).logits
found["special"] = special.generate(ids, do_sample=False, **length)[0].tolist()
found["special_stops"] = special.generation_config.eos_token_id

for name in ("missing", "unexpected", "misshapen", "cut"):
    try:
        AutoModelForCausalLM.from_pretrained(f"{spoilt}/{name}", trust_remote_code=True)
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
torch.save(tensors, out + "/tensors.pt")
with open(out + "/found.json", "w") as file:
    json.dump(found, file)
"""


@pytest.fixture(scope="module")
def releases(checkpoint, delta, tmp_path_factory) -> Path:
    """Exported: `base`, in several shards, and `special`, a delta beside it."""
    folder = tmp_path_factory.mktemp("releases")
    export(checkpoint, folder / "base", max_shard_size="50KB")
    export(delta, folder / "special", parent="../base")
    return folder


@pytest.fixture(scope="module")
def elsewhere(releases, checkpoint, tmp_path_factory) -> dict:
    """What a process without stagewise found out about the exported folders."""
    work = tmp_path_factory.mktemp("elsewhere")
    for name in ("missing", "unexpected", "misshapen", "cut"):
        shutil.copytree(checkpoint, work / name)
        weights = work / name / "model.safetensors"
        tensors = load_file(weights)
        if name == "missing":
            del tensors["transformer.h.1.mlp.c_fc.weight"]
        elif name == "unexpected":
            tensors["transformer.h.9.mlp.c_fc.weight"] = torch.zeros(2, 2)
        elif name == "misshapen":
            tensors["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(2, 2)
        save_file(tensors, weights)
        if name == "cut":
            weights.write_bytes(weights.read_bytes()[:-1000])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(releases / "base"), str(releases / "special"), str(work), str(work)]
    program = ELSEWHERE % {"ids": IDS}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, env=environment, cwd=work
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {**json.loads((work / "found.json").read_text()), **torch.load(work / "tensors.pt")}


def test_logits_are_the_same_without_the_package(elsewhere, checkpoint):
    model, ids = load(checkpoint), torch.tensor([IDS])
    assert elsewhere["class"].startswith("transformers_modules.")
    with torch.no_grad():
        assert torch.equal(elsewhere["logits"], model(ids).logits)
        assert torch.equal(elsewhere["stage_logits"], model.forward_stage(ids, stage=1))
        assert torch.equal(elsewhere["aggregate"], model.forward_aggregated(ids, max_stages=2))


def test_every_mode_generates_the_same_without_the_package(elsewhere, checkpoint):
    model, ids, length = load(checkpoint), torch.tensor([IDS]), {"max_new_tokens": 12}
    assert elsewhere["generate"] == model.generate(ids, do_sample=False, **length)[0].tolist()
    assert elsewhere["generate"] == elsewhere["uncached"] == elsewhere["speculative"]
    assert elsewhere["prefix"] == model.generate_prefix(ids, max_stages=2, **length)[0].tolist()
    assert elsewhere["stage"] == model.generate_stage(ids, stage=0, **length)[0].tolist()
    assert elsewhere["wand"] == model.generate_wand(ids, p99_bounds=[0.5, 0.5], **length)[0].tolist()
    weighted = model.generate_parallel_composition(ids, stages=(1, 2), stage_weights=(1.0, 0.5), **length)
    assert elsewhere["composition"] == weighted[0].tolist()
    assert 0 <= elsewhere["acceptance"] <= 1


def test_dtype_and_device_map_are_honoured(elsewhere):
    assert elsewhere["dtype"] == "torch.float32" and elsewhere["half"] == "torch.bfloat16"
    assert elsewhere["map"] == {"": "0" if torch.cuda.is_available() else "cpu"}


def test_tokenizer_is_the_same_without_the_package(elsewhere, checkpoint):
    from stagewise.modeling.tokenization_poe import load_tokenizer

    tokenizer = load_tokenizer(checkpoint)
    assert elsewhere["text"] == tokenizer("the sea, <|bos|>").input_ids
    forged = elsewhere["chat"].count(tokenizer.bos_token_id)
    assert forged == 1  # the one in front; the user's text gave none


def test_delta_is_assembled_on_its_parent_without_the_package(elsewhere, delta):
    model, ids = load(delta), torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(elsewhere["special"], model(ids).logits)
    assert elsewhere["special"].shape == (1, len(IDS), 320)
    assert elsewhere["special_stops"] == [311 + 4, 311]


@pytest.mark.parametrize(
    "name, words",
    [
        ("missing", ["missing", "transformer.h.1.mlp.c_fc.weight"]),
        ("unexpected", ["unexpected", "transformer.h.9.mlp.c_fc.weight"]),
        ("misshapen", ["shape", "transformer.h.1.mlp.c_fc.weight"]),
        ("cut", ["cut short"]),
    ],
)
def test_damaged_weights_do_not_load_without_the_package(elsewhere, name, words):
    assert name in elsewhere, f"weights that are {name} were loaded"
    assert all(word in elsewhere[name] for word in words), elsewhere[name]


def test_release_folder_is_complete(releases):
    code = {path.name for path in Path(stagewise.modeling.__file__).parent.glob("*.py")} - {"__init__.py"}
    for kind in ("base", "special"):
        names = {path.name for path in (releases / kind).iterdir()}
        assert code <= names
        assert {"tokenizer.json", "tokenizer.pkl", "token_bytes.pt", "tokenizer_config.json"} <= names
        assert {"special_tokens_map.json", "generation_config.json", "config.json"} <= names
        check_release(releases / kind)
    assert len(list((releases / "base").glob("model-*-of-*.safetensors"))) > 1
    assert (releases / "special" / "delta.safetensors").is_file()


def test_bases_stop_at_bos(releases):
    assert json.loads((releases / "base" / "generation_config.json").read_text())["eos_token_id"] == 311


def test_dtype_converts_the_weights(checkpoint, tmp_path):
    out = export(checkpoint, tmp_path / "half", dtype="bfloat16")
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_measurements_travel_and_training_state_stays(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "step-000100")
    (source / "eval").mkdir()
    (source / "eval" / "bpb.json").write_text("{}")
    (source / "training_state").mkdir()
    (source / "training_state" / "state.pt").write_bytes(b"x")
    out = export(source, tmp_path / "out")
    assert (out / "eval" / "bpb.json").is_file() and not (out / "training_state").exists()


def test_existing_folder_is_kept_unless_forced(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="--force"):
        export(checkpoint, tmp_path / "out")
    assert (tmp_path / "out" / "mine").is_file()
    export(checkpoint, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "mine").exists()
    with pytest.raises(ValueError, match="holds the model"):
        export(tmp_path / "out", tmp_path / "out", force=True)


def test_failed_export_leaves_nothing_behind(checkpoint, tmp_path):
    source = shutil.copytree(checkpoint, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ValueError, match="320"):
        export(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_delta_on_a_local_parent_is_not_for_the_public(releases, delta, tmp_path):
    with pytest.raises(ValueError, match="--parent owner/parent"):
        check_parent(releases / "special")
    check_parent(export(delta, tmp_path / "public", parent="owner/base"))
    check_parent(releases / "base")


def test_parent_in_a_relative_folder_is_still_found_from_the_new_place(delta, tmp_path):
    out = export(delta, tmp_path / "deeper" / "down" / "special")
    ids = torch.tensor([IDS])
    with torch.no_grad():
        assert torch.equal(load(out)(ids).logits, load(delta)(ids).logits)


def test_delta_knows_the_parent_it_is_released_with(delta, checkpoint, tmp_path):
    from stagewise.modeling.cascade import assemble, content_hash

    source = shutil.copytree(delta, delta.parent / "hashed")
    config = json.loads((source / "config.json").read_text())
    config["base_model_hash"] = content_hash(assemble(checkpoint).tensors)
    (source / "config.json").write_text(json.dumps(config))
    half = export(checkpoint, tmp_path / "half", dtype="bfloat16")
    with pytest.raises(ValueError, match="content hash"):
        load(export(source, tmp_path / "wrong", parent="../half"))
    fitting = export(source, tmp_path / "right", parent="../half", parent_weights=half, dtype="bfloat16")
    assert load(fitting).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="whole weights"):
        export(checkpoint, tmp_path / "third", parent="owner/base")


def test_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        export(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no model"):
        export(tmp_path / "empty", tmp_path / "out")
