from __future__ import annotations

import math

import pytest
import torch

from stagewise.evaluation.bpb import evaluate_bpb, score_tokens
from stagewise.modeling.pooling import entropy_weights, normalise, pool

BYTES = torch.tensor([0, 1, 2, 3])  # token 0 is special
ROW = torch.tensor([[0, 1, 2, 3]])
NEXT = torch.tensor([[1, 2, 3, 0]])  # the last target is special


def flat(result):
    """One number per name, lists unrolled, for `pytest.approx`."""
    return {
        f"{name}.{i}": number
        for name, value in result.items()
        for i, number in enumerate(value if isinstance(value, list) else [value])
    }


def random_stages(bigram_stages, stages=3, vocab=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(stages, vocab, vocab, generator=generator, dtype=torch.float64)
    return bigram_stages(tables, torch.randn(vocab, vocab, generator=generator, dtype=torch.float64))


def test_two_hand_made_stages_have_the_bits_per_byte_worked_out_on_paper(two_stages):
    result = evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES)
    # three counted targets of 1 + 2 + 3 bytes: stage 0 pays 3 x 1 bit, stage 1 3 x 3 bits, the final path 3 x 2 bits
    assert result["stage_bpb"] == pytest.approx([3 / 6, 9 / 6])
    assert result["mean_stage_bpb"] == pytest.approx(1.0)
    assert result["final_path_bpb"] == pytest.approx(1.0)
    # geometric mean of (1/2, 1/6 x 3) and (1/8, 7/24 x 3), renormalised
    right, wrong = math.sqrt(1 / 16), math.sqrt(7 / 24 / 6)
    product = -math.log2(right / (right + 3 * wrong)) * 3 / 6
    assert result["product_bpb"] == pytest.approx(product)
    assert result["prefix_bpb"] == pytest.approx([0.5, product])
    assert result["crossover_gap"] == pytest.approx(product - 1.5)
    assert result["stage_accuracy"] == [1.0, 0.0]
    assert result["product_accuracy"] == 1.0
    assert (result["tokens"], result["bytes"]) == (3, 6)
    assert result["default_output"] == "product"


def test_a_model_trained_end_to_end_has_only_the_final_path(two_stages):
    two_stages.config.poe_mode = "none"
    result = evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES)
    assert result == {
        "default_output": "final_path",
        "final_path_bpb": pytest.approx(1.0),
        "final_path_accuracy": 0.0,
        "tokens": 3,
        "bytes": 6,
    }


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_prefix_scores_equal_pooling_and_normalising(bigram_stages, alpha):
    model = random_stages(bigram_stages)
    ids = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(1))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    scores = score_tokens(model, inputs, targets, torch.ones(7, dtype=torch.long), entropy_tau=0.7, alpha=alpha)
    logits = model.tables[:, inputs.reshape(-1)]  # (K, N, V)
    for k in range(3):
        logp = normalise(pool(logits[: k + 1].log_softmax(-1), alpha=alpha))
        expected = -logp.gather(-1, targets.reshape(-1, 1)).squeeze(-1)
        row = scores.names.index(f"prefix_{k + 1}")
        assert torch.allclose(scores.nll[row], expected.double(), atol=1e-6)
        assert torch.equal(scores.top1[row], logp.argmax(-1))
        assert torch.allclose(scores.confidence[row], logp.exp().amax(-1).float(), atol=1e-6)
    logp = logits.log_softmax(-1)
    weighted = normalise(pool(logp, weights=entropy_weights(logp, 0.7), alpha=alpha))
    expected = -weighted.gather(-1, targets.reshape(-1, 1)).squeeze(-1)
    assert torch.allclose(scores.nll[scores.names.index("entropy_weighted")], expected.double(), atol=1e-6)


def test_chunk_size_does_not_change_the_result(bigram_stages, monkeypatch):
    model = random_stages(bigram_stages)
    ids = torch.randint(0, 7, (4, 33), generator=torch.Generator().manual_seed(2))
    rows = [(ids[:, :-1], ids[:, 1:])]
    whole = evaluate_bpb(model, rows, torch.ones(7, dtype=torch.long), entropy_tau=1.0)
    monkeypatch.setattr("stagewise.evaluation.bpb.CHUNK_VALUES", 16)
    chunked = evaluate_bpb(model, rows, torch.ones(7, dtype=torch.long), entropy_tau=1.0)
    assert flat(chunked) == pytest.approx(flat(whole))


def test_ignored_and_special_targets_count_for_nothing(two_stages):
    padded = (torch.tensor([[0, 1, 2, 3, 0, 0]]), torch.tensor([[1, 2, 3, 0, -1, -1]]))
    assert evaluate_bpb(two_stages, [padded], BYTES) == evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES)


def test_sums_over_batches_equal_one_batch_and_max_tokens_stops_early(two_stages):
    both = (ROW.repeat(2, 1), NEXT.repeat(2, 1))
    twice = evaluate_bpb(two_stages, [(ROW, NEXT)] * 2, BYTES)
    assert flat(twice) == pytest.approx(flat(evaluate_bpb(two_stages, [both], BYTES)))
    assert evaluate_bpb(two_stages, iter([(ROW, NEXT)] * 9), BYTES, max_tokens=4)["tokens"] == 6


def test_reduce_sums_over_ranks(two_stages):
    doubled = evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES, reduce=lambda sums: 2 * sums)
    assert doubled == {**evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES), "tokens": 6, "bytes": 12}


def test_a_rank_without_rows_still_takes_part_in_the_sum(two_stages):
    other = {}
    evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES, reduce=lambda sums: other.setdefault("sums", sums))
    alone = evaluate_bpb(two_stages, [], BYTES, reduce=lambda sums: sums + other["sums"])
    assert alone == evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES)


def test_the_training_flag_is_put_back(two_stages):
    evaluate_bpb(two_stages.train(), [(ROW, NEXT)], BYTES)
    assert two_stages.training


@pytest.mark.parametrize("rows", [[], [(torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))]])
def test_text_without_bytes_is_refused(two_stages, rows):
    with pytest.raises(ValueError, match="only special tokens"):
        evaluate_bpb(two_stages, rows, BYTES)


def test_nan_logits_are_named(two_stages):
    two_stages.tables[1, 2, 2] = float("nan")
    with pytest.raises(ValueError, match="stage_1 has NaN"):
        evaluate_bpb(two_stages, [(ROW, NEXT)], BYTES)


def test_a_foreign_vocabulary_is_refused(two_stages):
    with pytest.raises(ValueError, match="vocab_size is 4"):
        evaluate_bpb(two_stages, [(ROW, NEXT)], torch.ones(5, dtype=torch.long))


def test_margins_and_spreads_are_those_of_the_mean_of_log_probabilities(bigram_stages):
    model = random_stages(bigram_stages)
    ids = torch.randint(0, 7, (2, 9), generator=torch.Generator().manual_seed(3))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    scores = score_tokens(model, inputs, targets, torch.ones(7, dtype=torch.long), exits=True)
    logp = model.tables[:, inputs.reshape(-1)].log_softmax(-1)
    means = torch.stack([logp[: k + 1].mean(0) for k in range(3)])
    ordered = means.sort(-1, descending=True).values
    assert torch.allclose(scores.margin, (ordered[..., 0] - ordered[..., 1]).float(), atol=1e-6)
    change = means[1:] - means[:-1]
    assert torch.allclose(scores.spread, (change.amax(-1) - change.amin(-1)).float(), atol=1e-6)


def test_figures_of_a_real_model_are_those_of_its_own_forwards(tiny_model):
    model = tiny_model(dtype=torch.float64)
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1], ids[:, 1:]
    result = evaluate_bpb(model, [(inputs, targets)], torch.ones(96, dtype=torch.long))

    def bits(log_probabilities):
        return float(-log_probabilities.gather(-1, targets[..., None]).mean() / math.log(2))

    with torch.no_grad():
        assert result["product_bpb"] == pytest.approx(bits(model(inputs).logits))
        final = model(inputs, output_mode="final").logits.log_softmax(-1)
        assert result["final_path_bpb"] == pytest.approx(bits(final))
    for k in range(3):
        assert result["stage_bpb"][k] == pytest.approx(bits(model.forward_stage(inputs, k).log_softmax(-1)))
        assert result["prefix_bpb"][k] == pytest.approx(bits(model.forward_aggregated(inputs, k + 1)))


def test_a_specialist_is_measured_on_its_own_path_and_its_base_on_the_bases(tiny_model):
    base = tiny_model(seed=3)
    model = tiny_model(
        seed=3,
        num_hidden_layers=6,
        new_layers=1,
        frozen_layers=5,
        base_layers=5,
        dual_head=True,
        poe_stage_layers=[2, 1, 2],
    )
    missing = model.load_state_dict({k: v for k, v in base.state_dict().items() if "lambdas" not in k}, strict=False)
    assert not missing.unexpected_keys
    with torch.no_grad():
        model.resid_lambdas[:5], model.x0_lambdas[:5] = base.resid_lambdas, base.x0_lambdas
    ids = torch.randint(0, 96, (2, 40), generator=torch.Generator().manual_seed(0))
    rows = [(ids[:, :-1], ids[:, 1:])]
    ones = torch.ones(96, dtype=torch.long)
    result, of_base = evaluate_bpb(model, rows, ones), evaluate_bpb(base, rows, ones)
    assert result["default_output"] == "final_path"
    assert result["stage_bpb"] == of_base["stage_bpb"]
    with torch.no_grad():
        logp = model(ids[:, :-1]).logits.log_softmax(-1)
    expected = float(-logp.gather(-1, ids[:, 1:, None]).mean() / math.log(2))
    assert result["final_path_bpb"] == pytest.approx(expected, rel=1e-5)
    assert result["final_path_bpb"] != pytest.approx(of_base["final_path_bpb"], rel=1e-3)
