"""FLOPs against torch's counter, activations against what autograd saves, dry runs of every shipped recipe."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stagewise.recipe import load_recipe, recipe_names
from stagewise.training.cost import activation_bytes, dry_run, mean_keys, training_flops, training_memory
from stagewise.training.objectives import Objective

ROWS, LENGTH = 2, 96


def run(model):
    ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    Objective.from_config(model.config, chunk_tokens=32).forward_backward(model, ids[:, :-1], ids[:, 1:])


@pytest.mark.parametrize("mode", ["none", "flat", "hier", "residual_logop"])
def test_flops_equal_torchs_count_of_matrix_products(tiny_model, mode):
    """Torch counts neither CPU attention nor the in-place accumulation of the heads' weight gradient."""
    model = tiny_model(poe_mode=mode, per_stage_head=False)
    config = model.config
    with FlopCounterMode(display=False) as counter:
        run(model)
    heads = 1 if mode == "none" else config.num_stages
    uncounted = heads * 2 * config.vocab_size * config.hidden_size
    queries = config.num_attention_heads * config.head_dim
    uncounted += 12 * queries * sum(mean_keys(LENGTH, window) for window in config.layer_windows)
    counted = counter.get_total_flops() / (ROWS * LENGTH)
    assert training_flops(config, LENGTH).total == pytest.approx(counted + uncounted, rel=2e-3)


@pytest.mark.parametrize(("length", "window"), [(8, 3), (8, 7), (8, 100), (1, 5)])
def test_mean_keys_counts_what_windows_show(length, window):
    expected = sum(min(i, window) + 1 for i in range(length)) / length
    assert mean_keys(length, window) == pytest.approx(expected)


@pytest.mark.parametrize("mode", ["none", "flat", "residual_logop"])
def test_activation_estimate_is_near_what_autograd_saves(tiny_model, mode):
    model = tiny_model(poe_mode=mode, num_hidden_layers=8, poe_stage_layers=[2, 2, 2, 2], hidden_size=64, head_dim=16)
    alive, peak, held = 0, 0, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    class Held:
        def __init__(self, tensor):
            nonlocal alive, peak
            self.tensor, self.key = tensor, tensor.untyped_storage().data_ptr()
            count, size = held.get(self.key, (0, tensor.untyped_storage().nbytes()))
            alive += 0 if count else size
            peak = max(peak, alive)
            held[self.key] = (count + 1, size)

        def __del__(self):
            nonlocal alive
            count, size = held[self.key]
            held[self.key] = (count - 1, size)
            alive -= size if count == 1 else 0

    def pack(tensor):
        return tensor if tensor.untyped_storage().data_ptr() in weights else Held(tensor)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda held: held.tensor if isinstance(held, Held) else held):
        run(model)
    assert activation_bytes(model.config, ROWS, LENGTH, 4) == pytest.approx(peak, rel=0.35)


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).specialist is None])
def test_every_base_recipe_dry_runs_on_the_meta_device(name):
    report = dry_run(load_recipe(name), world=8)
    recipe = load_recipe(name)
    assert f"{recipe.parameters:,} parameters" in report
    assert f"{recipe.tokens:,}" in report and "GiB a rank" in report


def test_more_ranks_need_less_optimizer_memory_each(tiny_model):
    recipe = load_recipe("quickstart")
    model = tiny_model()
    assert training_memory(recipe, model, 4).optimizer == training_memory(recipe, model, 1).optimizer // 4
