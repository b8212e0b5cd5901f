"""Exit bounds of WAND: how far the next expert moves a margin on all but one token in a hundred.

`b_j` is the 99th percentile over validation tokens of `max_v(d) - min_v(d)`, `d = C_{j+1} - C_j`, C_k the mean of the
first k experts' log-probabilities (model card; Jeong 2026, section 5.3). The quantile is exact: every token's value is
kept. A sum of percentiles guarantees nothing about the sum; what is promised stands in the certificate.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from stagewise.calibration.exits import ExitStatistics, exit_thresholds, wand_output
from stagewise.evaluation.provenance import write_json

MINIMUM_TOKENS = 131_072
CONFIG_FIELD = "poe_wand_p99_bounds_per_stage_head"


def check_enough(tokens: int, minimum: int = MINIMUM_TOKENS) -> None:
    """`ValueError` saying how many tokens a bound needs."""
    if tokens < minimum:
        raise ValueError(
            f"exit bounds need at least {minimum:,} tokens, the text holds {tokens:,}: give more text, "
            "or accept rougher bounds with --allow-fewer-tokens"
        )


def wand_bounds(statistics: ExitStatistics, *, percentile: float = 99.0, minimum: int = MINIMUM_TOKENS) -> list[float]:
    """The K-1 bounds b_{j->j+1} in nats; `ValueError` on fewer than `minimum` tokens."""
    check_enough(statistics.tokens, minimum)
    return [float(np.quantile(row, percentile / 100)) for row in statistics.spread.double().numpy()]


def exit_report(statistics: ExitStatistics, bounds: list[float], safety: float = 1.0) -> dict[str, Any]:
    """Exit shares by stage and the share of tokens on which WAND with these bounds differs from the full product."""
    tokens, depth = wand_output(statistics, exit_thresholds(bounds, safety))
    shares = np.bincount(depth.numpy(), minlength=statistics.experts) / statistics.tokens
    disagreement = float((tokens != statistics.prefix_top1[-1]).double().mean())
    return {"safety": safety, "exit_shares": shares.tolist(), "disagreement": disagreement}


def store_bounds(folder: str | Path, bounds: list[float]) -> None:
    """Write the bounds into `config.json` of a model folder, atomically; every other key stays."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: exit bounds are stored in a model folder")
    config = json.loads(path.read_text(encoding="utf-8"))
    config[CONFIG_FIELD] = [float(bound) for bound in bounds]
    write_json(path, config)
