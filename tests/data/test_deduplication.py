"""Duplicate removal: what counts as a repetition."""

from __future__ import annotations

import random

import numpy as np

from stagewise.data.deduplication import duplicates, exact_signature, near_signature


def words(seed, count=200):
    generator = random.Random(seed)
    return [f"w{generator.randrange(5000)}" for _ in range(count)]


def found(texts, near):
    sign = near_signature if near else exact_signature
    return duplicates(np.stack([sign(text) for text in texts]), near).tolist()


def test_exact_removal_ignores_white_space_and_composition_and_keeps_the_first():
    texts = ["a  b\nc", "other", "a b c ", "caf\u00e9", "cafe\u0301", "A b c"]
    assert found(texts, near=False) == [False, False, True, False, True, False]


def test_near_removal_finds_a_few_changed_words_and_spares_different_texts():
    one, two = words(1), words(2)
    edited = [*one[:100], "changed", *one[101:]]
    half = [*one[:100], *words(3)[:100]]
    texts = [" ".join(text) for text in (one, two, edited, half, one)]
    assert found(texts, near=True) == [False, False, True, False, True]


def test_signatures_estimate_the_jaccard_similarity_of_word_runs():
    base = words(4, 400)
    for changed in (0, 100, 200, 400):
        other = [*words(5, 400)[:changed], *base[changed:]]
        runs = [{tuple(text[i : i + 5]) for i in range(396)} for text in (base, other)]
        exact = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
        estimate = np.mean(near_signature(" ".join(base)) == near_signature(" ".join(other)))
        assert abs(estimate - exact) < 0.15
