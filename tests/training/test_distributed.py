"""Two gloo ranks against one process: losses, state, a rank that dies, other numbers of ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from stagewise.recipe import load_recipe
from stagewise.training.checkpoint import checkpoints, read_state
from stagewise.training.distributed import ShardedMuonAdamW, close_ranks, open_ranks
from stagewise.training.metrics import read_metrics
from stagewise.training.optimizer import MuonAdamW, parameter_groups
from stagewise.training.run import run_tokenizer, train_recipe

SOURCE = Path(__file__).parents[2] / "src"

RECIPE = """
name: tiny
seed: 1
model:
  {hidden_size: 32, num_hidden_layers: 3, num_attention_heads: 2, vocab_size: 330, max_position_embeddings: 64,
   poe_mode: residual_logop, residual_weight: 0.5, poe_stage_layers: [1, 1, 1], per_stage_head: true}
tokenizer: {path: TOKENIZER}
data: {sources: [{name: page, kind: text, path: CORPUS}], validation_fraction: 0.2}
schedule: {warmup_steps: 2}
optimizer: {orthogonalise_dtype: float32}
training: {steps: 6, batch_tokens: 256, micro_batch: 2, sequence_length: 32, dtype: float32, eval_every: 0,
  eval_tokens: 256, checkpoint_every: 3, log_every: 1}
"""


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "corpus").mkdir()
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        numbers = torch.randint(0, 400, (150,), generator=generator).tolist()
        (folder / "corpus" / f"{i}.txt").write_text(" ".join(f"word{n} is {n * i}" for n in numbers))
    text = RECIPE.replace("CORPUS", str(folder / "corpus"))
    (folder / "plain.yaml").write_text(text.replace("tokenizer: {path: TOKENIZER}\n", ""))
    run_tokenizer(load_recipe(folder / "plain.yaml")).save_pretrained(folder / "tokenizer")
    (folder / "tiny.yaml").write_text(text.replace("TOKENIZER", str(folder / "tokenizer")))
    return folder / "tiny.yaml"


DIES = """
import os, sys
from stagewise.recipe import load_recipe
from stagewise.training import loop
from stagewise.training.run import train_recipe

step = loop.Trainer.train_step
def dies(self):
    if self.step == 4 and self.ranks.rank == 1:
        os._exit(9)
    return step(self)
loop.Trainer.train_step = dies
train_recipe(load_recipe(sys.argv[1]), sys.argv[2], quiet=True)
"""


def under_torchrun(code: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `code` as two processes started by torchrun."""
    script = folder / "ranks.py"
    script.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), *arguments]
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=240)


def test_two_ranks_reproduce_one_and_a_dead_rank_stops_all_and_one_rank_goes_on(recipe_file, as_two_ranks, tmp_path):
    """330 tokens pad to 384 rows; 3 stages' shapes divide by 2 or do not: both are covered."""
    torch.set_num_threads(1)
    alone = train_recipe(load_recipe(recipe_file), tmp_path / "alone", quiet=True)
    expected = [row["loss"] for row in read_metrics(tmp_path / "alone" / "metrics.jsonl") if "loss" in row]
    run = tmp_path / "pair"
    assert under_torchrun(DIES, tmp_path, str(recipe_file), str(run)).returncode != 0
    assert [folder.name for folder in checkpoints(run)] == ["step-000003"]
    as_two_ranks(lambda: train_recipe(load_recipe(recipe_file), run, resume=True, quiet=True))
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert losses == pytest.approx(expected, abs=2e-4)
    one, two = read_state(alone.checkpoint), read_state(checkpoints(run)[-1])
    assert one.data == two.data and one.optimizer.keys() == two.optimizer.keys()
    assert {n: t.shape for n, t in one.optimizer.items()} == {n: t.shape for n, t in two.optimizer.items()}
    validation = [row for row in read_metrics(run / "metrics.jsonl") if "product_bpb" in row][-1]
    assert validation["tokens"] == alone.validation["tokens"]
    assert validation["product_bpb"] == pytest.approx(alone.validation["product_bpb"], abs=2e-3)
    # one rank goes on where two stopped
    shutil.rmtree(run / "checkpoints" / "step-000006")
    resumed = train_recipe(load_recipe(recipe_file), run, resume=True, quiet=True)
    again = [row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row]
    assert resumed.step == 6 and again == pytest.approx(expected, abs=2e-4)


def tensors() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"transformer.wte.weight": (67, 32), "lm_head.weight": (64, 32), "resid_lambdas": (3,)}
    shapes |= {f"transformer.h.{i}.attn.c_q.weight": (32, 32) for i in range(3)}
    shapes |= {f"transformer.h.{i}.mlp.c_fc.weight": (128, 32) for i in range(2)}
    shapes |= {"transformer.h.1.attn.ve_gate.weight": (2, 12)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def compare_optimizers(result: Path) -> None:
    ranks = open_ranks("cpu")
    whole, shared = tensors(), tensors()

    def sharded():
        groups = parameter_groups(shared.items(), 32)
        return ShardedMuonAdamW(groups, ranks=ranks, orthogonalise_dtype=torch.float32)

    alone = MuonAdamW(parameter_groups(whole.items(), 32), orthogonalise_dtype=torch.float32)
    pair = sharded()
    worst = 0.0
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        for name in whole:
            parts = [torch.randn(whole[name].shape, generator=generator) for _ in range(2)]
            whole[name].grad, shared[name].grad = parts[0] + parts[1], parts[ranks.rank]
        alone.step()
        pair.step()
        if step == 1:
            state, expected = pair.named_state(), alone.named_state()
            assert state.keys() == expected.keys()
            worst = max((state[name] - expected[name]).abs().max().item() for name in state)
            pair = sharded()
            pair.load_named_state(state)
    worst = max(worst, *((whole[name] - shared[name]).abs().max().item() for name in whole))
    held, total = (sum(t.numel() for state in o.state.values() for t in state.values()) for o in (pair, alone))
    if ranks.first:
        result.write_text(json.dumps({"worst": worst, "held": held, "total": total}))
    close_ranks()


def test_the_sharded_optimizer_equals_the_whole_one_and_holds_about_half_the_state(as_two_ranks, tmp_path):
    """67 rows do not divide by two ranks, nor do 3 matrices; 3 and 24 elements are too small to divide."""
    as_two_ranks(compare_optimizers, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["worst"] < 1e-5
    assert result["held"] < 0.65 * result["total"]
