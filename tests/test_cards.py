"""The released models' inference snippets run against folders exported here, only the repository's name replaced.

Each snippet is a file in tests/snippets. All run in one process that has transformers but not stagewise.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SNIPPETS = Path(__file__).parent / "snippets"
BOS = 32759
WIDE = {
    "vocab_size": 32768,
    "hidden_size": 32,
    "head_dim": 8,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
}
SHAPES = {
    "cognica/Cognica-PoE-v1.0-1.5B-base": {
        "poe_mode": "residual_logop",
        "poe_stage_layers": [3, 1, 1, 1],
        "num_hidden_layers": 6,
        "add_bos_token": True,
        "poe_wand_p99_bounds_per_stage_head": [0.2, 0.2, 0.2],
    },
    "cognica/Cognica-PoE-v1.0-3B-base": {
        "poe_stage_layers": [2, 1, 1, 1],
        "num_hidden_layers": 5,
        "poe_wand_p99_bounds_per_stage_head": [0.2, 0.2, 0.2],
    },
    "cognica/Cognica-BP-v1.0-1.3B-base": {
        "poe_mode": "none",
        "poe_stage_layers": [1, 1, 1, 1],
        "num_hidden_layers": 4,
        "per_stage_head": False,
    },
    "cognica/Cognica-PoE-v1.0-1.3B-base": {
        **WIDE,
        "poe_stage_layers": [1, 1, 1, 1],
        "num_hidden_layers": 4,
        "per_stage_head": False,
    },
}
SPECIALISTS = {"cognica/Cognica-PoE-v1.0-1.3B-stage-chat": 2, "cognica/Cognica-PoE-v1.0-1.3B-stage-tool": 4}

RUN_ALL = """
import json, pathlib, sys, traceback
sys.modules["stagewise"] = None  # importing it from here on fails
import torch
from transformers import logging
logging.disable_progress_bar()
if not torch.cuda.is_available():
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
places = json.loads(sys.argv[1])
found = {}
for path in sorted(pathlib.Path(sys.argv[2]).glob("*.py")):
    text = path.read_text(encoding="utf-8")
    for name, place in places.items():
        text = text.replace(f'"{name}"', repr(place))
    values = {"__name__": "__main__"}
    torch.manual_seed(0)
    try:
        exec(compile(text, str(path), "exec"), values)
    except Exception:
        found[path.stem] = {"error": traceback.format_exc(limit=-4)}
        continue
    kept = {}
    for key, value in values.items():
        if hasattr(value, "input_ids"):
            value = value.input_ids
        if isinstance(value, torch.Tensor):
            kept[key] = value.tolist() if not value.is_floating_point() else list(value.shape)
        elif isinstance(value, (int, float, str, list)):
            kept[key] = value
    found[path.stem] = kept
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict:
    """The variables of every snippet after it ran."""
    from stagewise.hub.export import export

    spec = importlib.util.spec_from_file_location("hub_models", Path(__file__).parent / "hub" / "conftest.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    work = tmp_path_factory.mktemp("cards")
    places = {}
    for name, shape in SHAPES.items():
        source = models.write_checkpoint(work / "made" / name, **shape)
        places[name] = str(export(source, work / name))
    for name, layers in SPECIALISTS.items():
        source = models.write_delta(
            work / "made" / name, Path(places["cognica/Cognica-PoE-v1.0-1.3B-base"]), layers=layers
        )
        places[name] = str(export(source, work / name))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RUN_ALL, json.dumps(places), str(SNIPPETS)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=work, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.split("FOUND")[-1])


@pytest.fixture
def after(ran):
    """Variables of one snippet by name; a snippet that failed fails the test with its traceback."""

    def get(name: str) -> dict:
        assert "error" not in ran[name], ran[name]["error"]
        return ran[name]

    return get


def continued(out: list, prompt: list, most: int) -> bool:
    """Whether `out` is the prompt and between one and `most` tokens more, for one row."""
    return out[0][: len(prompt[0])] == prompt[0] and 1 <= len(out[0]) - len(prompt[0]) <= most


def test_every_snippet_names_a_repository_that_is_replaced():
    for path in SNIPPETS.glob("*.py"):
        names = set(re.findall(r'"(cognica/[^"]+)"', path.read_text(encoding="utf-8")))
        assert names and names <= {*SHAPES, *SPECIALISTS}


def test_poe_1_5b_card_runs(after):
    found = after("poe_1_5b_base")
    prompt = found["ids"]
    assert prompt[0][0] == 311 and prompt[0].count(311) == 1  # add_bos_token: exactly one
    for name in ("full", "out_s0", "out_s0_s1", "out_s0_s2", "out_full", "single", "wand", "out_all", "out_weighted"):
        assert continued(found[name], prompt, 32), name
    assert found["out_full"] == found["full"] == found["out_all"]
    assert found["out_s0"] == found["single"]
    assert continued(found["speculative"], prompt, 64)
    assert found["speculative"][0][: len(found["full"][0])] == found["full"][0]
    assert 0 <= found["accept_rate"] <= 1
    assert found["logits_s0"] == found["logits_s3"] == [1, len(prompt[0]), 320]


def test_poe_3b_card_runs(after):
    found = after("poe_3b_base")
    prompt = found["input_ids"]
    for name, most in (
        ("full", 32),
        ("prefix", 64),
        ("single", 64),
        ("wand", 64),
        ("speculative", 64),
        ("composition", 64),
    ):
        assert continued(found[name], prompt, most), name
    assert found["prefix"] == found["single"]
    assert found["speculative"][0][: len(found["full"][0])] == found["full"][0]
    used = found["stages_used"]
    used = used[0] if isinstance(used[0], list) else used
    assert len(used) == len(found["wand"][0]) - len(prompt[0]) and set(used) <= {0, 1, 2, 3}
    assert found["logits"] == found["log_p"] == [1, len(prompt[0]), 320]


def test_one_checkpoint_loads_by_its_branch(after):
    assert after("poe_3b_revision")["dtype"] == "torch.bfloat16"


def test_bp_1_3b_card_runs(after):
    found = after("bp_1_3b_base")
    assert found["ids"][0].count(311) == 1 and found["ids"][0][0] == 311
    assert continued(found["out"], found["ids"], 40)


def test_stage_chat_card_runs(after):
    found = after("stage_chat")
    assert found["ids"][:2] == [BOS, BOS + 1] and found["ids"].count(BOS) == 1
    assert continued(found["out"], [found["ids"]], 80)


def test_stage_tool_card_runs(after):
    found = after("stage_tool")
    assert found["ids"][-2:] == [BOS + 2, BOS + 3] and found["ids"].count(BOS) == 1
    assert continued(found["out"], [found["ids"]], 80)
