"""Hand-made exit statistics, and models whose experts are bigram tables."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from stagewise.calibration.exits import ExitStatistics


def evaluation_fixtures():
    path = Path(__file__).parent.parent / "evaluation" / "conftest.py"
    spec = importlib.util.spec_from_file_location("bigram_fixtures", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def random_stages():
    """Build a model of `stages` random bigram experts over `vocab` tokens."""
    model_class = evaluation_fixtures().BigramStages

    def build(stages: int = 3, vocab: int = 7, seed: int = 0, **kw):
        generator = torch.Generator().manual_seed(seed)
        tables = torch.randn(stages, vocab, vocab, generator=generator, dtype=torch.float64)
        return model_class(tables, torch.randn(vocab, vocab, generator=generator, dtype=torch.float64), **kw)

    return build


@pytest.fixture
def statistics_of():
    """Build ExitStatistics from plain lists; whatever is not given is zero."""

    def build(margin, prefix_top1, stage_top1=None, spread=None, targets=None, groups=None):
        margin = torch.as_tensor(np.array(margin), dtype=torch.float32)
        prefix_top1 = torch.as_tensor(np.array(prefix_top1))
        count = margin.shape[1]
        return ExitStatistics(
            margin,
            torch.zeros(margin.shape[0] - 1, count) if spread is None else torch.as_tensor(spread),
            prefix_top1 if stage_top1 is None else torch.as_tensor(np.array(stage_top1)),
            prefix_top1,
            torch.zeros(count, dtype=torch.long) if targets is None else torch.as_tensor(targets),
            torch.zeros(count, dtype=torch.long) if groups is None else torch.as_tensor(groups),
        )

    return build


@pytest.fixture
def small_model_folder():
    """Write a small random model with a tokenizer of 320 tokens into a folder."""
    return evaluation_fixtures().write_model
