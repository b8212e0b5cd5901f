"""Stages on two ranks train the model one process trains."""

from __future__ import annotations

import copy

import pytest
import torch

from stagewise.training.distributed import close_ranks, open_ranks
from stagewise.training.objectives import Objective
from stagewise.training.optimizer import MuonAdamW, parameter_groups
from stagewise.training.stage_parallel import StageParallel, divide_stages


def batches(config):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, config.vocab_size, (3, 2, 2, 17), generator=generator)  # steps, micro-batches, rows, T + 1
    return [[(micro[:, :-1], micro[:, 1:]) for micro in step] for step in ids]


def options():
    return {"orthogonalise_dtype": torch.float32}


def train_alone(model, objective):
    optimizer = MuonAdamW(parameter_groups(model.named_parameters(), model.config.hidden_size), **options())
    losses = []
    for step in batches(model.config):
        parts = [objective.forward_backward(model, *micro, normaliser=64.0) for micro in step]
        losses.append(sum(part.total.item() for part in parts))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def train_divided(model, objective, expected_losses, expected):
    ranks = open_ranks("cpu")
    parallel = StageParallel(model, objective, ranks)
    held = sum(p.numel() for p in model.parameters() if not p.is_meta)
    assert held < 0.9 * sum(p.numel() for p in expected.values())
    optimizer = MuonAdamW(parameter_groups(parallel.parameters(), model.config.hidden_size), **options())
    for step, loss in zip(batches(model.config), expected_losses, strict=True):
        parts = [parallel.forward_backward(model, *micro, normaliser=64.0) for micro in step]
        total = ranks.sum(torch.stack([part.total for part in parts]).sum())
        torch.testing.assert_close(total.item(), loss, rtol=1e-5, atol=1e-5)
        parallel.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
    for name, tensor in parallel.gather().items():
        torch.testing.assert_close(
            tensor, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )
    close_ranks()


@pytest.mark.parametrize("mode", ["flat", "residual_logop"])
def test_two_ranks_with_their_own_stages_train_the_same_model(tiny_model, as_two_ranks, mode):
    model = tiny_model(dtype=torch.float64, poe_mode=mode)
    alone = copy.deepcopy(model)
    objective = Objective.from_config(model.config)
    losses = train_alone(alone, objective)
    as_two_ranks(train_divided, model, objective, losses, dict(alone.named_parameters()))


def test_stages_are_divided_by_layers(tiny_config):
    config = tiny_config(num_hidden_layers=12, poe_stage_layers=[6, 2, 2, 2])
    assert divide_stages(config, 2) == [range(0, 1), range(1, 4)]
    assert divide_stages(config, 4) == [range(k, k + 1) for k in range(4)]
    with pytest.raises(ValueError, match="4 stages cannot be divided among 5 ranks"):
        divide_stages(config, 5)


def test_objectives_that_are_not_detached_are_refused(tiny_model):
    with pytest.raises(ValueError, match="poe_mode='hier'"):
        StageParallel(tiny_model(poe_mode="hier"), Objective("hier"), open_ranks("cpu"))
