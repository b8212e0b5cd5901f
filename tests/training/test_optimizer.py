"""MuonAdamW: its pieces against plain formulas and torch's own Muon, its grouping, its state."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from stagewise.training.optimizer import (
    MuonAdamW,
    Rates,
    equilibrate_rows,
    orthogonalise,
    parameter_groups,
    reduce_variance,
)
from stagewise.training.schedule import Schedule


def named_tensors():
    shapes = {
        "transformer.wte.weight": (64, 16),
        "transformer.h.0.attn.c_q.weight": (16, 16),
        "transformer.h.1.attn.c_q.weight": (16, 16),
        "transformer.h.1.attn.ve_gate.weight": (2, 12),
        "transformer.h.1.mlp.c_fc.weight": (64, 16),
        "value_embeds.1.weight": (64, 8),
        "lm_head.weight": (64, 16),
        "lm_head_stages.0.weight": (64, 16),
        "resid_lambdas": (2,),
        "x0_lambdas": (2,),
        "smear_gate.weight": (1, 24),
        "backout_lambda": (1,),
    }
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def give_gradients(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 24, 8), (2, 8, 24), (1, 16, 16)])
def test_orthogonalise_gives_singular_values_near_one_and_keeps_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalise(matrix, dtype=torch.float32)
    values = torch.linalg.svdvals(result)
    assert 0.7 < values.min() and values.max() < 1.2
    core = u.mT @ result @ vh.mT
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    assert 0.7 < diagonal.min() and diagonal.max() < 1.2
    torch.testing.assert_close(core, torch.diag_embed(diagonal), atol=1e-4, rtol=0)


def test_orthogonalise_agrees_with_the_direction_of_torch_muon():
    """torch.optim.Muon uses other coefficients; both approximate U V', so their directions agree."""
    weight = nn.Parameter(torch.zeros(24, 16))
    weight.grad = torch.randn(24, 16, generator=torch.Generator().manual_seed(2))
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    ours = orthogonalise(weight.grad, dtype=torch.float32)
    assert torch.cosine_similarity(-weight.detach().flatten(), ours.flatten(), dim=0) > 0.95


def test_renormalised_update_has_the_norm_of_a_semi_orthogonal_matrix():
    update = orthogonalise(torch.randn(2, 6, 20), dtype=torch.float32, renormalise=True)
    torch.testing.assert_close(update.norm(dim=(-2, -1)), torch.full((2,), math.sqrt(6)))


def test_equilibrated_rows_share_one_norm_and_keep_the_total():
    matrix = torch.randn(2, 5, 9) * torch.arange(1.0, 6.0)[:, None]
    even = equilibrate_rows(matrix)
    torch.testing.assert_close(even.norm(dim=(-2, -1)), matrix.norm(dim=(-2, -1)))
    torch.testing.assert_close(even.norm(dim=-1).std(dim=-1), torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("shape", "state"), [((2, 9, 5), (2, 9, 1)), ((2, 5, 9), (2, 1, 9)), ((1, 4, 4), (1, 4, 1))])
def test_variance_reduction_keeps_the_norm_of_each_matrix(shape, state):
    update = torch.randn(shape)
    reduced = reduce_variance(update, torch.rand(state), 0.9)
    torch.testing.assert_close(reduced.norm(dim=(-2, -1)), update.norm(dim=(-2, -1)))


def test_groups_follow_from_names_with_width_scaled_rates():
    groups = parameter_groups(named_tensors().items(), hidden_size=16, rates=Rates(matrix_lr=0.01))
    rates = {name: (g["kind"], g["lr"], g["weight_decay"]) for g in groups for name in g["names"]}
    width = math.sqrt(768 / 16)
    assert rates["lm_head.weight"] == rates["lm_head_stages.0.weight"] == ("adamw", 0.008 * width, 0.01)
    assert rates["transformer.wte.weight"] == ("adamw", 0.3 * width, 0.001)
    assert rates["value_embeds.1.weight"] == ("adamw", 0.3 * width / 2, 0.01)
    assert rates["resid_lambdas"] == ("adamw", 0.005, 0.05)
    assert rates["x0_lambdas"] == ("adamw", 0.5, 0.0)
    assert rates["smear_gate.weight"] == rates["backout_lambda"] == ("adamw", 0.2, 0.0)
    assert rates["transformer.h.1.attn.ve_gate.weight"] == ("muon", 0.01, 0.28)
    assert len(rates) == len(named_tensors())


def test_a_name_outside_the_scheme_is_refused():
    with pytest.raises(ValueError, match=r"transformer\.norm\.scale"):
        parameter_groups([("transformer.norm.scale", nn.Parameter(torch.zeros(2)))], 16)


def test_state_dict_round_trip_continues_bit_identically():
    def run(steps, tensors, optimizer, first=0):
        for step in range(first, first + steps):
            give_gradients(tensors.values(), step)
            optimizer.step()

    def build(tensors):
        return MuonAdamW(parameter_groups(tensors.items(), 16))

    straight = named_tensors()
    straight_optimizer = build(straight)
    run(3, straight, straight_optimizer)
    resumed = {name: nn.Parameter(p.detach().clone()) for name, p in straight.items()}
    saved = copy.deepcopy(straight_optimizer.state_dict())
    run(3, straight, straight_optimizer, 3)
    optimizer = build(resumed)
    optimizer.load_state_dict(saved)
    run(3, resumed, optimizer, 3)
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_tensors_without_gradient_do_not_move():
    tensors = named_tensors()
    before = {name: p.detach().clone() for name, p in tensors.items()}
    optimizer = MuonAdamW(parameter_groups(tensors.items(), 16))
    give_gradients(tensors.values(), 0)
    untouched = ["backout_lambda", "transformer.h.0.attn.c_q.weight", "transformer.h.1.attn.ve_gate.weight"]
    for name in untouched:
        tensors[name].grad = None
    optimizer.step()
    assert [n for n in tensors if torch.equal(tensors[n], before[n])] == sorted(untouched, key=list(tensors).index)


def test_weight_decay_acts_only_where_the_step_shrinks_the_weight():
    weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(4)))
    other = nn.Parameter(weight.detach().clone())
    start = weight.detach().clone()
    for parameter, decay in ((weight, 0.5), (other, 0.0)):
        parameter.grad = torch.randn(8, 8, generator=torch.Generator().manual_seed(5))
        MuonAdamW([{"kind": "muon", "params": [parameter], "lr": 0.1, "weight_decay": decay}]).step()
    step = start - other.detach()  # lr * g
    expected = torch.where(step * start >= 0, 0.1 * 0.5 * start, 0.0)
    torch.testing.assert_close(other.detach() - weight.detach(), expected, atol=1e-6, rtol=1e-5)


def test_schedule_warms_up_holds_and_winds_down():
    schedule = Schedule(steps=1000, warmup_steps=10, warmdown_ratio=0.5, final_lr_frac=0.05)
    factors = [schedule.lr_factor(step) for step in range(1000)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert set(factors[10:500]) == {1.0}
    assert factors[750] == pytest.approx(0.525) and factors[999] == pytest.approx(0.05, abs=2e-3)
    assert schedule.momentum(0) == 0.85 and schedule.momentum(450) == pytest.approx(0.97)
    assert schedule.momentum(1000) == pytest.approx(0.90)
    assert schedule.weight_decay_factor(0) == 1 and schedule.weight_decay_factor(1000) == pytest.approx(0)


def test_schedule_sets_every_group():
    tensors = named_tensors()
    optimizer = MuonAdamW(parameter_groups(tensors.items(), 16))
    schedule = Schedule(steps=100, warmup_steps=10)
    assert schedule.apply(optimizer, 4) == 0.5
    for group in optimizer.param_groups:
        assert group["lr"] == group["initial_lr"] / 2
    muon = next(g for g in optimizer.param_groups if g["kind"] == "muon")
    assert muon["momentum"] == schedule.momentum(4) and muon["weight_decay"] < muon["initial_weight_decay"]
