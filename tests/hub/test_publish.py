"""Publishing: one branch a checkpoint, main on the newest, resumable, checked before the first request."""

import json
from pathlib import Path

import pytest

from stagewise.hub.publish import check_release, describe, plan, publish, release_files


def write_model(folder: Path, seed: int) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "cognica_poe", "auto_map": {"AutoModelForCausalLM": "modeling_poe.PoEForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_poe.py").write_text("# code\n")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes([seed]) * 5000)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# model\n")
    (folder / "eval").mkdir()
    (folder / "eval" / "bpb.json").write_text(json.dumps({"product_bpb": 1 + seed}))
    (folder / "training_state").mkdir()
    (folder / "training_state" / "rank-0.pt").write_bytes(b"private")
    return folder


@pytest.fixture
def run(tmp_path):
    for step in (100, 200, 1000):
        write_model(tmp_path / "run" / "checkpoints" / f"step-{step:06d}", step % 251)
    return tmp_path / "run"


def test_every_checkpoint_has_a_branch_and_main_holds_the_newest(run, hub, api):
    outcomes = publish(run, "owner/model", api=api)
    assert [o.branch for o in outcomes] == ["step-100", "step-200", "step-1000", "main"]
    assert set(hub.branches) == {"main", "step-100", "step-200", "step-1000"}
    assert hub.branches["step-200"]["model.safetensors"] == bytes([200]) * 5000
    assert hub.branches["main"]["model.safetensors"] == hub.branches["step-1000"]["model.safetensors"]
    assert json.loads(hub.branches["main"]["eval/bpb.json"]) == {"product_bpb": 1 + 1000 % 251}
    assert not [path for files in hub.branches.values() for path in files if "training_state" in path]


def test_second_run_sends_nothing(run, hub, api):
    publish(run, "owner/model", api=api)
    commits, uploads = len(hub.commits), hub.uploads
    outcomes = publish(run, "owner/model", api=api)
    assert (len(hub.commits), hub.uploads) == (commits, uploads)
    assert all(o.commit is None and not o.added and o.unchanged == 6 for o in outcomes)


def test_interrupted_run_resumes_where_it_stopped(run, hub, api):
    hub.fail_at_commit = 1
    with pytest.raises(RuntimeError, match="disk of the hub is full.*again to resume"):
        publish(run, "owner/model", api=api)
    assert [branch for branch, _ in hub.commits] == ["step-100"]
    sent = hub.uploads
    outcomes = publish(run, "owner/model", api=api)
    assert [branch for branch, _ in hub.commits] == ["step-100", "step-200", "step-1000", "main"]
    assert outcomes[0].commit is None
    assert hub.uploads == sent + 1  # the weights of step 200 had arrived before the failure, main shares step 1000's


def test_only_changed_files_are_sent_and_stale_weights_removed(tmp_path, hub, api):
    folder = write_model(tmp_path / "model", 3)
    publish(folder, "owner/model", api=api)
    hub.branches["main"]["picture.png"] = b"added by hand"
    (folder / "model.safetensors").unlink()
    for part in ("1", "2"):
        (folder / f"model-0000{part}-of-00002.safetensors").write_bytes(part.encode() * 3000)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (outcome,) = publish(folder, "owner/model", api=api)
    assert outcome.removed == ["model.safetensors"] and len(outcome.added) == 3
    assert "model.safetensors" not in hub.branches["main"] and "picture.png" in hub.branches["main"]


def test_main_never_goes_back_to_an_older_step(run, hub, api):
    publish(run, "owner/model", api=api)
    before = dict(hub.branches["main"])
    outcomes = publish(run, "owner/model", revision="step-200", api=api)
    assert [o.branch for o in outcomes] == ["step-200"]
    assert hub.branches["main"] == before
    newer = write_model(run / "checkpoints" / "step-002000", 7)
    assert [o.branch for o in publish(newer, "owner/model", api=api)] == ["step-2000", "main"]
    assert hub.branches["main"]["model.safetensors"] == bytes([7]) * 5000


def test_dry_run_asks_nothing_of_the_hub_and_lists_every_file(run, hub, api):
    outcomes = publish(run, "owner/model", dry_run=True, api=api)
    assert hub.requests == []
    assert [o.branch for o in outcomes] == ["step-100", "step-200", "step-1000"]
    text = describe(outcomes, "owner/model", dry_run=True)
    assert "would publish owner/model@step-1000: 6 files" in text and "model.safetensors" in text
    assert "without a README.md" not in text
    (run / "checkpoints" / "step-000200" / "README.md").unlink()
    outcomes = publish(run, "owner/model", dry_run=True, api=api)
    assert "without a README.md: step-200 " in describe(outcomes, "owner/model", dry_run=True)


@pytest.mark.parametrize(
    "name", ["a/b/c", "owner/mo del", "owner/--x", "-owner/model", "", "owner/" + "x" * 97, "o/m.git"]
)
def test_invalid_repository_name_is_one_clear_error_before_any_request(name, run, hub, api):
    with pytest.raises(ValueError, match="not a valid repository name"):
        publish(run, name, api=api)
    assert hub.requests == []


def test_no_permission_is_an_error_that_says_how_to_log_in(run, hub, api):
    hub.forbidden = True
    with pytest.raises(RuntimeError, match="hf auth login"):
        publish(run, "owner/model", api=api)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda f: (f / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda f: (f / "modeling_poe.py").unlink(), "lacks modeling_poe.py"),
        (lambda f: (f / "tokenizer.json").unlink(), "lacks tokenizer.json"),
        (lambda f: (f / "config.json").write_text("{}"), "auto_map"),
        (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_incomplete_folder_is_refused_before_any_request(spoil, message, tmp_path, hub, api):
    folder = write_model(tmp_path / "model", 1)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        publish(folder, "owner/model", api=api)
    assert hub.requests == []


def test_missing_shard_is_named(tmp_path):
    folder = write_model(tmp_path / "model", 1)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00009.safetensors"}}))
    with pytest.raises(ValueError, match=r"model-00009\.safetensors"):
        check_release(folder)


def test_branches_follow_from_names_and_arguments(run, tmp_path):
    checkpoint = run / "checkpoints" / "step-000200"
    assert [t.branch for t in plan(checkpoint)] == ["step-200"]
    assert [t.branch for t in plan(checkpoint, "candidate")] == ["candidate"]
    assert [t.branch for t in plan(write_model(tmp_path / "plain", 1))] == ["main"]
    with pytest.raises(ValueError, match="it has: step-100, step-200, step-1000"):
        plan(run, "step-300")
    with pytest.raises(FileNotFoundError, match="holds no model"):
        (tmp_path / "empty").mkdir()
        plan(tmp_path / "empty")


def test_private_files_stay_private(tmp_path):
    folder = write_model(tmp_path / "model", 1)
    (folder / ".secret").write_text("x")
    (folder / "half.tmp").write_text("x")
    names = [name for name, _ in release_files(folder)]
    assert not [n for n in names if "secret" in n or n.endswith(".tmp") or "training_state" in n]
