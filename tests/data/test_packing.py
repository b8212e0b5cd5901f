"""Packing: full rows, best fit, nothing lost unaccounted, exact continuation, any number of ranks."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stagewise.data.augmentation import CaseAugmentation
from stagewise.data.mixture import PieceOrder
from stagewise.data.packing import BatchStream, RowPacker, padded_rows
from stagewise.data.shards import Shard

BOS = 60_000
DOCUMENTS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def unique_source(name, lengths, sequence_length, seed=0, first=0):
    """A source whose every token id is different, so that each can be followed through the rows."""
    documents, at = [], first
    for number, length in enumerate(lengths):
        documents.append((number * 7919 + first, length, np.arange(at, at + length)))
        at += length
    shard = Shard.from_documents(name, documents, np.dtype("<u2"))
    return PieceOrder(name, [shard], [np.ones(len(lengths), bool)], sequence_length, seed)


def rows_from(packer, count):
    rows = np.empty((count, packer.sequence_length + 1), np.int64)
    for row in rows:
        packer.next_row(row)
    return rows


@settings(max_examples=60, deadline=None)
@given(lengths=DOCUMENTS, width=st.integers(2, 16), buffer=st.integers(1, 12), count=st.integers(1, 30))
def test_tokens_are_emitted_cropped_or_waiting_and_never_more_often_than_epochs_begun(lengths, width, buffer, count):
    packer = RowPacker([unique_source("a", lengths, width)], [1.0], width, BOS, buffer_pieces=buffer)
    rows = rows_from(packer, count)
    assert (rows[:, 0] == BOS).all()
    text = rows[rows != BOS]
    waiting = sum(entry[0] - 1 for entry in packer._buffer)
    assert len(text) == packer.emitted[0]
    assert packer.drawn == len(text) + packer.cropped[0] + waiting
    epochs_begun = packer.state_dict()["sources"]["a"]["epoch"] + 1
    assert max(Counter(text.tolist()).values()) <= epochs_begun
    inside = (rows[:, 1:] != BOS) & (rows[:, :-1] != BOS)  # within a piece tokens follow each other
    assert (rows[:, 1:][inside] == rows[:, :-1][inside] + 1).all()


@settings(max_examples=40, deadline=None)
@given(lengths=DOCUMENTS, width=st.integers(2, 16), buffer=st.integers(1, 12))
def test_rows_are_those_of_a_plain_best_fit_search(lengths, width, buffer):
    packer = RowPacker([unique_source("a", lengths, width)], [1.0], width, BOS, buffer_pieces=buffer)
    order = unique_source("a", lengths, width)
    waiting: list[np.ndarray] = []
    for _ in range(15):
        expected: list[int] = []
        while len(expected) < width + 1:
            while len(waiting) < buffer:
                waiting.append(order.ids(order.next()))
            space = width + 1 - len(expected)
            if space == 1:
                expected.append(BOS)
                break
            fitting = [n for n, ids in enumerate(waiting) if len(ids) + 1 <= space]
            if fitting:
                best = max(fitting, key=lambda n: (len(waiting[n]), -n))
            else:
                best = min(range(len(waiting)), key=lambda n: (len(waiting[n]), n))
            expected += [BOS, *waiting.pop(best).tolist()][:space]
        assert rows_from(packer, 1)[0].tolist() == expected


def test_a_wider_choice_crops_less():
    lengths = np.random.default_rng(0).integers(2, 60, 500).tolist()
    shares = []
    for buffer in (1, 16, 256):
        packer = RowPacker([unique_source("a", lengths, 64)], [1.0], 64, BOS, buffer_pieces=buffer)
        rows_from(packer, 300)
        shares.append(packer.cropped[0] / packer.drawn)
    assert shares[0] > shares[1] > shares[2] and shares[2] < 0.1


class Mixed:
    """Two sources with case augmentation."""

    def __init__(self, tokenizer, seed=5, width=16, buffer=9):
        texts = [[f"Hello World é{i} " * (1 + i % 4) for i in range(9)], [f"Ünder {i}東" for i in range(14)]]
        orders = []
        for name, source in zip("ab", texts, strict=True):
            triples = [
                (hash((name, i)) & 0xFFFF, len(t.encode()), np.array(tokenizer.encode_ordinary(t)))
                for i, t in enumerate(source)
            ]
            triples = [(i * 104729 + ord(name), size, ids) for i, (_, size, ids) in enumerate(triples)]
            shard = Shard.from_documents(name, triples, np.dtype("<u2"))
            orders.append(PieceOrder(name, [shard], [np.ones(len(source), bool)], width, seed))
        self.packer = RowPacker(
            orders, [0.7, 0.3], width, tokenizer.bos_token_id, CaseAugmentation(0.5, seed, tokenizer), buffer
        )


@settings(max_examples=25, deadline=None)
@given(before=st.integers(0, 40), after=st.integers(1, 12))
def test_a_saved_stream_continues_exactly(byte_tokenizer_class, before, after):
    tokenizer = byte_tokenizer_class()
    stream = BatchStream(Mixed(tokenizer).packer)
    stream.next_batch(before) if before else None
    state = json.loads(json.dumps(stream.state_dict()))
    other = BatchStream(Mixed(tokenizer).packer)
    other.load_state_dict(state)
    assert other.state_dict() == stream.state_dict()
    for one, two in zip(stream.next_batch(after), other.next_batch(after), strict=True):
        assert torch.equal(one, two)
    assert other.state_dict() == stream.state_dict()


def test_the_state_can_be_loaded_into_a_stream_that_is_already_under_way(tokenizer):
    stream, other = BatchStream(Mixed(tokenizer).packer), BatchStream(Mixed(tokenizer).packer)
    stream.next_batch(7)
    state = stream.state_dict()
    other.next_batch(19)
    other.load_state_dict(state)
    assert torch.equal(stream.next_batch(5)[0], other.next_batch(5)[0])


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_out_the_rows_of_one_process(tokenizer, world):
    alone = BatchStream(Mixed(tokenizer).packer).next_batch(12)[0]
    streams = [BatchStream(Mixed(tokenizer).packer, rank, world) for rank in range(world)]
    parts = [torch.cat([stream.next_batch(2)[0] for _ in range(6 // world)]) for stream in streams]
    assert torch.equal(torch.stack(parts, 1).flatten(0, 1), alone)
    assert all(stream.state_dict() == streams[0].state_dict() for stream in streams)


def test_another_number_of_ranks_continues_where_the_first_stopped(tokenizer):
    alone = BatchStream(Mixed(tokenizer).packer).next_batch(24)[0]
    two = BatchStream(Mixed(tokenizer).packer, 1, 2)
    two.next_batch(6)
    three = [BatchStream(Mixed(tokenizer).packer, rank, 3) for rank in range(3)]
    for stream in three:
        stream.load_state_dict(two.state_dict())
    rows = torch.stack([stream.next_batch(4)[0] for stream in three], 1).flatten(0, 1)
    assert torch.equal(rows, alone[12:])


def test_targets_are_the_inputs_shifted_by_one(tokenizer):
    inputs, targets = BatchStream(Mixed(tokenizer).packer).next_batch(6)
    assert inputs.shape == targets.shape == (6, 16) and inputs.dtype == torch.int64
    assert torch.equal(inputs[:, 1:], targets[:, :-1])


def test_a_position_in_other_data_is_refused_by_name(tokenizer):
    stream = BatchStream(Mixed(tokenizer).packer, fingerprint={"seed": 1, "sequence_length": 16})
    other = BatchStream(Mixed(tokenizer).packer, fingerprint={"seed": 2, "sequence_length": 16})
    with pytest.raises(ValueError, match="the data's seed was 1 and is now 2"):
        other.load_state_dict(stream.state_dict())


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30), extra=st.integers(0, 6))
def test_padded_rows_have_every_token_as_a_target_once(lengths, extra):
    width = max(2, max(lengths)) + extra
    pieces, at = [], 0
    for length in lengths:
        pieces.append(np.arange(at, at + length))
        at += length
    inputs, targets = padded_rows(pieces, width, BOS)
    assert inputs.shape == targets.shape == (len(inputs), width)
    scored = targets[targets >= 0]
    assert sorted(scored.tolist()) == list(range(at))
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    previous = inputs[targets >= 0]
    for target, before in zip(scored.tolist(), previous.tolist(), strict=True):
        assert before == (BOS if target in starts else target - 1)
