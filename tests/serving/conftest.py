"""A small model folder with its tokenizer, shared by the room's tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


def write_model(folder, **changes):
    path = Path(__file__).parent.parent / "evaluation" / "conftest.py"
    spec = importlib.util.spec_from_file_location("evaluation_fixtures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.write_model(folder, **changes)


@pytest.fixture(scope="session")
def served_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("served"), poe_wand_p99_bounds_per_stage_head=[0.4, 0.2])


@pytest.fixture(scope="session")
def end_to_end_served_folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plain"), seed=1, poe_mode="none", per_stage_head=False)
