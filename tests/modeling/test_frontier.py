"""The frontier cache equals a fresh prefill after any sequence of operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagewise.modeling.frontier import BLOCK, FrontierCache

STAGES = 3


def fresh_states(model, ids):
    with torch.no_grad():
        return model.run_path(model.stage_inputs(torch.tensor([ids])))[0]


def check_output(model, cache, stage, output, starts, counts):
    for r, (start, count) in enumerate(zip(starts, counts, strict=True)):
        if count:
            expected = fresh_states(model, cache.ids[r][: start + count])[stage][0, start:]
            torch.testing.assert_close(output.hidden[r, :count], expected, atol=1e-9, rtol=0)


operations = st.lists(
    st.one_of(
        st.tuples(st.just("extend"), st.lists(st.integers(0, 9), min_size=4, max_size=4)),
        st.tuples(st.just("advance"), st.integers(0, STAGES - 1), st.booleans()),
        st.tuples(st.just("rollback"), st.lists(st.integers(0, 4), min_size=4, max_size=4)),
        st.tuples(st.just("commit"), st.integers(0, 3)),
        st.tuples(st.just("reset"), st.integers(0, 3)),
        st.tuples(st.just("select"), st.permutations(range(4))),
        st.tuples(st.just("long"), st.integers(0, 3)),
    ),
    max_size=25,
)


@pytest.fixture(scope="module")
def model(tiny_model):
    small = tiny_model(dtype=torch.float64, scale=0.6, max_position_embeddings=1024)
    small.config.layer_windows = [12, 1024, 12, 12, 1024]  # windows short enough to matter here
    return small


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=operations, retain=st.booleans())
def test_any_sequence_of_operations_equals_a_fresh_prefill(model, plan, retain):
    cache = FrontierCache(model, 4, retain_all=retain)
    generator = torch.Generator().manual_seed(len(plan))

    def tokens(n):
        return torch.randint(0, 87, (n,), generator=generator).tolist()

    with torch.no_grad():
        for step in plan:
            if step[0] == "extend":
                cache.extend([tokens(n) for n in step[1]])
            elif step[0] == "long":  # far beyond the windows and a storage block
                cache.extend([tokens(BLOCK // 2 if r == step[1] else 1) for r in range(4)])
            elif step[0] == "advance":
                stops = [n - 1 for n in cache.lengths()] if step[2] else None
                output, starts, counts = cache.advance(step[1], stops)
                if output is not None:
                    check_output(model, cache, step[1], output, starts, counts)
            elif step[0] == "rollback":
                floor = [0] * 4 if retain else cache.committed
                cache.rollback([max(f, n - d) for f, n, d in zip(floor, cache.lengths(), step[1], strict=True)])
            elif step[0] == "commit":
                cache.commit([n - step[1] for n in cache.lengths()])
            elif step[0] == "reset":
                cache.reset_row(step[1])
            elif step[0] == "select":
                cache.select(step[1])
            frontiers = [cache.frontier(k) for k in range(STAGES)]
            for r in range(4):
                assert [len(cache.ids[r]), *(f[r] for f in frontiers)] == sorted(
                    [len(cache.ids[r]), *(f[r] for f in frontiers)], reverse=True
                )
        cache.extend([tokens(2) for _ in range(4)])
        for stage in range(STAGES):
            check_output(model, cache, stage, *cache.advance(stage))


def test_fork_gives_independent_copies_of_every_row(model):
    cache = FrontierCache(model, 2)
    cache.extend([[87, 1, 2, 3], [87, 9]])
    with torch.no_grad():
        cache.advance(0)
        cache.advance(1, [2, 1])
        cache.fork(3)
        cache.extend([[r] for r in range(6)])
        for stage in range(STAGES):
            check_output(model, cache, stage, *cache.advance(stage))
    assert cache.ids[1] == [87, 1, 2, 3, 1] and cache.ids[5] == [87, 9, 5]


def test_a_token_that_left_early_is_completed_later_and_only_once(model):
    cache = FrontierCache(model, 1)
    cache.extend([[87, 4, 5]])
    ran = []
    original = model.run_stage

    def counting(stage, hidden, inputs, cache=None):
        ran.append((stage, hidden.size(1)))
        return original(stage, hidden, inputs, cache)

    model.run_stage = counting
    try:
        with torch.no_grad():
            for token in (6, 7, 8):
                cache.advance(0)
                cache.extend([[token]])
            cache.advance(0)
            cache.advance(1)
            cache.advance(2)
    finally:
        del model.run_stage
    assert ran == [(0, 3), (0, 1), (0, 1), (0, 1), (1, 6), (2, 6)]
    assert cache.advance(1)[0] is None


def test_short_window_layers_forget_and_memory_stays_bounded(model):
    long_run, sizes = FrontierCache(model, 1), []
    with torch.no_grad():
        for _ in range(900):
            long_run.extend([[3]])
            for stage in range(STAGES):
                long_run.advance(stage)
            long_run.commit(long_run.lengths())
            windowed = long_run.nodes["base"][0].groups[0]
            sizes.append(windowed.capacity)
    assert max(sizes) == BLOCK
    with pytest.raises(ValueError, match="cannot roll back to 5.*retain_all=True"):
        long_run.rollback([5])


def test_memory_of_a_long_prefill_is_given_back(model):
    cache = FrontierCache(model, 1)
    cache.extend([[3] * 1000])
    with torch.no_grad():
        cache.advance(0)
        before = cache.bytes()
        cache.commit([1000])
        assert cache.bytes() < before
        cache.extend([[4, 5]])
        check_output(model, cache, 0, *cache.advance(0))


def test_bytes_counts_every_allocated_tensor(model):
    cache = FrontierCache(model, 2)
    cache.extend([[1, 2, 3], [4]])
    with torch.no_grad():
        cache.advance(0)
    heads, dim = model.config.num_key_value_heads, model.config.head_dim
    keys_and_values = 2 * 2 * heads * BLOCK * dim * 2 * 8  # layers 0 and 1; rows; fp64
    pending = 2 * 3 * model.config.hidden_size * 8
    assert cache.bytes() == keys_and_values + pending


def test_the_context_limit_is_an_error_that_changes_nothing(model):
    cache = FrontierCache(model, 2)
    cache.extend([[1], [2]])
    with pytest.raises(ValueError, match="row 1: .* exceed the context of 1024"):
        cache.extend([[3], [4] * 1024])
    assert cache.ids == [[1], [2]]
