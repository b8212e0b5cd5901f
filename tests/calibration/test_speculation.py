from __future__ import annotations

import numpy as np
import pytest
import torch

from stagewise.calibration.exits import exit_statistics
from stagewise.calibration.speculation import acceptance_table, expected_round, speculate


def test_rounds_are_counted_as_greedy_speculation_runs_them():
    agree = np.array([True, True, False, True, True, True, True])
    # length 2: two accepted and position 2 from the target, two accepted and position 5, then the target alone
    assert speculate(agree, 2) == (4, 4, 3)
    # length 3: a miss at position 2 is corrected there, then three accepted and a bonus
    assert speculate(agree, 3) == (5, 6, 2)
    assert speculate(np.array([False, False]), 3) == (0, 1, 2)


def test_counts_equal_a_simulation_of_drafting_and_verifying(random_stages):
    model = random_stages(stages=2, vocab=9, seed=3)
    full = model.tables.log_softmax(-1).mean(0).argmax(-1)  # next token of the product
    draft = model.tables[0].argmax(-1)
    text = [0]
    for _ in range(40):
        text.append(int(full[text[-1]]))
    ids = torch.tensor([text])
    statistics = exit_statistics(model, [(ids[:, :-1], ids[:, 1:], torch.zeros(1, dtype=torch.long))])
    assert torch.equal(statistics.prefix_top1[-1], ids[0, 1:])  # the text is the product's own
    table = acceptance_table(statistics, [0.5, 1.0], lengths=(1, 3, 4))
    for row in table["rows"]:
        committed, accepted, drafted = [0], 0, 0
        while len(committed) < len(text):
            proposal = [committed[-1]]
            for _ in range(min(row["k_draft"], len(text) - len(committed) - 1)):
                proposal.append(int(draft[proposal[-1]]))
            drafted += len(proposal) - 1
            for token in proposal[1:]:
                if token != int(full[committed[-1]]):
                    break
                committed.append(token)
                accepted += 1
            if len(committed) < len(text):
                committed.append(int(full[committed[-1]]))
        assert committed == text
        assert (row["accepted"], row["drafted"]) == (accepted, drafted)


def test_a_drafter_that_always_agrees_is_always_accepted(statistics_of):
    statistics = statistics_of(np.zeros((2, 12)), np.ones((2, 12), int), groups=[0] * 5 + [1] * 7)
    table = acceptance_table(statistics, [0.5, 1.0], lengths=(4,))
    row = table["rows"][0]
    assert row["acceptance"] == 1.0 and table["token_agreement"] == [1.0, 1.0] and table["texts"] == 2
    assert row["tokens_per_round"] == 12 / 3  # 5 tokens in one round, 5 + 2 in two
    assert row["bandwidth_speedup"] == pytest.approx(4 / 3)


def test_texts_do_not_lend_each_other_drafts(statistics_of):
    agree = np.array([[1, 1, 1, 1], [1, 1, 1, 1]])
    one = acceptance_table(statistics_of(np.zeros((2, 4)), agree), [0.5, 1], lengths=(3,))
    four = acceptance_table(statistics_of(np.zeros((2, 4)), agree, groups=[0, 1, 2, 3]), [0.5, 1], lengths=(3,))
    assert one["rows"][0]["drafted"] == 3 and four["rows"][0]["drafted"] == 0
    assert four["rows"][0]["acceptance"] == 0.0


def test_the_best_length_is_the_one_with_the_largest_speedup(statistics_of):
    generator = np.random.default_rng(0)
    full = np.zeros(4000, int)
    stage = (generator.random(4000) > 0.8).astype(int)
    statistics = statistics_of(np.zeros((2, 4000)), [full, full], stage_top1=[stage, full])
    table = acceptance_table(statistics, [0.3, 1.0])
    assert table["best"]["bandwidth_speedup"] == max(row["bandwidth_speedup"] for row in table["rows"])
    for row in table["rows"]:
        assert row["tokens_per_round"] == pytest.approx(expected_round(0.8, row["k_draft"]), rel=0.05)


def test_an_expected_round_is_the_geometric_sum():
    assert expected_round(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_round(1.0, 3) == 4.0


def test_a_draft_of_no_tokens_is_refused(statistics_of):
    with pytest.raises(ValueError, match="draft length"):
        acceptance_table(statistics_of([[1.0], [1.0]], [[0], [0]]), [0.5, 1.0], lengths=(0,))
