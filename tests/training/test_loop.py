"""Runs: exact resume, kills, stops, bad input. Models are a few thousand parameters on a page of text."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stagewise.recipe import Recipe
from stagewise.training import checkpoint as checkpoint_module
from stagewise.training.checkpoint import checkpoints, prune, read_state, write_folder
from stagewise.training.commands import train
from stagewise.training.guard import LossGuard
from stagewise.training.loop import Trainer
from stagewise.training.metrics import Metrics, read_metrics
from stagewise.training.run import build_trainer, run_tokenizer, train_recipe


def sentences(seed: int, count: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    words = "the a red blue fox dog river stone runs sleeps near over under quickly and then sees 12 34 7".split()
    lines = []
    for _ in range(count):
        picks = torch.randint(0, len(words), (12,), generator=generator).tolist()
        lines.append(" ".join(words[i] for i in picks) + ".")
    return "\n".join(lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(12):
        (folder / f"{i}.txt").write_text(sentences(i, 20), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer_folder(corpus, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    run_tokenizer(make_recipe(corpus)).save_pretrained(folder)
    return folder


def make_recipe(corpus: Path, tokenizer: Path | None = None, **training) -> Recipe:
    settings = {
        "steps": 6,
        "batch_tokens": 128,
        "micro_batch": 2,
        "sequence_length": 32,
        "dtype": "float32",
        "eval_every": 0,
        "eval_tokens": 128,
        "checkpoint_every": 3,
        "log_every": 1,
        **training,
    }
    return Recipe.model_validate(
        {
            "name": "tiny",
            "seed": 1,
            "model": {
                "hidden_size": 32,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "vocab_size": 300,
                "max_position_embeddings": 64,
                "poe_mode": "flat",
                "poe_stage_layers": [1, 1, 1],
                "per_stage_head": True,
            },
            "tokenizer": {"path": str(tokenizer)} if tokenizer else {},
            "data": {
                "sources": [{"name": "page", "kind": "text", "path": str(corpus)}],
                "validation_fraction": 0.2,
                "case_augmentation": 0.3,
            },
            "schedule": {"warmup_steps": 2, "momentum_warmup_steps": 4},
            "training": settings,
        }
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stopping_half_way_and_resuming_changes_no_bit(corpus, tokenizer_folder, tmp_path, dtype):
    recipe = make_recipe(corpus, tokenizer_folder, dtype=dtype)
    whole = train_recipe(recipe, tmp_path / "whole", quiet=True)
    trainer = build_trainer(recipe, tmp_path / "halves", quiet=True)
    for _ in range(3):
        trainer.train_step()
    trainer._save({})
    trainer.train_step()  # steps after the checkpoint are lost, as in a crash
    resumed = train_recipe(recipe, tmp_path / "halves", resume=True, quiet=True)
    assert_same_weights(whole.model, resumed.model)
    assert resumed.validation == whole.validation
    a, b = (read_state(outcome.checkpoint) for outcome in (whole, resumed))
    assert a.data == b.data and a.guard == b.guard and a.tokens == b.tokens
    assert all(torch.equal(a.optimizer[name], b.optimizer[name]) for name in a.optimizer | b.optimizer)


def in_a_process_that_kills_itself(recipe: Recipe, run: Path, resume: bool, arm) -> None:
    """Train in a forked process after `arm()` planted a kill -9 in it; the process must have died of that."""

    def main() -> None:
        arm()
        train_recipe(recipe, run, resume=resume, quiet=True)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def die(*_arguments) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_in_step_five() -> None:
    step = Trainer.train_step
    Trainer.train_step = lambda self: die() if self.step == 4 else step(self)


def die_while_writing_a_checkpoint() -> None:
    checkpoint_module.save_file = die


def test_kill_minus_nine_between_and_during_checkpoints_then_resume_changes_no_bit(corpus, tokenizer_folder, tmp_path):
    recipe = make_recipe(corpus, tokenizer_folder)
    whole = train_recipe(recipe, tmp_path / "whole", quiet=True)
    run = tmp_path / "killed"
    in_a_process_that_kills_itself(recipe, run, False, die_in_step_five)
    assert [folder.name for folder in checkpoints(run)] == ["step-000003"]
    in_a_process_that_kills_itself(recipe, run, True, die_while_writing_a_checkpoint)
    assert [folder.name for folder in checkpoints(run)] == ["step-000003"]
    assert list((run / "checkpoints").glob(".step-*")), "the half-written checkpoint lies there under its hidden name"
    resumed = train_recipe(recipe, run, resume=True, quiet=True)
    assert_same_weights(whole.model, resumed.model)
    assert not list((run / "checkpoints").glob(".step-*"))
    assert [row["step"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_sigterm_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on(corpus, tokenizer_folder, tmp_path):
    recipe_file, output = tmp_path / "tiny.yaml", tmp_path / "output.txt"
    recipe_file.write_text(make_recipe(corpus, tokenizer_folder, steps=100_000, checkpoint_every=0).to_yaml())

    def command() -> None:
        with output.open("w") as sys.stdout:
            train(str(recipe_file), out=tmp_path / "run")

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.time() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.time() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in output.read_text() and "--resume" in output.read_text()
    [folder] = checkpoints(tmp_path / "run")
    assert read_state(folder).step == int(folder.name.removeprefix("step-")) >= 1


def test_resume_with_a_changed_recipe_names_the_keys(corpus, tokenizer_folder, tmp_path):
    train_recipe(make_recipe(corpus, tokenizer_folder, steps=2), tmp_path / "run", quiet=True)
    changed = make_recipe(corpus, tokenizer_folder, steps=3, log_every=5)
    with pytest.raises(ValueError, match=r"the recipe changed in training\.steps;"):
        train_recipe(changed, tmp_path / "run", resume=True, quiet=True)


def test_an_occupied_run_folder_is_not_overwritten(corpus, tokenizer_folder, tmp_path):
    recipe = make_recipe(corpus, tokenizer_folder, steps=1)
    train_recipe(recipe, tmp_path / "run", quiet=True)
    with pytest.raises(ValueError, match="already holds checkpoints"):
        train_recipe(recipe, tmp_path / "run", quiet=True)


def test_nan_stops_before_the_weights_move_and_names_the_last_checkpoint(corpus, tokenizer_folder, tmp_path):
    trainer = build_trainer(make_recipe(corpus, tokenizer_folder), tmp_path / "run", quiet=True)
    trainer.train_step()
    saved = trainer._save({})
    master = trainer.compute.master
    before = master.lm_head.weight.detach().clone()
    with torch.no_grad():
        master.resid_lambdas.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=f"at step 2: the loss is nan; the last good checkpoint is {saved}"):
        trainer.fit()
    assert torch.equal(master.lm_head.weight, before)


def test_guard_lets_a_spike_pass_and_stops_a_divergence():
    guard = LossGuard(abort_ratio=1.5)
    assert all(guard.problem(3.0) is None for _ in range(40))
    assert guard.problem(9.0) is None
    assert all(guard.problem(3.0) is None for _ in range(40))
    problems = [guard.problem(3.0 + i) for i in range(20)]
    assert any(problem and "rose to" in problem for problem in problems)


def test_a_full_disk_leaves_the_old_checkpoint_and_says_what_to_do(corpus, tokenizer_folder, tmp_path, monkeypatch):
    recipe = make_recipe(corpus, tokenizer_folder)

    def full(tensors, path):
        if "step-000006" in str(path):
            raise OSError(28, "No space left on device")
        return save(tensors, path)

    save = checkpoint_module.save_file
    monkeypatch.setattr(checkpoint_module, "save_file", full)
    with pytest.raises(OSError, match="no space left for .*step-000006.*--resume"):
        train_recipe(recipe, tmp_path / "run", quiet=True)
    assert [folder.name for folder in checkpoints(tmp_path / "run")] == ["step-000003"]
    monkeypatch.undo()
    assert train_recipe(recipe, tmp_path / "run", resume=True, quiet=True).step == 6


def test_a_checkpoint_cut_short_is_an_error_that_names_it(corpus, tokenizer_folder, tmp_path):
    recipe = make_recipe(corpus, tokenizer_folder, steps=1)
    folder = train_recipe(recipe, tmp_path / "run", quiet=True).checkpoint
    tensors = folder / "training_state" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(ValueError, match="step-000001 is damaged"):
        train_recipe(recipe, tmp_path / "run", resume=True, quiet=True)


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in range(1, 6):
        folder = tmp_path / "checkpoints" / f"step-{step:06d}" / "training_state"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
    prune(tmp_path, keep_last=2, best_step=2)
    assert [folder.name[-1] for folder in checkpoints(tmp_path)] == ["2", "4", "5"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"
    write_folder(target, lambda folder: (folder / "a").write_text("old"))

    def fails(folder):
        (folder / "a").write_text("new")
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError):
        write_folder(target, fails)
    assert (target / "a").read_text() == "old"
    write_folder(target, lambda folder: (folder / "b").write_text("new"))
    assert [path.name for path in target.iterdir()] == ["b"]


def test_run_folder_holds_model_metrics_and_recipe(corpus, tokenizer_folder, tmp_path):
    from stagewise.modeling import load
    from stagewise.recipe import load_recipe

    recipe = make_recipe(corpus, tokenizer_folder, eval_every=2, steps=4, tensorboard=True)
    outcome = train_recipe(recipe, tmp_path / "run", quiet=True)
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == recipe
    rows = read_metrics(outcome.model.parent / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert [row["step"] for row in rows if "product_bpb" in row] == [2, 4]
    assert all(len(row["stage_loss"]) == 3 for row in rows if "loss" in row)
    assert outcome.validation["product_bpb"] == rows[-1]["product_bpb"]
    model = load(outcome.model)
    assert sorted(weights(outcome.model)) == sorted(dict(model.named_parameters()))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_bf16_losses_follow_fp32(corpus, tokenizer_folder):
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trainer = build_trainer(make_recipe(corpus, tokenizer_folder, dtype=dtype), quiet=True)
        losses[dtype] = [trainer.train_step()["loss"] for _ in range(6)]
        assert trainer.compute.master.lm_head.weight.dtype == torch.float32
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.03)
    assert losses["float32"][-1] < losses["float32"][0] - 0.05


def test_activation_checkpointing_and_accumulation_change_no_loss(corpus, tokenizer_folder):
    plain = build_trainer(make_recipe(corpus, tokenizer_folder, micro_batch=4), quiet=True)
    expected = [plain.train_step()["loss"] for _ in range(2)]
    for changes in ({"micro_batch": 1}, {"micro_batch": 4, "activation_checkpointing": True}):
        other = build_trainer(make_recipe(corpus, tokenizer_folder, **changes), quiet=True)
        assert [other.train_step()["loss"] for _ in range(2)] == pytest.approx(expected, abs=1e-4)


def test_a_vocabulary_that_is_not_the_tokenizers_is_refused(corpus, tokenizer_folder):
    recipe = make_recipe(corpus, tokenizer_folder)
    other = recipe.model_copy(update={"model": recipe.model.model_copy(update={"vocab_size": 320})})
    with pytest.raises(ValueError, match=r"300 tokens but model\.vocab_size is 320"):
        build_trainer(other, quiet=True)


def test_a_tracker_gets_every_figure_flat(tmp_path, monkeypatch):
    import types

    seen = []
    tracker = types.ModuleType("trackio")
    tracker.init = lambda **settings: seen.append(settings["name"])
    tracker.log = lambda figures, step: seen.append((step, figures))
    tracker.finish = lambda: seen.append("finished")
    monkeypatch.setitem(sys.modules, "trackio", tracker)
    metrics = Metrics(tmp_path, tracker="trackio")
    metrics.write({"step": 3, "loss": 2.0, "stage_loss": [1.5, 2.5]})
    metrics.close()
    assert seen == [tmp_path.name, (3, {"loss": 2.0, "stage_loss/0": 1.5, "stage_loss/1": 2.5}), "finished"]


def test_rows_after_the_checkpoint_are_dropped_and_a_torn_line_too(tmp_path):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows) + '\n{"step": 5, "lo')
    Metrics(tmp_path, resumed_at=2).close()
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_every_validation_set_is_reported_under_its_name(corpus, tokenizer_folder, tmp_path):
    (tmp_path / "other.txt").write_text(sentences(99, 30), encoding="utf-8")
    recipe = make_recipe(corpus, tokenizer_folder, steps=1)
    tree = recipe.model_dump()
    tree["data"]["validation_sources"] = [{"name": "other", "kind": "text", "path": str(tmp_path / "other.txt")}]
    outcome = train_recipe(Recipe.model_validate(tree), tmp_path / "run", quiet=True)
    rows = [row for row in read_metrics(tmp_path / "run" / "metrics.jsonl") if "product_bpb" in row]
    assert [row.get("set") for row in rows] == [None, "other"]
    assert outcome.validation["product_bpb"] == rows[0]["product_bpb"] != rows[1]["product_bpb"]


def test_compiled_stages_compute_what_plain_ones_do(corpus, tokenizer_folder, monkeypatch):
    """Traced by torch.compile; the code generator is left out, it only takes time."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile_(function, backend="eager"))
    plain = build_trainer(make_recipe(corpus, tokenizer_folder), quiet=True)
    traced = build_trainer(make_recipe(corpus, tokenizer_folder, compile=True), quiet=True)
    assert traced.objective.stage_runner is not None
    expected = [plain.train_step()["loss"] for _ in range(2)]
    assert [traced.train_step()["loss"] for _ in range(2)] == pytest.approx(expected, abs=1e-5)
