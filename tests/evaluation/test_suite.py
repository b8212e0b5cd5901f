from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stagewise.evaluation.bpb import evaluate_bpb
from stagewise.evaluation.rows import document_batches
from stagewise.evaluation.suite import difference, measure

BYTES = torch.tensor([0, 1, 2, 3])


def documents(count=12, vocab=96, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocab, generator.integers(3, 60)).tolist() for _ in range(count)]


def test_a_hand_made_model_has_the_figures_worked_out_on_paper(two_stages):
    # every document is 1 2 3: stage 0 pays 3 bits for 6 bytes, stage 1 9 bits, the final path 6 bits
    report = measure(two_stages, [[1, 2, 3]] * 4, BYTES, 0).report(resamples=50, seed=0)
    assert report["stage_bpb"] == pytest.approx([0.5, 1.5])
    assert report["final_path_bpb"] == pytest.approx(1.0)
    assert report["intervals"]["stage_bpb"][0] == pytest.approx([0.5, 0.5])  # equal documents: no spread
    assert (report["documents"], report["tokens"], report["bytes"]) == (4, 12, 24)
    assert report["agreement"] == {
        "names": ["stage_0", "stage_1", "prefix_2", "final_path"],
        "matrix": [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]],
    }
    assert report["expected_calibration_error"]["stage_0"] == pytest.approx(0.5)  # always right, half sure


def test_entropy_weights_favour_the_sharper_expert(two_stages):
    figures = measure(two_stages, [[1, 2, 3]] * 2, BYTES, 0, entropy_tau=0.05).figures()
    assert figures["stage_bpb"][0] < figures["entropy_weighted_bpb"] < figures["product_bpb"]


def test_the_suite_equals_the_training_loops_figures(tiny_model):
    model, texts, ones = tiny_model(), documents(), torch.ones(96, dtype=torch.long)
    rows = [(batch.inputs, batch.targets) for batch in document_batches(texts, 87, 32)]
    quick = evaluate_bpb(model, rows, ones)
    figures = measure(model, texts, ones, 87, context=32, batch_tokens=100).figures()
    for name, value in figures.items():
        if not name.startswith("entropy"):
            assert value == pytest.approx(quick[name], rel=1e-5), name


def test_documents_do_not_see_each_other(tiny_model):
    model, texts, ones = tiny_model(), documents(), torch.ones(96, dtype=torch.long)
    together = measure(model, texts, ones, 87).nats
    alone = np.concatenate([measure(model, [text], ones, 87).nats for text in texts], axis=1)
    assert np.allclose(together, alone, rtol=1e-4)


def test_results_are_the_same_for_a_seed_and_intervals_hold_the_figure(tiny_model):
    model, ones = tiny_model(), torch.ones(96, dtype=torch.long)
    measurement = measure(model, documents(), ones, 87)
    report = measurement.report(resamples=200, seed=5)
    assert report == measure(model, documents(), ones, 87).report(resamples=200, seed=5)
    assert report["intervals"] != measurement.report(resamples=200, seed=6)["intervals"]
    low, high = report["intervals"]["product_bpb"]
    assert low < report["product_bpb"] < high


def test_a_paired_difference_is_narrower_than_the_two_intervals(tiny_model):
    ones, texts = torch.ones(96, dtype=torch.long), documents(30)
    model = tiny_model()
    first = measure(model, texts, ones, 87)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.02)
    second = measure(model, texts, ones, 87)
    paired = difference(first, second, resamples=300, seed=0)["product_bpb"]
    assert paired["difference"] == pytest.approx(second.figures()["product_bpb"] - first.figures()["product_bpb"])
    low, high = paired["interval"]
    alone_low, alone_high = first.report(300, 0)["intervals"]["product_bpb"]
    assert low <= paired["difference"] <= high and high - low < (alone_high - alone_low) / 3
    same = difference(first, first, resamples=50, seed=0)
    assert all(entry == {"difference": 0.0, "interval": [0.0, 0.0]} for entry in same.values())


def test_an_end_to_end_model_and_a_staged_one_are_compared_by_their_default_outputs(two_stages, bigram_stages):
    staged = measure(two_stages, [[1, 2, 3]] * 3, BYTES, 0)
    whole = measure(bigram_stages(two_stages.tables, two_stages.final, poe_mode="none"), [[1, 2, 3]] * 3, BYTES, 0)
    assert "product_bpb" not in whole.figures()
    compared = difference(whole, staged, 20, 0)
    gap = staged.figures()["product_bpb"] - whole.figures()["final_path_bpb"]
    assert compared["default_output_bpb"]["difference"] == pytest.approx(gap)
    assert set(compared) == {"final_path_bpb", "final_path_accuracy", "default_output_bpb", "default_output_accuracy"}


def test_bad_input_is_named(two_stages):
    with pytest.raises(ValueError, match="only special tokens"):
        measure(two_stages, [[0, 0], []], BYTES, 0)
    with pytest.raises(ValueError, match="context=64"):
        measure(two_stages, [[1]], BYTES, 0, context=64)
    two_stages.tables[0, 1, 1] = math.nan
    with pytest.raises(ValueError, match="stage_0 has NaN"):
        measure(two_stages, [[1, 2]], BYTES, 0)
