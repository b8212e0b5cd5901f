from __future__ import annotations

import pytest
import torch

from stagewise.evaluation.rows import document_batches, manifest, take_documents, windows

BOS = 99


@pytest.mark.parametrize("length", [0, 1, 4, 5, 8, 11])
def test_every_token_is_a_target_once_after_its_own_predecessors(length):
    tokens = list(range(length))
    seen = []
    for inputs, targets in windows(tokens, BOS, 4):
        assert len(inputs) == len(targets) <= 4
        for i, target in enumerate(targets):
            if target != -1:
                seen.append(target)
                assert inputs[i] == (BOS if target == 0 else target - 1)
    assert seen == tokens


def test_the_last_window_of_a_long_document_has_a_full_context():
    *_, (inputs, targets) = windows(list(range(6)), BOS, 4)
    assert inputs == [1, 2, 3, 4]
    assert targets == [-1, -1, 4, 5]


def test_windows_are_those_of_lm_eval():
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    for length in (1, 3, 4, 7, 8, 13):
        theirs = map(make_disjoint_window, get_rolling_token_windows(list(range(length)), BOS, 4, 1))
        expected = [(list(context), list(predicted)) for context, predicted in theirs]
        ours = [
            (inputs + [targets[-1]], [target for target in targets if target != -1])
            for inputs, targets in windows(list(range(length)), BOS, 4)
        ]
        assert [(full[: -len(scored)], scored) for full, scored in ours] == expected


def test_batches_hold_each_row_once_and_stay_within_the_budget():
    documents = [list(range(n)) for n in (3, 17, 1, 9, 30, 2)]
    counted = torch.zeros(len(documents), dtype=torch.long)
    for batch in document_batches(documents, BOS, 8, batch_tokens=24):
        assert batch.inputs.numel() <= 24
        counted.index_add_(0, batch.documents, (batch.targets != -1).sum(1))
    assert counted.tolist() == [len(tokens) for tokens in documents]


def test_taking_documents_stops_after_the_one_that_reaches_the_count():
    texts, encoded = take_documents(iter(["ab", "", "cde", "f"]), lambda text: list(text.encode()), 4)
    assert texts == ["ab", "cde"]
    assert [len(ids) for ids in encoded] == [2, 3]


def test_a_manifest_changes_with_a_byte_and_with_a_boundary():
    one = manifest("x", ["ab", "c"])
    assert (one["documents"], one["bytes"]) == (2, 3)
    assert len({one["sha256"], manifest("x", ["a", "bc"])["sha256"], manifest("x", ["ab", "d"])["sha256"]}) == 3
