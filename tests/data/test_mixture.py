"""Orders and mixtures: nothing lost, nothing twice, shares met."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data import mixture
from stagewise.data.mixture import Mixture, PieceOrder
from stagewise.data.shards import Shard


def shard_of(lengths, start=0):
    return Shard.from_documents("s", [(start + i, n, np.arange(n)) for i, n in enumerate(lengths)], np.dtype("<u2"))


def order_of(shards, piece_tokens=5, seed=0):
    return PieceOrder("s", shards, [np.ones(len(s.documents), bool) for s in shards], piece_tokens, seed)


@pytest.mark.parametrize("block_documents", [1 << 22, 3])
def test_every_token_of_every_document_comes_once_an_epoch_in_an_order_that_changes(monkeypatch, block_documents):
    monkeypatch.setattr(mixture, "BLOCK_DOCUMENTS", block_documents)
    lengths = [[1, 4, 5, 6], [17, 2], [30, 1, 1]]
    order = order_of([shard_of(one) for one in lengths])
    count = sum(-(-n // 5) for one in lengths for n in one)
    epochs = [[order.next() for _ in range(count)] for _ in range(3)]
    places = [[(p.shard, p.document, p.start) for p in epoch] for epoch in epochs]
    assert places[0] != places[1] != places[2]
    for number, epoch in enumerate(epochs):
        assert {piece.epoch for piece in epoch} == {number}
        covered = Counter((p.shard, p.document, t) for p in epoch for t in range(p.start, p.stop))
        expected = Counter((s, d, t) for s, one in enumerate(lengths) for d, n in enumerate(one) for t in range(n))
        assert covered == expected


def test_masked_documents_never_come():
    shard = shard_of([3, 3, 3, 3])
    order = PieceOrder("s", [shard], [np.array([True, False, False, True])], 5, 0)
    assert {order.next().document for _ in range(20)} == {0, 3}
    with pytest.raises(ValueError, match="no documents"):
        PieceOrder("s", [shard], [np.zeros(4, bool)], 5, 0)


@pytest.mark.parametrize("block_documents", [1 << 22, 2])
@pytest.mark.parametrize("at", [0, 1, 9, 10, 11, 37])
def test_an_order_continues_exactly_from_its_saved_position(monkeypatch, block_documents, at):
    monkeypatch.setattr(mixture, "BLOCK_DOCUMENTS", block_documents)
    shards = [shard_of([3, 9]), shard_of([12, 4]), shard_of([1, 8])]  # 10 pieces
    order = order_of(shards)
    for _ in range(at):
        order.next()
    state = json.loads(json.dumps(order.state_dict()))
    other = order_of(shards)
    other.load_state_dict(state)
    assert [order.next() for _ in range(25)] == [other.next() for _ in range(25)]


@settings(max_examples=50, deadline=None)
@given(
    shares=st.lists(st.floats(0.01, 10.0), min_size=1, max_size=5),
    sizes=st.lists(st.integers(1, 64), min_size=5, max_size=5),
)
def test_achieved_shares_stay_within_one_piece_per_source_of_the_targets(shares, sizes):
    mix = Mixture(shares)
    total = 0
    for _ in range(400):
        source = mix.next()
        mix.add(source, sizes[source])
        total += sizes[source]
    for source, share in enumerate(mix.shares):
        assert abs(mix.placed[source] - share * total) <= sum(sizes)
