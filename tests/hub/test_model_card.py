"""Model cards: every number was measured, usage runs, limitations follow from the figures."""

import json
import re
import shutil

import pytest
import yaml

from stagewise.hub.measurements import Measurements, read_measurements
from stagewise.hub.model_card import limitations, model_card, write_card

FIGURES = {
    "default_output": "product",
    "stage_bpb": [1.5123, 1.4234, 1.4123],
    "prefix_bpb": [1.5123, 1.4011, 1.3717],
    "stage_accuracy": [0.4011, 0.4122, 0.4233],
    "prefix_accuracy": [0.4011, 0.4244, 0.4351],
    "product_bpb": 1.3717,
    "product_accuracy": 0.4351,
    "mean_stage_bpb": 1.4493,
    "final_path_bpb": 2.7183,
    "crossover_gap": -0.0406,
    "tokens": 132077,
    "bytes": 400331,
    "intervals": {"product_bpb": [1.3611, 1.3822], "stage_bpb": [[1.5, 1.52], [1.41, 1.43], [1.4, 1.42]]},
    "agreement": {
        "names": ["stage_0", "stage_1", "stage_2"],
        "matrix": [[1, 0.8, 0.7], [0.8, 1, 0.971], [0.7, 0.971, 1]],
    },
    "expected_calibration_error": {"stage_0": 0.0731, "prefix_3": 0.01},
}
CALIBRATION = {
    "tokens": 131072,
    "exits": [
        {"safety": 0.5, "exit_shares": [0.713, 0.161, 0.126], "disagreement": 0.0345},
        {"safety": 1.0, "exit_shares": [0.613, 0.211, 0.176], "disagreement": 0.0123},
    ],
    "routing": [{"cap": 0.02, "rate_over": "all", "routed_share": 0.6543, "projected_speedup": 1.4712}],
    "speculation": {"text": "greedy continuations", "rows": [{"draft_stage": 0, "k_draft": 3, "acceptance": 0.8765}]},
}


@pytest.fixture
def evaluated(checkpoint, tmp_path):
    """A checkpoint with measurements in eval/."""
    folder = shutil.copytree(checkpoint, tmp_path / "run" / "checkpoints" / "step-000100")
    (folder / "eval").mkdir()
    (folder / "eval" / "bpb.json").write_text(json.dumps(FIGURES))
    return folder


def calibrate(folder):
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    config = json.loads((folder / "config.json").read_text())
    config["poe_wand_p99_bounds_per_stage_head"] = [0.5123, 0.2345]
    (folder / "config.json").write_text(json.dumps(config))


def write_run(run):
    rows = [{"step": s, "tokens": 640 * s, "seconds": 1.5 * s, "loss": 2.0} for s in (50, 100, 150)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "little",
        "description": "A little model of source code.",
        "seed": 7,
        "optimizer": {"matrix_lr": 0.02},
        "data": {"sources": [{"name": "code", "share": 3.0}, {"name": "prose", "share": 1.0}]},
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def test_card_before_evaluation_is_an_error_that_says_what_to_do(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    with pytest.raises(ValueError, match="stagewise evaluate"):
        write_card(folder)
    assert not (folder / "README.md").exists()


def test_every_number_in_a_card_was_measured_or_configured(evaluated):
    calibrate(evaluated)
    card = model_card(evaluated, name="owner/little")
    body = re.sub(r"```.*?```", "", card.split("---", 2)[2], flags=re.S)
    body = re.sub(r"`[^`]*`|[Ee]xpert \d+|\| \d \||(?<=\d) to \d", "", body)
    config = json.loads((evaluated / "config.json").read_text())
    known = {float(v) for v in _numbers(json.dumps([FIGURES, CALIBRATION, config]))}
    known |= {round(100 * v, digits) for v in known for digits in (0, 1, 2)} | {round(v, 3) for v in known}
    known |= {round(100 * (1 - FIGURES["product_accuracy"]), 1), round(100 * (1.5123 - 1.3717) / 1.3717, 2)}
    known |= {95.0, 99.0, 1.0, 3.0}  # the kind of interval and percentile, safety, number of stages
    known |= {float(sum(t.numel() for t in _tensors(evaluated)))}
    layers = [0, 1, 2, 3, 4, 5, 40.0, 60.0, 100.0]  # ranges of layers and shares of the trunk for stages of 2, 1, 2
    unknown = [n for n in _numbers(body) if float(n) not in known | set(map(float, layers))]
    assert not unknown, f"numbers from nowhere: {unknown}"


def test_unmeasured_parts_are_absent(evaluated):
    (evaluated / "eval" / "bpb.json").write_text(json.dumps({"product_bpb": 1.25, "stage_bpb": [1.3, 1.28, 1.26]}))
    card = model_card(evaluated)
    for text in ("Calibration", "accuracy of", "[", "Accepted drafts", "| steps |", "data | target"):
        assert text not in card.split("---", 2)[2].split("## Usage")[0], text
    assert "1.2500 bits per byte" in card and "nan" not in card.lower() and "None" not in card


def test_metadata_is_yaml_that_a_hub_reads(evaluated):
    calibrate(evaluated)
    facts = yaml.safe_load(model_card(evaluated, name="owner/little", license="mit").split("---")[1])
    assert facts["license"] == "mit" and facts["library_name"] == "transformers"
    (result,) = facts["model-index"][0]["results"]
    assert {m["type"]: m["value"] for m in result["metrics"]}["product_bpb"] == FIGURES["product_bpb"]
    assert facts["model-index"][0]["name"] == "little"
    assert "base_model" not in facts


def test_usage_runs_as_it_stands_but_for_the_name(evaluated, capsys):
    calibrate(evaluated)
    card = model_card(evaluated, name="owner/little")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.S)
    assert len(blocks) == 2 and blocks[0].count('"owner/little"') == 1
    values: dict = {}
    for block in blocks:
        exec(block.replace('"owner/little"', repr(str(evaluated))), values)
    assert values["same"].tolist() == values["out"].tolist()
    assert 0 <= float(values["accepted"]) <= 1
    assert capsys.readouterr().out.startswith("<|bos|>The")


def test_training_of_the_checkpoints_own_step_is_told(evaluated):
    write_run(evaluated.parent.parent)
    card = model_card(evaluated)
    assert "# little" in card and "A little model of source code." in card
    assert "| steps | 100 |" in card and "| tokens | 64,000 |" in card and "| time | 2 min 30 s |" in card
    assert "| code | 75.0% |" in card and "| matrix lr | 0.02 |" in card


def test_limitations_follow_from_the_numbers():
    config = {"poe_mode": "flat", "poe_stage_layers": [2, 1, 2], "max_position_embeddings": 256}
    text = "\n".join(limitations(config, Measurements(figures=FIGURES)))
    assert "56.5% of the time" in text and "132,077 tokens" in text and "256 tokens" in text
    assert "2.7183" in text and "97.1%" in text and "7.3 percentage points" in text and "No exit bounds" in text
    assert "no better than" not in text
    good = {**FIGURES, "crossover_gap": 0.01, "product_bpb": 1.42, "final_path_bpb": 1.43, "agreement": {}}
    good["expected_calibration_error"] = {"stage_0": 0.01}
    text = "\n".join(limitations(config, Measurements(figures=good, bounds=[1.0, 1.0])))
    assert "no better than expert 2 alone" in text
    for absent in ("output_mode", "redundant", "confidence", "No exit bounds"):
        assert absent not in text
    plain = "\n".join(limitations({"poe_mode": "none"}, Measurements(figures={"final_path_bpb": 0.9})))
    assert "never trained to predict" in plain and "Expert 0" not in plain


def test_existing_card_is_kept_unless_forced(evaluated):
    (evaluated / "README.md").write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        write_card(evaluated)
    assert (evaluated / "README.md").read_text() == "mine"
    assert write_card(evaluated, force=True).read_text().startswith("---\n")
    assert not list(evaluated.glob(".README*"))


def test_card_of_a_delta_speaks_of_a_specialist(delta, tmp_path):
    folder = shutil.copytree(delta, tmp_path / "specialist")
    facts = json.loads((folder / "config.json").read_text())
    facts |= {"base_model_name_or_path": "owner/base", "stage_training": {"steps": 12, "val_bits_per_token": 2.5}}
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "eval").mkdir()
    (folder / "eval" / "bpb.json").write_text(json.dumps({"final_path_bpb": 1.5, "final_path_accuracy": 0.4}))
    card = model_card(folder, name="owner/specialist")
    assert "A specialist" in card and "its parent's come on top" in card and "| val_bits_per_token | 2.5 |" in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == "owner/base"
    assert "apply_chat_template" in card and "A base model" not in card


def test_damaged_measurements_are_named(evaluated):
    (evaluated / "eval" / "bpb.json").write_text("{")
    with pytest.raises(ValueError, match=r"bpb\.json is not valid JSON"):
        read_measurements(evaluated)


def _numbers(text: str) -> list[str]:
    return [n.replace(",", "") for n in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", text)]


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors").values()
