"""Trajectories: every checkpoint measured alike, tables true to the measurements, resumed without repeating work."""

import csv
import json

import pytest

from stagewise.report import trajectory as module
from stagewise.report.trajectory import choose, find_checkpoints, measure_checkpoint, summarise, trajectory

STEPS = (100, 200, 1000)


def fake_measurement(step, folder, setting):
    """Figures of a made-up checkpoint that depend on its step."""
    gain = step / 10_000
    figures = {
        "product_bpb": 1.5 - gain,
        "mean_stage_bpb": 1.6 - gain,
        "final_path_bpb": 2.0,
        "crossover_gap": -0.02,
        "stage_bpb": [1.62 - gain, 1.55 - gain],
        "prefix_bpb": [1.62 - gain, 1.5 - gain],
        "stage_accuracy": [0.4 + gain, 0.42 + gain],
        "product_accuracy": 0.43 + gain,
        "intervals": {"product_bpb": [1, 2]},
    }
    calibration = {
        "p99_bounds": [3.0 + gain],
        "exits": [{"safety": s, "exit_shares": [0.5 / s, 1 - 0.5 / s], "disagreement": 0.01} for s in (0.5, 1.0)],
        "speculation": {"rows": [{"draft_stage": 0, "k_draft": 4, "acceptance": 0.9 + gain}]},
        "speculation_on_text": {"rows": [{"draft_stage": 0, "k_draft": 4, "acceptance": 0.1}]},
        "routing": [{"rate_over": "all", "routed_share": 0.7 + gain, "projected_speedup": 1.5, "threshold": None}],
    }
    setting = module.asdict(setting)
    return {"step": step, "setting": setting, "evaluation": {"models": [figures]}, "calibration": calibration}


@pytest.fixture
def run(tmp_path):
    for step in STEPS:
        folder = tmp_path / "run" / "checkpoints" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    return tmp_path / "run"


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_tables_hold_what_was_measured_by_step(run):
    out = trajectory(str(run), measure=fake_measurement)
    assert out == run / "trajectory"
    rows = json.loads((out / "trajectory.json").read_text())["rows"]
    assert [row["step"] for row in rows] == list(STEPS)
    for row in rows:
        gain = row["step"] / 10_000
        assert row["product_bpb"] == 1.5 - gain and row["bound_0_1"] == 3.0 + gain
        assert row["acceptance_0"] == 0.9 + gain and row["routed_share_all"] == 0.7 + gain
        assert row["exit_share_0"] == 0.5 and row["wand_disagreement"] == 0.01
    bpb = read_csv(out / "bpb.csv")
    assert [float(line["stage_bpb_1"]) for line in bpb] == [1.55 - s / 10_000 for s in STEPS]
    assert {p.stem for p in out.glob("*.csv")} == {"bpb", "accuracy", "bounds", "exits", "acceptance", "routing"}
    assert {p.stem for p in out.glob("*.svg")} == {p.stem for p in out.glob("*.csv")}
    page = (out / "trajectory.html").read_text()
    assert page.count("<svg") == 6 and "1.4900" in page and "91.00%" in page and "1.500x" in page
    assert "default-src 'none'" in page


def test_stopped_run_goes_on_where_it_stopped(run):
    measured = []

    def stops_at_the_second(step, folder, setting):
        if step == 200 and len(measured) < 2:
            raise KeyboardInterrupt
        measured.append(step)
        return fake_measurement(step, folder, setting)

    with pytest.raises(KeyboardInterrupt):
        trajectory(str(run), measure=stops_at_the_second)
    assert len(read_csv(run / "trajectory" / "bpb.csv")) == 1
    measured.append(0)
    trajectory(str(run), measure=stops_at_the_second)
    assert measured == [100, 0, 200, 1000]
    assert [int(line["step"]) for line in read_csv(run / "trajectory" / "bpb.csv")] == list(STEPS)
    trajectory(str(run), measure=stops_at_the_second)
    assert measured == [100, 0, 200, 1000]
    assert not list((run / "trajectory").rglob("*.tmp"))


def test_results_of_another_setting_are_never_mixed_in(run):
    trajectory(str(run), measure=fake_measurement, tokens=1000)
    with pytest.raises(ValueError, match=r"another setting \(tokens\)"):
        trajectory(str(run), measure=fake_measurement, tokens=2000)
    trajectory(str(run), measure=fake_measurement, tokens=2000, force=True)
    assert json.loads((run / "trajectory" / "trajectory.json").read_text())["setting"]["tokens"] == 2000


def test_checkpoints_are_chosen_by_step_or_by_stride(run):
    found = find_checkpoints(str(run))
    assert [step for step, _ in choose(found, None, 2)] == [100, 1000]
    assert [step for step, _ in choose(found, [200], 1)] == [200]
    with pytest.raises(ValueError, match="there are 100, 200, 1000"):
        choose(found, [300], 1)
    with pytest.raises(ValueError, match="every=0"):
        choose(found, None, 0)


def test_nothing_to_measure_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoints"):
        find_checkpoints(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="does not exist"):
        find_checkpoints(str(tmp_path / "nothing"))


def test_branches_of_a_repository_are_checkpoints(monkeypatch, tmp_path):
    import huggingface_hub

    class Api:
        def list_repo_refs(self, repo):
            class Ref:
                def __init__(self, name):
                    self.name = name

            class Refs:
                branches = [Ref(name) for name in ("main", "step-2000", "step-100")]

            return Refs()

    asked = []

    def snapshot(repo, revision, allow_patterns):
        asked.append((repo, revision))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    found = find_checkpoints("owner/model")
    assert [step for step, _ in found] == [100, 2000] and asked == []
    assert found[1][1]() == tmp_path and asked == [("owner/model", "step-2000")]


def test_model_trained_end_to_end_has_only_what_applies():
    result = {"step": 5, "evaluation": {"models": [{"final_path_bpb": 0.9, "final_path_accuracy": 0.4}]}}
    assert summarise(result) == {"step": 5, "final_path_bpb": 0.9, "final_path_accuracy": 0.4}


def test_measuring_a_real_checkpoint_agrees_with_evaluating_and_calibrating_it(write_checkpoint, tmp_path):
    from stagewise.evaluation.suite import evaluate_models

    folder = write_checkpoint(tmp_path / "step-000007")
    text = tmp_path / "text.jsonl"
    documents = [f"Here is document {i}, it is about the sea and the stars. " * (1 + i % 3) for i in range(24)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    setting = module.Setting([str(text)], 600, 0, 0.02, 4, 2, 8, True)
    row = summarise(measure_checkpoint(7, folder, setting))
    figures = evaluate_models([str(folder)], [str(text)], 600)["models"][0]
    assert row["product_bpb"] == figures["product_bpb"] and row["stage_bpb_2"] == figures["stage_bpb"][2]
    assert {"bound_0_1", "bound_1_2", "acceptance_0", "acceptance_1", "routed_share_all", "exit_share_2"} <= set(row)
    assert sum(row[f"exit_share_{k}"] for k in range(3)) == pytest.approx(1.0)
