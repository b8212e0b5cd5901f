"""Strategies: which experts speak, which of them draft, and when a draft or an early exit is trusted."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

logger = logging.getLogger("stagewise")

MODES = ("full", "prefix", "stage", "composition", "wand", "speculative", "auto")
ELASTIC_FILE = "elastic.json"
# Measured on one released checkpoint of the layout (16, 6, 5, 5) with a head per stage; only ever a fallback for it.
FALLBACK_LAYOUT, FALLBACK_BOUNDS = [16, 6, 5, 5], (3.2557, 1.5259, 1.1327)


@dataclass(frozen=True)
class Strategy:
    """How one set of weights is decoded.

    Args:
        mode: full (the model's default output), prefix (first `stages_used` experts), stage (one expert), composition
            (`stages` with `weights`), wand (adaptive depth), speculative (draft, then verify), auto (what
            `stagewise tune` found best for this folder, else full).
        max_stages: prefix length. stage: the single expert. stages, weights: the composition.
        draft_stage: the drafter; `draft_prefix` drafts with the product of stages 0 .. draft_stage instead.
        k_draft: tokens drafted per round at most. draft_confidence: stop drafting once the drafter's top
            probability falls below it (0: never).
        safety: factor on the WAND bounds; higher is more careful. p99_bounds: the bounds, in nats, one per boundary;
            the config's when None. thresholds: margins in nats, used instead of safety and bounds (a certificate's).
        verified: WAND whose early tokens are checked by the full model before they count: lossless.
        max_pending: provisional tokens a verified WAND may have at a time.
        path: "base" or a specialist's name; the model's own default when None. head_mode: for specialists.
    """

    mode: str = "full"
    max_stages: int | None = None
    stage: int | None = None
    stages: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    draft_stage: int = 0
    draft_prefix: bool = False
    k_draft: int = 4
    draft_confidence: float = 0.0
    safety: float = 1.0
    p99_bounds: tuple[float, ...] | None = None
    thresholds: tuple[float, ...] | None = None
    verified: bool = False
    max_pending: int = 8
    path: str | None = None
    head_mode: str | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"unknown mode {self.mode!r}; known modes: {', '.join(MODES)}")
        for name in ("k_draft", "max_pending"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.safety < 0:
            raise ValueError(f"safety={self.safety} must not be negative")

    @property
    def lossless(self) -> bool:
        """Whether the text is that of `full` by construction."""
        return self.mode in ("full", "speculative") or (self.mode == "wand" and self.verified)

    @classmethod
    def parse(cls, text: str, **settings) -> Strategy:
        """From a short form: full, prefix:2, stage:0, composition:0,2,3, wand, wand-verified, speculative:4, auto."""
        mode, _, argument = text.partition(":")
        if mode in ("wand-verified", "verified-wand", "verified"):
            mode, settings = "wand", {**settings, "verified": True}
        try:
            if argument and mode == "prefix":
                settings["max_stages"] = int(argument)
            elif argument and mode == "stage":
                settings["stage"] = int(argument)
            elif argument and mode == "composition":
                settings["stages"] = tuple(int(s) for s in argument.split(","))
            elif argument and mode == "speculative":
                settings["k_draft"] = int(argument)
            elif argument and mode == "wand":
                settings["safety"] = float(argument)
            elif argument:
                raise ValueError(f"mode {mode!r} takes no argument, got {argument!r}")
        except ValueError as error:
            raise ValueError(f"cannot read mode {text!r}: {error}") from error
        return cls(mode=mode, **settings)

    def resolve(self, model) -> Strategy:
        """Replace auto by the tuned strategy of the model's folder, or full."""
        if self.mode != "auto":
            return self
        file = Path(str(model.config._name_or_path or ".")) / ELASTIC_FILE
        if not file.is_file() or model.config.poe_mode == "none":
            return replace(self, mode="full")
        chosen = dict(json.loads(file.read_text(encoding="utf-8"))["strategy"])
        for name in ("stages", "weights", "p99_bounds", "thresholds"):
            if chosen.get(name) is not None:
                chosen[name] = tuple(chosen[name])
        return replace(Strategy(**chosen), path=self.path, head_mode=self.head_mode)


def exit_bounds(config, bounds: Sequence[float] | None = None) -> list[float]:
    """Bounds b_{j -> j+1} in nats, one per boundary between the K stages: given, or from the config.

    Raises ValueError when there are none, or not K - 1 of them.
    """
    found = bounds if bounds is not None else config.poe_wand_p99_bounds_per_stage_head
    if found is None:
        if config.per_stage_head and list(config.poe_stage_layers) == FALLBACK_LAYOUT:
            logger.warning("no calibrated WAND bounds in the config; falling back to %s", FALLBACK_BOUNDS)
            found = FALLBACK_BOUNDS
        else:
            raise ValueError(
                "no WAND bounds: the config has no poe_wand_p99_bounds_per_stage_head and p99_bounds was not given. "
                "Measure them with `stagewise calibrate MODEL`"
            )
    if len(found) != config.num_stages - 1:
        raise ValueError(
            f"p99_bounds has {len(found)} entries; {config.num_stages} stages need {config.num_stages - 1}"
        )
    return [float(b) for b in found]


def exit_thresholds(config, strategy: Strategy) -> list[float]:
    """Margin in nats above which stage k may emit: `safety * sum_{j >= k} b_j`, K - 1 numbers."""
    if strategy.thresholds is not None:
        if len(strategy.thresholds) != config.num_stages - 1:
            raise ValueError(
                f"thresholds has {len(strategy.thresholds)} entries; {config.num_stages} stages need "
                f"{config.num_stages - 1}"
            )
        return list(strategy.thresholds)
    bounds = exit_bounds(config, strategy.p99_bounds)
    return [strategy.safety * sum(bounds[k:]) for k in range(len(bounds))]
