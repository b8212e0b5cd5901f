"""The README's commands and lines of Python run, and the quickstart reuses what it trained."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """A folder in which `stagewise quickstart` has run on a recipe small enough for a test; its output."""
    folder = tmp_path_factory.mktemp("newcomer")
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    recipe["model"].update(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, vocab_size=320)
    recipe["tokenizer"]["train_bytes"] = 100_000
    sources = ROOT / "src" / "stagewise" / "*" / "*.py"
    recipe["data"]["sources"] = [{"name": "code", "kind": "text", "path": str(sources)}]
    recipe["data"]["validation_fraction"] = 0.2
    recipe["training"].update(steps=6, batch_tokens=512, micro_batch=2, eval_every=3, eval_tokens=1024)
    recipe["training"].update(checkpoint_every=3, dtype="float32")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = "stagewise quickstart --recipe tiny.yaml --tokens 8192"
    return folder, command, run(command, folder)


def run(command: str, folder: Path) -> str:
    words = shlex.split(command)
    assert words[0] == "stagewise"
    done = subprocess.run(
        [sys.executable, "-m", "stagewise", *words[1:]], cwd=folder, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_quickstart_shows_every_expert_and_ends_with_three_commands(quickstart):
    folder, _, output = quickstart
    for word in ("expert 0 alone", "experts 0-2", "product of all", "Try next:"):
        assert word in output
    assert len(re.findall(r"^  stagewise \w+", output.split("Try next:")[1], flags=re.MULTILINE)) == 3
    assert (folder / "runs/quickstart/report.html").stat().st_size > 10_000


def test_quickstart_run_again_reuses_what_it_trained(quickstart):
    folder, command, _ = quickstart
    weights = folder / "runs/quickstart/model/model.safetensors"
    before = weights.stat().st_mtime_ns
    assert "reusing runs/quickstart/model" in run(command, folder)
    assert weights.stat().st_mtime_ns == before


def test_every_stagewise_command_of_the_readme_runs(quickstart):
    folder, _, _ = quickstart
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("stagewise ")]
    assert len(commands) >= 3
    for command in commands:
        assert run(command, folder).strip()


def test_the_lines_of_python_run(quickstart):
    folder, _, _ = quickstart
    (code,) = blocks("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "import os" in done.stdout


def test_every_make_target_of_the_readme_exists():
    wanted = {line.split()[1] for block in blocks("sh") for line in block.splitlines() if line.startswith("make ")}
    assert {"quickstart", "test"} <= wanted
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    assert wanted <= targets


def test_every_folder_of_the_readmes_tree_exists():
    (tree,) = blocks("")
    for line in tree.splitlines():
        name = line.split()[0]
        place = ROOT / "src/stagewise" / name if line.startswith("  ") else ROOT / name
        assert place.exists(), name
