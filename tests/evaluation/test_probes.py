from __future__ import annotations

import json

import pytest
import torch

from stagewise.evaluation.probes import (
    SEVEN_PROMPTS,
    Probe,
    compare_ranks,
    default_modes,
    grid,
    loops,
    read_probes,
    run_probes,
    target_ranks,
)
from stagewise.modeling import load, load_tokenizer


@pytest.fixture(scope="module")
def pair(model_folder):
    return load(model_folder), load_tokenizer(model_folder)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([5] * 8, True),
        ([5] * 7, False),
        ([9, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([1, 2, 3, 1, 2, 3, 1, 2, 4], False),
        ([1, 2, 3, 1, 2, 3], False),
        (list(range(40)), False),
        ([7, *(list(range(32)) * 3)], True),
        (list(range(33)) * 3, False),
        ([], False),
    ],
)
def test_a_loop_is_three_repetitions_at_the_end(tokens, expected):
    assert loops(tokens) is expected


def test_ranks_count_the_tokens_that_score_higher(pair):
    model, tokenizer = pair
    ids = tokenizer.ensure_bos(tokenizer.encode_ordinary("The expert"))
    inputs = torch.tensor([ids])
    product = model.forward_aggregated(inputs)[0, -1]
    with torch.no_grad():
        final = model(inputs, output_mode="final").logits[0, -1]
    for target in (0, 50, 300):
        assert target_ranks(model, ids, target) == {
            "product": 1 + int((product > product[target]).sum()),
            "final_path": 1 + int((final > final[target]).sum()),
        }
    assert target_ranks(model, ids, int(product.argmax()))["product"] == 1


def test_wins_ties_and_losses_are_the_products():
    ranks = [{"product": 1, "final_path": 5}, {"product": 2, "final_path": 2}, {"product": 9, "final_path": 3}]
    assert compare_ranks(ranks) == {
        "targets": 3,
        "mean_rank_product": 4.0,
        "mean_rank_final_path": 10 / 3,
        "wins": 1,
        "ties": 1,
        "losses": 1,
    }
    assert compare_ranks([{"final_path": 4}]) == {"targets": 1, "mean_rank_final_path": 4.0}


def test_every_mode_runs_and_lossless_ones_agree(pair):
    model, tokenizer = pair
    report = run_probes(model, tokenizer, max_new_tokens=10)
    assert report["modes"] == ["full", "prefix:2", "prefix:1", "stage:1", "stage:2", "speculative:4"]
    assert [row["prompt"] for row in report["probes"]] == [probe.prompt for probe in SEVEN_PROMPTS]
    for row in report["probes"]:
        assert row["texts"]["full"]["tokens"] == row["texts"]["speculative:4"]["tokens"]
        assert ("ranks" in row) == (row["target"] is not None)
    assert report["summary"]["mean_depth"]["prefix:1"] == 1.0 and report["summary"]["ranks"]["targets"] == 6
    assert json.loads(json.dumps(report)) == report


def test_the_text_is_the_models_greedy_text(pair):
    model, tokenizer = pair
    row = run_probes(model, tokenizer, [Probe("Early")], modes=["prefix:2"], max_new_tokens=6)["probes"][0]
    ids = tokenizer.ensure_bos(tokenizer.encode_ordinary("Early"))
    for _ in range(6):
        ids.append(int(model.forward_aggregated(torch.tensor([ids]), 2)[0, -1].argmax()))
    assert row["texts"]["prefix:2"]["tokens"] == ids[-6:]


def test_an_end_to_end_model_has_one_mode_and_one_rank(end_to_end_folder):
    model, tokenizer = load(end_to_end_folder), load_tokenizer(end_to_end_folder)
    report = run_probes(model, tokenizer, [Probe("The", " expert")], max_new_tokens=3)
    assert report["modes"] == ["full"] and set(report["probes"][0]["ranks"]) == {"final_path"}
    assert "wins" not in report["summary"]["ranks"]


def test_wand_is_probed_where_bounds_are_stored(pair):
    config = pair[0].config
    config.poe_wand_p99_bounds_per_stage_head = [1.0, 1.0]
    assert "wand" in default_modes(config)
    config.poe_wand_p99_bounds_per_stage_head = None


def test_a_grid_has_a_row_a_prompt_and_a_column_a_checkpoint(pair):
    model, tokenizer = pair
    reports = [run_probes(model, tokenizer, [Probe("A"), Probe("B")], modes=["full"], max_new_tokens=n) for n in (1, 2)]
    table = grid(reports)
    assert [row[0] for row in table] == ["A", "B"]
    assert table[1][1:] == [report["probes"][1]["texts"]["full"]["text"] for report in reports]


def test_prompt_files_are_read_with_and_without_targets(tmp_path):
    lines = tmp_path / "prompts.txt"
    lines.write_text("The sky is\t blue\n\nNo target\n")
    assert read_probes(lines) == [Probe("The sky is", " blue"), Probe("No target")]
    records = tmp_path / "prompts.jsonl"
    records.write_text('{"prompt": "a", "target": "b"}\n{"prompt": "c"}\n')
    assert read_probes(records) == [Probe("a", "b"), Probe("c")]
    records.write_text('{"prompt": "a"}\nnot json\n')
    with pytest.raises(ValueError, match=r"prompts\.jsonl:2"):
        read_probes(records)
    records.write_text('{"text": "a"}\n')
    with pytest.raises(ValueError, match="named prompt"):
        read_probes(records)
    lines.write_text("\n")
    with pytest.raises(ValueError, match="no prompt"):
        read_probes(lines)
    with pytest.raises(FileNotFoundError):
        read_probes(tmp_path / "absent.txt")
