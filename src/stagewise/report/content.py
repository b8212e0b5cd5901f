"""What a report shows, gathered from the files of a run or model folder.

- Nothing is shown that was not measured: a part whose files are missing stays empty and its section is left out.
- Files read: `recipe.yaml` and `metrics.jsonl` of a run; `config.json` and `eval/*.json` of a model (a run's model is
  its `model/`).
- Evaluation files are recognised by what they hold, not by their names (see `stagewise.hub.measurements`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagewise.hub.measurements import finite

__all__ = ["Content", "Curves", "Sample", "SampleToken", "finite", "read_jsonl"]

Point = tuple[float, float]


@dataclass
class Curves:
    """Training curves by step: loss in nats per token, validation in bits per byte."""

    loss: dict[str, list[Point]] = field(default_factory=dict)  # "loss", "expert 0", ...
    validation: dict[str, list[Point]] = field(default_factory=dict)  # "expert 0", "product", "final path"


@dataclass
class SampleToken:
    """One generated token: its text, the expert it is attributed to, and each predictor's most likely tokens."""

    text: str
    stage: int
    top: list[list[tuple[str, float]]]  # per expert, then the product: (token, probability)


@dataclass
class Sample:
    """A continuation whose tokens know the expert that emitted (or settled) them."""

    prompt: str
    tokens: list[SampleToken]
    rule: str  # how `stage` was decided, in words


@dataclass
class Content:
    """Everything a page can show; empty parts are left out."""

    title: str
    config: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    curves: Curves | None = None
    evaluation: dict[str, Any] = field(default_factory=dict)  # the figures of evaluate_bpb and what came with them
    exits: list[dict[str, Any]] = field(default_factory=list)  # per safety: exit_shares, disagreement
    exit_shares: list[float] = field(default_factory=list)  # share of tokens emitted by each stage, at the usual safety
    exit_setting: str = ""
    acceptance: list[dict[str, Any]] = field(default_factory=list)  # draft_stage, k_draft, acceptance
    routing: list[dict[str, Any]] = field(default_factory=list)  # cap, share, threshold, speed-up
    bounds: list[float] = field(default_factory=list)
    certificate: dict[str, Any] = field(default_factory=dict)
    probes: list[dict[str, Any]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    setting: dict[str, str] = field(default_factory=dict)

    @property
    def stages(self) -> int:
        """Number of experts, 0 when nothing says."""
        return len(self.evaluation.get("stage_bpb", [])) or len(self.config.get("poe_stage_layers", []) or [])

    def stage_depths(self) -> list[int]:
        """Trunk layers evaluated up to the end of each stage."""
        depths, total = [], 0
        for layers in self.config.get("poe_stage_layers") or []:
            total += layers
            depths.append(total)
        return depths


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics file; a last line cut short by a killed run is left out.

    Any other damage is a `ValueError`.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            if number == len(lines):
                return
            raise ValueError(f"{path}: line {number} is not JSON; remove that line or train again") from None
