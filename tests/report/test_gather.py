"""Gathering: what files hold is found whatever they are called, and nothing is shown that was not measured."""

import json
import os

import pytest

from stagewise.hub.measurements import duration
from stagewise.report.gather import gather
from stagewise.report.page import render

FIGURES = {
    "default_output": "product",
    "stage_bpb": [1.5, 1.4],
    "prefix_bpb": [1.5, 1.35],
    "product_bpb": 1.35,
    "mean_stage_bpb": 1.45,
    "final_path_bpb": 2.0,
    "crossover_gap": -0.05,
    "stage_accuracy": [0.4, 0.42],
    "prefix_accuracy": [0.4, 0.43],
    "product_accuracy": 0.43,
    "tokens": 1000,
    "bytes": 3000,
}


def write_run(folder):
    folder.mkdir()
    rows = []
    for step in range(1, 21):
        rows.append({"step": step, "tokens": 64 * step, "seconds": 0.5 * step, "loss": 5 - 0.1 * step})
        rows[-1]["stage_loss"] = [5.1 - 0.1 * step, 4.9 - 0.1 * step]
        if step % 10 == 0:
            rows.append({"step": step, "seconds": 0.5 * step, **FIGURES, "product_bpb": 3 - 0.05 * step})
            rows.append({"step": step, "seconds": 0.5 * step, "set": "other", **FIGURES, "product_bpb": 9.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo')
    recipe = "name: little\ndescription: A little run.\nmodel: {poe_mode: flat, poe_stage_layers: [1, 1]}\n"
    (folder / "recipe.yaml").write_text(recipe)
    return folder


def test_fresh_run_shows_its_curves_and_last_validation(tmp_path):
    content = gather(write_run(tmp_path / "run"))
    assert content.title == "little" and content.stages == 2
    assert sorted(content.curves.loss) == ["expert 0", "expert 1"]
    assert content.curves.loss["expert 1"][-1] == (20, pytest.approx(2.9))
    assert content.curves.validation["product"] == [(10, 2.5), (20, 2.0)]
    assert content.evaluation["product_bpb"] == 2.0 and content.evaluation["tokens"] == 1000
    assert content.setting["tokens trained"] == "1,280" and content.setting["training time"] == "10.0 s"
    page = render(content)
    assert "A little run." in page and "2.0000" in page and "9.0000" not in page
    assert "<h2>Calibration</h2>" not in page and "<h2>What the experts say</h2>" not in page


def test_measurements_are_found_under_any_file_name_and_the_newest_counts(tmp_path):
    model = tmp_path / "model"
    (model / "eval").mkdir(parents=True)
    bounds = {"poe_wand_p99_bounds_per_stage_head": [0.7], "poe_stage_layers": [1, 1], "poe_mode": "flat"}
    (model / "config.json").write_text(json.dumps(bounds))
    wrapped = {
        "models": [{"figures": {**FIGURES, "intervals": {"product_bpb": [1.3, 1.4], "stage_bpb": [[1, 2]] * 2}}}]
    }
    speculation = {
        "text": "greedy continuations",
        "tokens": 512,
        "rows": [{"draft_stage": 0, "k_draft": 2, "acceptance": 0.9}],
    }
    calibration = {
        "tokens": 131072,
        "exits": [
            {"safety": 0.5, "exit_shares": [0.85, 0.15], "disagreement": 0.05},
            {"safety": 1.0, "exit_shares": [0.75, 0.25], "disagreement": 0.0125},
        ],
        "routing": [{"cap": 0.02, "rate_over": "all", "routed_share": 0.6, "threshold": 1.0, "projected_speedup": 1.4}],
        "speculation": speculation,
        "provenance": {"hardware": {"processor": "A CPU", "cores": 2}, "commit": "abc", "created": "2026-01-01"},
    }
    old = {**FIGURES, "product_bpb": 7.0}
    for age, (name, value) in enumerate([("new", wrapped), ("anything", calibration), ("old", old)]):
        path = model / "eval" / f"{name}.json"
        path.write_text(json.dumps(value))
        os.utime(path, (1e9 - age, 1e9 - age))
    content = gather(model)
    assert content.evaluation["product_bpb"] == 1.35 and content.bounds == [0.7]
    assert content.exit_shares == [0.75, 0.25] and "131,072" in content.exit_setting and len(content.exits) == 2
    assert content.acceptance[0]["acceptance"] == 0.9 and content.routing[0]["routed_share"] == 0.6
    assert content.setting["hardware"] == "A CPU, 2 cores" and content.setting["commit"] == "abc"
    page = render(content)
    for text in ("[1.3000, 1.4000]", "75.0%", "1.25%", "60.00%", "1.400x", "0.7000", "greedy continuations"):
        assert text in page


def test_model_inside_a_run_brings_the_run_along(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "model").mkdir()
    (run / "model" / "config.json").write_text(json.dumps({"poe_mode": "flat", "poe_stage_layers": [1, 1]}))
    assert gather(run / "model").curves.validation == gather(run).curves.validation


def test_checkpoint_is_shown_with_its_run_up_to_its_own_step(tmp_path):
    checkpoint = write_run(tmp_path / "run") / "checkpoints" / "step-000010"
    checkpoint.mkdir(parents=True)
    (checkpoint / "config.json").write_text(json.dumps({"poe_mode": "flat", "poe_stage_layers": [1, 1]}))
    content = gather(checkpoint)
    assert content.setting["steps"] == "10" and content.curves.loss["expert 0"][-1][0] == 10
    assert content.evaluation["product_bpb"] == 2.5


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a folder"):
        gather(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="neither metrics.jsonl nor a model"):
        gather(tmp_path)
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"step": 1\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        gather(run)


@pytest.mark.parametrize("seconds, text", [(3.21, "3.2 s"), (192.4, "3 min 12 s"), (7500, "2 h 5 min")])
def test_durations_read_as_people_say_them(seconds, text):
    assert duration(seconds) == text
