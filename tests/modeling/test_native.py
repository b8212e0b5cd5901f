"""Compiled kernels: torch's numbers, the same bits for a row whatever is computed with it, and life without them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stagewise.modeling import native
from stagewise.modeling.decoding import decode
from stagewise.modeling.frontier import FrontierCache
from stagewise.modeling.native import blocked, unblocked
from stagewise.modeling.packed import pack
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy
from stagewise.modeling.trunk import attention, rotate

DTYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}

K = native.kernels()
assert K is not None, "these tests need a C++ compiler (g++ or clang++); without one decoding uses torch's operations"


def draw(*shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(a, b):
    torch.testing.assert_close(a, b, atol=CLOSE[b.dtype], rtol=CLOSE[b.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [8, 33, 256])
def test_norm_equals_torch(dtype, size):
    x = draw(2, 3, size, dtype=dtype)
    close(K.norm(x, 1e-6), F.rms_norm(x, (size,), eps=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shared", [True, False])
def test_rotation_equals_torch_on_slices_of_a_product(dtype, shared):
    product = draw(2, 3, 6 * 16, dtype=dtype)
    x = product.view(2, 3, 6, 16)[:, :, :5]
    cos, sin = (draw(1 if shared else 2, 3, 1, 16, dtype=dtype, seed=s) for s in (1, 2))
    close(K.rotate_norm(x, cos, sin, 1e-6), F.rms_norm(rotate(x, cos, sin), (16,), eps=1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_value_embedding_equals_torch(dtype):
    x, gate, table = draw(2, 3, 32, dtype=dtype), draw(2, 12, dtype=dtype), draw(50, 2 * 16, dtype=dtype)
    v = draw(2, 3, 4 * 16, dtype=dtype, seed=5).view(2, 3, 4, 16)[:, :, 2:]
    ids = torch.tensor([[3, 49, 0], [7, 7, 12]])
    expected = v + (3.0 * torch.sigmoid(F.linear(x[..., :12], gate))).unsqueeze(-1) * table[ids].view(2, 3, 2, 16)
    close(K.gate_values(v, x, gate, 3.0, table, ids), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [4, 16, 1000])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_attention_stores_keys_and_sees_the_window(dtype, window, groups):
    rows, heads, length, d, capacity = 2, 4, 3, 24, 50
    q = draw(rows, length, heads, d, dtype=dtype, seed=1).transpose(1, 2)
    k, v = (draw(rows, length, groups, d, dtype=dtype, seed=s).transpose(1, 2) for s in (2, 3))
    keys, values = (draw(rows, groups, capacity, d, dtype=dtype, seed=s) for s in (4, 5))
    start = torch.tensor([0, 33])
    y = K.attend(q, k, v, keys, values, start, window, 0.3)
    for r, s in enumerate(start.tolist()):
        assert torch.equal(keys[r, :, s : s + length], k[r]) and torch.equal(values[r, :, s : s + length], v[r])
    at, slots = start[:, None] + torch.arange(length), torch.arange(capacity)
    mask = (slots <= at[..., None]) & (slots >= at[..., None] - window)
    close(y, attention(q, keys, values, 0.3, mask.unsqueeze(1), fp32=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 8), (100, 33), (1, 24), (256, 64), (96, 514)])
def test_small_products_equal_torch_and_rows_do_not_depend_on_each_other(dtype, shape):
    w, x = draw(*shape, dtype=dtype).mul(shape[1] ** -0.5), draw(60, shape[1], dtype=dtype, seed=1)
    store = blocked(w)
    assert torch.equal(unblocked(store, w.shape), w)
    alone = torch.cat([K.linear(x[i : i + 1], store, shape[0]) for i in range(60)])
    close(alone, F.linear(x, w))
    for rows in (2, 3, 5, 7, 12, 13, 20, 60):
        assert torch.equal(K.linear(x[:rows], store, shape[0]), alone[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan(dtype):
    x = draw(1, 32, dtype=dtype)
    x[0, 3] = float("nan")
    assert K.norm(x, 1e-6).isnan().all()
    assert K.linear(x, blocked(draw(64, 32, dtype=dtype)), 64).isnan().all()
    q = x.view(1, 1, 1, 32)
    assert K.attend(q, q, q, *torch.zeros(2, 1, 1, 8, 32, dtype=dtype), torch.tensor([2]), 8, 1.0).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_verified_together_have_the_bits_of_tokens_decoded_alone(tiny_model, dtype):
    model = pack(tiny_model(dtype=dtype))
    ids = torch.randint(0, 80, (40,), generator=torch.Generator().manual_seed(0)).tolist()

    def logits(widths):
        cache, out = FrontierCache(model, 1), []
        for n in widths:
            cache.extend([ids[len(cache.ids[0]) : len(cache.ids[0]) + n]])
            states = [cache.advance(k)[0].hidden for k in range(model.config.num_stages)]
            out.append(torch.stack([model.stage_logits(k, h) for k, h in enumerate(states)]))
        return torch.cat(out, dim=2)

    with torch.inference_mode():
        alone = logits([1] * 40)
        assert torch.equal(logits([5, 3, 9, 1, 2, 4, 16]), alone)
        assert torch.equal(logits([40]), alone)


@pytest.mark.parametrize("mode", ["full", "speculative", "wand", "prefix"])
@pytest.mark.parametrize("changes", [{}, {"window_pattern": "SL", "max_position_embeddings": 512}])
def test_a_packed_model_decodes_what_the_plain_one_decodes(tiny_model, mode, changes):
    model = tiny_model(seed=3, **changes)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 80, (n,), generator=generator).tolist() for n in (150, 7, 31)]
    strategy = Strategy(mode, verified=True, p99_bounds=(0.2, 0.2), max_stages=2)
    params = SamplingParams(max_new_tokens=24, stop_tokens=())
    plain = decode(model, prompts, strategy, params)
    packed = decode(pack(model), prompts, strategy, params)
    assert packed.tokens == plain.tokens and packed.stages_used == plain.stages_used


def test_without_a_compiler_decoding_goes_on(tiny_model, monkeypatch):
    model = tiny_model()
    params = SamplingParams(max_new_tokens=8, stop_tokens=())
    plain = decode(model, [[1, 2, 3]], "full", params)
    native.kernels.cache_clear()
    try:
        monkeypatch.setenv("STAGEWISE_NATIVE", "0")
        assert native.kernels() is None
        assert decode(pack(model), [[1, 2, 3]], "full", params).tokens == plain.tokens
    finally:
        native.kernels.cache_clear()


def test_a_broken_compiler_is_no_error(monkeypatch, tmp_path):
    native.kernels.cache_clear()
    try:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setenv("CXX", "false")
        assert native.kernels() is None
        assert not list(tmp_path.glob("**/*.so"))
    finally:
        native.kernels.cache_clear()
