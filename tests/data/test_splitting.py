"""The split into training and validation documents."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.splitting import content_sum, document_sum, key_hash, validation_masks


def keys(count, prefix="d"):
    return np.array([key_hash(f"{prefix}{i}") for i in range(count)], np.uint64)


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 30), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    fraction=st.floats(0.001, 0.99),
)
def test_both_sides_have_a_document_whenever_there_are_two(counts, seed, fraction):
    masks = validation_masks([keys(count, f"{i}-") for i, count in enumerate(counts)], seed, fraction)
    assert [len(mask) for mask in masks] == counts
    held_out, total = sum(int(mask.sum()) for mask in masks), sum(counts)
    assert 1 <= held_out < total if total >= 2 else held_out == 0


def test_the_split_is_a_function_of_seed_and_key_not_of_order():
    every = keys(500)
    whole = validation_masks([every], 7, 0.1)[0]
    order = np.random.default_rng(0).permutation(500)
    parts = validation_masks([every[order[:200]], every[order[200:]]], 7, 0.1)
    assert np.array_equal(np.concatenate(parts), whole[order])
    assert not np.array_equal(whole, validation_masks([every], 8, 0.1)[0])
    assert 25 <= whole.sum() <= 80


def test_fraction_zero_holds_nothing_out_and_one_is_refused():
    assert not validation_masks([keys(10)], 0, 0.0)[0].any()
    with pytest.raises(ValueError, match="validation_fraction"):
        validation_masks([keys(10)], 0, 1.0)


def test_content_sums_do_not_depend_on_grouping_but_on_every_character():
    sums = [document_sum(f"k{i}", f"text {i}") for i in range(5)]
    forward, backward = 0, 0
    for one in sums:
        forward = content_sum(forward, one)
    for one in reversed(sums):
        backward = content_sum(one, backward)
    assert forward == backward
    assert document_sum("k", "text") != document_sum("k", "texT") != document_sum("kt", "exT")
