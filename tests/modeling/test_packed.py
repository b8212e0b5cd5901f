"""Packed weights: the same numbers, one copy in memory, and nothing lost on the way back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from stagewise.modeling import packed as packing
from stagewise.modeling.packed import PackedLinear, PackedWeight, linear_together, pack, unpack, unpacked

ROWS = (1, 2, 3, 4, 5, 8, 9, 17, 64)
SHAPES = ((96, 32), (320, 64), (1536, 512), (512, 1536), (12, 12), (1, 24))


@pytest.fixture(params=["native", "onednn"], autouse=True)
def product(request, monkeypatch):
    """Everything holds with the compiled product and, as where there is no compiler, with oneDNN's."""
    if request.param == "onednn":
        monkeypatch.setattr(packing, "kernels", lambda: None)


def weight(shape, dtype, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(shape[1] ** -0.5).to(dtype)


def inputs(rows, size, dtype, seed=1):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_product_equals_the_plain_one(shape, dtype):
    w, tolerance = weight(shape, dtype), {torch.bfloat16: 2e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    p = PackedWeight(w)
    for rows in ROWS:
        x = inputs(rows, shape[1], dtype)
        torch.testing.assert_close(p(x), F.linear(x, w), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_output_row_does_not_depend_on_the_rows_computed_with_it(shape, dtype):
    p, x = PackedWeight(weight(shape, dtype)), inputs(max(ROWS), shape[1], dtype)
    alone = torch.cat([p(x[i : i + 1]) for i in range(len(x))])
    for rows in ROWS:
        assert torch.equal(p(x[:rows]), alone[:rows]), f"{rows} rows of {shape}"


@pytest.mark.parametrize("lead", [(1, 1), (1, 3), (2, 1), (3, 5)])
def test_leading_dimensions_and_strided_inputs_are_kept(lead):
    w = weight((1536, 512), torch.float32)
    x = inputs(lead[0] * lead[1], 1024, torch.float32).view(*lead, 1024)[..., :512]
    y = PackedWeight(w)(x)
    assert y.shape == (*lead, 1536)
    torch.testing.assert_close(y, F.linear(x, w), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_dense_matrix_comes_back_bit_for_bit(dtype):
    for shape in SHAPES:
        w = weight(shape, dtype)
        assert torch.equal(PackedWeight(w).dense(), w)


def test_layers_packed_together_give_what_each_gives_alone(tiny_model):
    model = tiny_model()
    attn = model.transformer["h"][1].attn
    x = inputs(5, 32, torch.float32)
    before = [layer(x) for layer in (attn.c_q, attn.c_k, attn.c_v)]
    pack(model)
    assert attn.c_q.packed is attn.c_k.packed is attn.c_v.packed
    together = linear_together(x, attn.c_q, attn.c_k, attn.c_v)
    torch.testing.assert_close(together, torch.cat(before, dim=-1), atol=1e-5, rtol=1e-5)
    assert torch.equal(together, torch.cat((attn.c_q(x), attn.c_k(x), attn.c_v(x)), dim=-1))


@pytest.mark.parametrize("changes", [{}, {"per_stage_head": False}, {"num_hidden_layers": 6, "new_layers": 1}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_unpacking_restores_the_same_parameters_and_state_dict(tiny_model, changes, dtype):
    model = tiny_model(dtype=dtype, **changes)
    parameters = dict(model.named_parameters())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for state in (pack(model).state_dict(), unpack(model).state_dict()):
        assert list(state) == list(before)
        assert all(torch.equal(state[k], before[k]) for k in before)
    assert all(model.get_parameter(name) is p and p.requires_grad for name, p in parameters.items())
    assert not any(isinstance(m, PackedLinear) for m in model.modules())


@pytest.mark.parametrize("changes", [{}, {"per_stage_head": False}, {"num_hidden_layers": 6, "new_layers": 1}])
def test_a_packed_model_predicts_what_the_plain_one_predicts(tiny_model, changes):
    model = tiny_model(**changes)
    ids = torch.randint(0, 80, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain = model(ids).logits
        folded = pack(model)(ids).logits
        unfolded = pack(unpack(model), fold=False)(ids).logits
    torch.testing.assert_close(unfolded, plain, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(folded, plain, atol=1e-4, rtol=1e-4)


def test_a_packed_model_keeps_one_copy_of_its_layers(tiny_model):
    model = pack(tiny_model())
    layers = {id(m.packed): m.packed for m in model.modules() if isinstance(m, PackedLinear)}
    assert all(m.weight.numel() == 0 for m in model.modules() if isinstance(m, PackedLinear))
    held = sum(p.nbytes() for p in layers.values()) + sum(p.nbytes for p in model.parameters())
    assert held == sum(p.nbytes for p in unpack(model).parameters())


def test_heads_are_folded_where_heads_are_added_and_nowhere_else(tiny_model):
    assert set(pack(tiny_model()).folded_heads) == {("stage", 0), ("stage", 1), ("stage", 2)}
    assert not pack(tiny_model(per_stage_head=False)).folded_heads
    specialist = tiny_model(per_stage_head=False, num_hidden_layers=6, new_layers=1)
    assert set(pack(specialist).folded_heads) == {("path", "specialist", "dual")}
    assert not pack(tiny_model(), fold=False).folded_heads


def test_training_mode_dtype_changes_and_gradients_unpack(tiny_model):
    model = pack(tiny_model())
    assert not model.train().is_packed
    assert not pack(model.eval()).to(torch.float64).is_packed
    ids = torch.arange(6)[None]
    model = pack(model.float())
    model(ids, labels=ids).loss.backward()
    assert not model.is_packed
    assert all(block.mlp.c_fc.weight.grad.abs().sum() > 0 for block in model.transformer["h"])


def test_a_packed_layer_refuses_gradients_and_new_weights(tiny_model):
    model = pack(tiny_model())
    layer = model.transformer["h"][0].mlp.c_fc
    with pytest.raises(RuntimeError, match="unpack"):
        layer(inputs(1, 32, torch.float32).requires_grad_())
    with pytest.raises(RuntimeError, match="unpack"):
        model.load_state_dict(model.state_dict())


def test_unpacked_packs_again_as_it_was(tiny_model):
    model = tiny_model()
    with unpacked(model):
        pass
    assert not model.is_packed
    for fold in (True, False):
        pack(model, fold=fold)
        with unpacked(model):
            assert not model.is_packed and not model.folded_heads
        assert model.is_packed and bool(model.folded_heads) == fold
        unpack(model)


def test_a_saved_packed_model_loads_as_the_plain_one(tiny_model, tmp_path):
    model = tiny_model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pack(model).save_pretrained(tmp_path)
    assert model.is_packed
    after = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_copy_of_a_packed_model_is_independent(tiny_model):
    model = pack(tiny_model())
    ids = torch.arange(7)[None]
    with torch.no_grad():
        expected = model(ids).logits
        twin = copy.deepcopy(model)
        unpack(model).lm_head.weight.zero_()
        assert torch.equal(twin(ids).logits, expected)


def test_without_the_private_operators_the_plain_product_is_used(monkeypatch, tiny_model):
    model = tiny_model()
    ids = torch.arange(7)[None]
    with torch.no_grad():
        plain = model(ids).logits
        monkeypatch.setattr(packing, "packing_supported", lambda dtype, device: False)
        torch.testing.assert_close(pack(model)(ids).logits, plain, atol=1e-5, rtol=1e-5)
    assert model.transformer["h"][0].mlp.c_fc.packed.layout == "plain"


def test_layers_with_a_bias_and_those_named_stay_plain():
    layers = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(12, 4, bias=False))
    layers.stays_plain = ("2",)
    pack(layers)
    assert [type(layer) for layer in layers] == [nn.Linear, PackedLinear, nn.Linear]
