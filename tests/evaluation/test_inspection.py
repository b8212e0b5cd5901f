from __future__ import annotations

import pytest
import torch

from stagewise.evaluation.inspection import Costs, available_memory, inspect_config, parameter_parts, preset_config
from stagewise.modeling.frontier import FrontierCache

RELEASED = {
    "bp-1.3b": 1_384_122_122,
    "poe-1.3b": 1_384_122_122,
    "poe-1.5b": 1_507_591_082,
    "poe-3b": 3_019_900_506,
    "stage-chat": 1_491_076_878,
    "stage-tool": 1_547_699_986,
}


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes_count_to_the_unit(name):
    assert inspect_config(preset_config(name))["parameters"] == RELEASED[name]


def test_parts_and_stages_add_up_to_the_whole(tiny_config, tiny_model):
    model = tiny_model()
    total = sum(p.numel() for p in model.parameters())
    parts = parameter_parts(model)
    assert sum(parts.values()) == total
    stages = Costs(model.config).stages()
    rest = parts["embedding"] + parts["head_shared"] + parts["scalars"]
    assert sum(cost.parameters for cost in stages) + rest == total
    report = inspect_config(model.config)
    assert sum(report["parts"].values()) == report["parameters"] == total


def test_the_cards_parts_of_the_3b_model():
    parts = inspect_config(preset_config("poe-3b"))["parts"]
    heads = sum(count for name, count in parts.items() if name in ("head_0", "head_1", "head_2", "head_3"))
    assert round(parts["layers"] / 1e9, 2) == 2.08 and round(parts["value_embeddings"] / 1e9, 2) == 0.54
    assert round((heads + parts["head_shared"]) / 1e9, 2) == 0.34 and round(parts["embedding"] / 1e9, 2) == 0.07


def test_flops_are_those_torch_counts(tiny_model):
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny_model(smear_channels=0)
    ids = torch.zeros(1, 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.forward_stage(ids, 1)
    counted = counter.get_total_flops()
    # the counter sees matrices only, and here the stage's two heads are not folded
    cost = {c.name: c for c in Costs(model.config, context=1).modes()}["stage 1 alone"]
    head = 2 * model.config.padded_vocab_size * model.config.hidden_size
    attention = 4 * model.config.num_attention_heads * model.config.head_dim * 3
    assert counted - head == cost.flops - attention


def test_kv_bytes_are_what_a_full_cache_holds(tiny_model):
    model = tiny_model()  # context 256: the long window keeps 256 positions, short ones 128 + 1
    costs = Costs(model.config, "float32", context=128)
    cache = FrontierCache(model, 1)
    with torch.no_grad():
        model(torch.zeros(1, 128, dtype=torch.long), past_key_values=cache, use_cache=True)
    assert costs.full().kv_bytes == 128 * costs.full().kv_bytes_per_token
    assert cache.bytes() == 256 * costs.full().kv_bytes_per_token  # its storage grows by blocks of 256 positions


def test_windows_bound_the_keys_that_are_read():
    costs = Costs(preset_config("poe-3b"), context=2048)
    full = costs.full()
    # 24 short layers see 513 positions, 8 long ones 2048; 2 x 8 x 128 x 2 bytes each
    assert full.kv_bytes_read == (24 * 513 + 8 * 2048) * 4096
    assert full.kv_bytes_per_token == 32 * 4096


def test_prefixes_and_drafts_cost_their_share():
    costs = Costs(preset_config("poe-3b"), context=1)
    modes = {cost.name: cost for cost in costs.modes()}
    assert [modes[name].layers for name in ("prefix 1", "prefix 2", "prefix 3", "full")] == [16, 22, 27, 32]
    assert [modes[name].heads for name in ("prefix 1", "prefix 2", "full", "final path", "stage 3 alone")] == [
        1,
        2,
        4,
        1,
        1,
    ]
    drafts = costs.early_costs()
    assert drafts == sorted(drafts) and 0.4 < drafts[0] < 0.5
    layers = 2 * costs.parts["layer_0"] * 16
    assert modes["prefix 1"].weight_bytes == pytest.approx(layers + 2 * costs.head_size, rel=1e-3)


def test_one_shared_head_is_read_once():
    modes = {cost.name: cost for cost in Costs(preset_config("poe-1.3b")).modes()}
    assert modes["full"].heads == 1
    assert "full" not in {cost.name for cost in Costs(preset_config("bp-1.3b")).modes()}


def test_specialists_cost_their_base_and_their_layers():
    costs = Costs(preset_config("stage-chat"), context=1)
    specialist = costs.full()
    assert (specialist.name, specialist.layers) == ("specialist", 26)
    assert specialist.parameters == costs.parameters
    assert [cost.name for cost in costs.stages()][-1] == "specialist 0"


def test_memory_is_compared_with_what_is_free(tiny_config, monkeypatch):
    report = inspect_config(tiny_config(), batch=3, context=100, dtype="float32")
    memory = report["memory"]
    assert memory["needed"] == memory["weights"] + memory["folded_heads"] + memory["kv"]
    assert memory["kv"] == 3 * 100 * 5 * 2 * 2 * 8 * 4
    assert memory["fits"]["memory"] is True and available_memory()["memory"] > 0
    monkeypatch.setattr("stagewise.evaluation.inspection.available_memory", lambda: {"memory": 1000})
    assert inspect_config(tiny_config())["memory"]["fits"] == {"memory": False}


def test_bad_arguments_are_named(tiny_config):
    with pytest.raises(ValueError, match="dtype='float3'"):
        Costs(tiny_config(), "float3")
    with pytest.raises(ValueError, match="context=300"):
        Costs(tiny_config(), context=300)
    with pytest.raises(ValueError, match="batch=0"):
        inspect_config(tiny_config(), batch=0)
    assert preset_config("no-such-shape") is None


@pytest.mark.parametrize("name", ["quickstart", "stage-math"])
def test_shipped_recipes_can_be_inspected(name):
    assert inspect_config(preset_config(name))["parameters"] > 0
