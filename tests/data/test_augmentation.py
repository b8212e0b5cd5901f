"""Case augmentation: how often, which way, and that no character is lost at the cuts."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.augmentation import CaseAugmentation
from stagewise.data.splitting import key_hash

KEYS = np.array([key_hash(str(i)) for i in range(20_000)], np.uint64)


def test_a_document_is_recased_with_the_given_probability_and_mostly_lowercased(tokenizer):
    cases = CaseAugmentation(0.15, 3, tokenizer).cases(KEYS, epoch=0)
    assert abs((cases > 0).mean() - 0.15) < 0.01
    assert abs((cases == 1).sum() / (cases > 0).sum() - 0.8) < 0.03


def test_the_choice_is_a_function_of_seed_epoch_and_document(tokenizer):
    augmentation = CaseAugmentation(0.3, 3, tokenizer)
    cases = augmentation.cases(KEYS, 1)
    order = np.random.default_rng(0).permutation(len(KEYS))
    assert np.array_equal(augmentation.cases(KEYS[order], 1), cases[order])
    assert (augmentation.cases(KEYS, 2) != cases).mean() > 0.2
    assert (CaseAugmentation(0.3, 4, tokenizer).cases(KEYS, 1) != cases).mean() > 0.2
    assert not CaseAugmentation(0.0, 3, tokenizer).cases(KEYS, 1).any()


@settings(max_examples=100, deadline=None)
@given(text=st.text("aBcÉé東🙂Ж ", min_size=1, max_size=40), piece=st.integers(1, 9), case=st.sampled_from([1, 2]))
def test_recased_pieces_join_to_the_recased_document(byte_tokenizer_class, text, piece, case):
    tokenizer = byte_tokenizer_class()
    document = np.array(tokenizer.encode_ordinary(text))
    augmentation = CaseAugmentation(1.0, 0, tokenizer)
    parts = [
        augmentation.recased_ids(document, start, min(start + piece, len(document)), case)
        for start in range(0, len(document), piece)
    ]
    joined = bytes(np.concatenate(parts).astype(np.uint8)).decode()
    assert joined == (text.lower() if case == 1 else text.upper())
