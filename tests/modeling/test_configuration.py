"""Released shapes to the unit, per-layer facts that do not move, and clear refusals."""

from __future__ import annotations

import pytest
import torch

from stagewise import PoEConfig, PoEForCausalLM

RELEASED = {
    "bp-1.3b": (175, 1_384_122_122),
    "poe-1.3b": (175, 1_384_122_122),
    "poe-1.5b": (179, 1_507_591_082),
    "poe-3b": (235, 3_019_900_506),
    "stage-chat": (188, 1_491_076_878),
    "stage-tool": (200, 1_547_699_986),
}


@pytest.mark.parametrize("name", RELEASED)
def test_presets_have_exactly_the_released_tensors_and_parameters(name):
    with torch.device("meta"):
        parameters = list(PoEForCausalLM(PoEConfig.preset(name)).parameters())
    assert (len(parameters), sum(p.numel() for p in parameters)) == RELEASED[name]


def test_boundaries_of_the_released_layouts():
    assert PoEConfig.preset("poe-3b").stage_boundaries == [15, 21, 26, 31]
    assert PoEConfig.preset("poe-1.5b").stage_boundaries == [11, 16, 20, 23]


def test_appended_layers_move_nothing_below_them():
    base, tool = PoEConfig.preset("poe-1.3b"), PoEConfig.preset("stage-tool")
    assert tool.layer_windows[:24] == base.layer_windows
    assert tool.layer_windows[24:] == [512, 512, 512, 2048]
    assert tool.value_embed_layers == base.value_embed_layers == list(range(1, 24, 2))
    assert tool.backout_layer == base.backout_layer == 12
    assert tool.stage_ranges == [*base.stage_ranges, (24, 28)]


def test_even_stages_and_older_revisions_are_fields():
    config = PoEConfig(num_hidden_layers=12, poe_every=3, poe_mode="flat", qk_scale=1.0, smear_channels=0)
    assert config.poe_stage_layers == [3, 3, 3, 3]
    with torch.device("meta"):
        names = dict(PoEForCausalLM(config).named_parameters())
    assert "smear_gate.weight" not in names


def test_a_configuration_survives_saving(tmp_path):
    config = PoEConfig.preset("stage-chat", poe_wand_p99_bounds_per_stage_head=[3.0, 1.5, 1.1])
    config.save_pretrained(tmp_path)
    again = PoEConfig.from_pretrained(tmp_path)
    for key, value in config.to_dict().items():
        assert getattr(again, key) == value, key


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"poe_stage_layers": [4, 3]}, "sum to the base's 8 layers, not 7"),
        ({"poe_stage_layers": [8, 0]}, "must be positive"),
        ({"poe_every": 3}, "poe_every=3 does not divide"),
        ({"poe_mode": "deep"}, "poe_mode='deep'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 does not divide"),
        ({"window_pattern": "SX"}, "window_pattern='SX'"),
        ({"poe_router": True}, "router"),
        ({"poe_stage_layers": [4, 4], "per_stage_head": True, "poe_head_count": 3}, "poe_head_count=3"),
        ({"poe_stage_layers": [4, 4], "poe_wand_p99_bounds_per_stage_head": [1.0, 2.0]}, "has 2 bounds"),
        ({"hidden_size": 16, "num_attention_heads": 2}, "must not exceed hidden_size=16"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        PoEConfig(num_hidden_layers=8, base_layers=8, **changes)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown preset 'poe-7b'.*poe-3b"):
        PoEConfig.preset("poe-7b")
