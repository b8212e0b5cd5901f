"""Shared fixtures: the reference's small models, tiny configurations and trained-looking random weights."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def fixture_dir() -> Path:
    """The folder of reference fixtures: mha-4x64, gqa-6x64, trajectory-4x64."""
    return FIXTURES


def make_config(**changes):
    from stagewise.modeling import PoEConfig

    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 96,
        "max_position_embeddings": 256,
        "poe_stage_layers": [2, 1, 2],
        "per_stage_head": True,
        "poe_mode": "flat",
        **changes,
    }
    return PoEConfig(**settings)


def make_model(seed: int = 0, scale: float = 1.0, dtype=torch.float32, **changes):
    """A model whose every tensor is random enough that all of them matter to its predictions."""
    from stagewise.modeling import PoEForCausalLM

    model = PoEForCausalLM(make_config(**changes)).init_weights(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lm_head" in name:
                p.normal_(0.0, 0.5 * scale, generator=generator)
            elif "c_proj" in name:
                p.normal_(0.0, 0.3 * scale / p.shape[1] ** 0.5, generator=generator)
        if model.config.smear_channels:
            model.smear_lambda.fill_(0.3)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def tiny_config():
    """Factory of small configurations: tiny_config(num_hidden_layers=4, ...)."""
    return make_config


@pytest.fixture(scope="session")
def tiny_model():
    """Factory of small random models: tiny_model(seed=0, scale=1.0, dtype=torch.float64, ...)."""
    return make_model
