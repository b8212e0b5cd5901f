"""Small trained-looking checkpoints, made as the hub's tests make them."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def write_checkpoint():
    """Function (folder, seed=0, **changes) that writes a small model folder with its tokenizer."""
    spec = importlib.util.spec_from_file_location("hub_models", Path(__file__).parents[1] / "hub" / "conftest.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    return models.write_checkpoint
