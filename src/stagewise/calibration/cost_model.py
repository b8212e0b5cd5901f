"""The cost model of drafting: what a round costs, what it keeps, and which strategy is the fastest.

Design choices:
- With f the share of drafting in the cost of a full token and v(n) the cost of a pass over the deeper stages with n
  positions relative to one, a round of m drafts costs (m+1) f + (1-f) v(m+1), and the speed-up is
  S = E / ((m+1) f + (1-f) v(m+1)), E the tokens a round keeps.
- E is not a formula of one acceptance rate here: rounds are replayed on measured agreement, so every length has its
  own, and so has verified WAND, whose drafts end where the margin fails.
- Speculation that does not gain `LEAST_GAIN` in prediction and in measurement is off: full is what remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagewise.modeling.strategy import Strategy, exit_bounds, exit_thresholds

LENGTHS = (1, 2, 3, 4, 5, 6, 8)
SAFETIES = (1.0, 0.5, 0.25, 0.1, 0.0)
LEAST_GAIN = 1.03


@dataclass
class Costs:
    """Milliseconds of a batch's round, piece by piece.

    `stages[k][n]`: stage k over n new positions a row. `heads[c][n]`: the product of c experts at n positions.
    `target[n]`: the final path's heads at n positions; empty where the target is the product of all experts.
    `overhead`: what a round costs besides.
    """

    stages: list[dict[int, float]]
    heads: dict[int, dict[int, float]]
    target: dict[int, float] = field(default_factory=dict)
    overhead: float = 0.0

    @property
    def experts(self) -> int:
        return max(self.heads, default=0)

    def target_heads(self, width: int, known: int) -> float:
        if self.target:
            return interpolate(self.target, width)
        return interpolate(self.heads[self.experts - known], width) if known < self.experts else 0.0

    def step(self, draft_stage: int, drafters: int) -> float:
        """One position through the drafting stages and their heads."""
        return sum(interpolate(s, 1) for s in self.stages[: draft_stage + 1]) + interpolate(self.heads[drafters], 1)

    def deeper(self, width: int, draft_stage: int, drafters: int) -> float:
        """The deeper stages once over `width` positions, and the heads that drafting has not read."""
        known = 0 if self.target else drafters
        return sum(interpolate(s, width) for s in self.stages[draft_stage + 1 :]) + self.target_heads(width, known)

    def round(self, width: int, draft_stage: int, drafters: int) -> float:
        """A round that ends with `width` positions to verify: drafted tokens and the one before them."""
        deeper = self.deeper(width, draft_stage, drafters)
        return width * self.step(draft_stage, drafters) + deeper + self.overhead

    def full(self) -> float:
        """One token a row by the full model."""
        return sum(interpolate(s, 1) for s in self.stages) + self.target_heads(1, 0) + self.overhead

    def pass_costs(self, draft_stage: int, drafters: int = 1) -> dict[int, float]:
        """v(n): the pass over the deeper stages with n positions relative to one."""
        one = self.deeper(1, draft_stage, drafters)
        return {n: self.deeper(n, draft_stage, drafters) / one for n in sorted(self.stages[0])} if one else {}

    def share(self, draft_stage: int, drafters: int = 1) -> float:
        """f: what drafting a token costs relative to a full one."""
        return self.step(draft_stage, drafters) / self.full()


def interpolate(costs: dict[int, float], n: int) -> float:
    """Cost at n positions: as measured, linear between measurements and beyond the last two."""
    if n in costs:
        return costs[n]
    known = sorted(costs)
    if len(known) == 1:
        return costs[known[0]] * n / known[0]
    above = next((i for i, k in enumerate(known) if k > n), len(known) - 1)
    low, high = (known[above - 1], known[above]) if above else (known[0], known[1])
    return costs[low] + (costs[high] - costs[low]) * (n - low) / (high - low)


@dataclass
class Trace:
    """One text: where a drafter agrees with the target, and where it trusts itself, per position (lists of bool)."""

    agree: list[bool]
    trusted: list[bool]


def replay(traces: Sequence[Trace], longest: int) -> Iterator[tuple[int, int, int, int]]:
    """Rounds of drafting over texts decoded together: (positions a verification spans, tokens, drafted, accepted).

    A row drafts up to `longest` tokens, ends early where the drafter does not trust itself or one place is left, keeps
    what comes before the first miss, and gets one token of the target's. After a miss a real drafter goes on along its
    own text: that changes only how long a draft is which margins end. Tokens, rounds and what is accepted are exact.
    """
    places = [0] * len(traces)
    while any(p < len(t.agree) for p, t in zip(places, traces, strict=True)):
        width = tokens = drafted = accepted = 0
        for r, trace in enumerate(traces):
            start, end = places[r], len(trace.agree)
            if start >= end:
                continue
            drafts = 0
            while drafts < min(longest, end - start - 1) and trace.trusted[start + drafts]:
                drafts += 1
            hits = 0
            while hits < drafts and trace.agree[start + hits]:
                hits += 1
            places[r] = start + hits + 1
            width, tokens = max(width, drafts + 1), tokens + hits + 1
            drafted, accepted = drafted + drafts, accepted + hits
        yield width, tokens, drafted, accepted


def predict(costs: Costs, batches: Sequence[Sequence[Trace]], longest: int, draft_stage: int, drafters: int) -> dict:
    """Tokens per second, tokens a round and row, acceptance of drafting `longest` tokens at a time."""
    milliseconds, rounds, kept, drafted, accepted, rows = 0.0, 0, 0, 0, 0, 0
    for traces in batches:
        for width, tokens, d, a in replay(traces, longest):
            milliseconds += costs.round(width, draft_stage, drafters)
            rounds, kept, drafted, accepted = rounds + 1, kept + tokens, drafted + d, accepted + a
            rows += len(traces)
    return {
        "tokens_per_second": 1000 * kept / milliseconds,
        "tokens_per_round": kept / rows,
        "acceptance": accepted / drafted if drafted else 0.0,
    }


def candidates(
    costs: Costs,
    agreement: dict[tuple[int, int], list[Trace]],
    margins: list[list[float]],
    config: Any,
    batch: int,
    lengths: Sequence[int] = LENGTHS,
) -> list[dict[str, Any]]:
    """Every strategy with its prediction, the fastest first; full is always among them.

    `agreement[(draft_stage, drafters)]` holds a trace per text; `margins` the first expert's top-2 margin in nats per
    text and position, for verified WAND, which is tried where the config has bounds.
    """
    full_speed = 1000 * batch / costs.full()
    full: dict[str, Any] = {"strategy": Strategy(), "tokens_per_second": full_speed}
    found = [{**full, "tokens_per_round": 1.0, "acceptance": 0.0}]

    def grouped(traces: list[Trace]) -> list[list[Trace]]:
        return [traces[i : i + batch] for i in range(0, len(traces), batch)]

    for (stage, drafters), traces in agreement.items():
        for length in lengths:
            chosen = Strategy("speculative", draft_stage=stage, draft_prefix=drafters > 1, k_draft=length)
            found.append({"strategy": chosen, **predict(costs, grouped(traces), length, stage, drafters)})
    if config.poe_wand_p99_bounds_per_stage_head and (0, 1) in agreement:
        bounds = exit_bounds(config)
        for safety in SAFETIES:
            chosen = Strategy("wand", verified=True, safety=safety, p99_bounds=tuple(bounds))
            least = exit_thresholds(config, chosen)[0]
            traces = [Trace(t.agree, [m > least for m in row]) for t, row in zip(agreement[0, 1], margins, strict=True)]
            found.append({"strategy": chosen, **predict(costs, grouped(traces), chosen.max_pending, 0, 1)})
    for entry in found:
        entry["speedup"] = entry["tokens_per_second"] / full_speed
    return sorted(found, key=lambda entry: -entry["tokens_per_second"])


def choose(
    ranked: Sequence[dict[str, Any]], measured: Callable[[Strategy], float]
) -> tuple[dict[str, Any], float, float]:
    """(entry, its measured tokens/s, full's) of the strategy to store.

    The fastest by prediction is measured beside full; unless both gain `LEAST_GAIN`, full it is.
    """
    full = next(entry for entry in ranked if entry["strategy"].mode == "full")
    best = ranked[0]
    speed = measured(full["strategy"])
    if best is full or best["tokens_per_second"] < LEAST_GAIN * full["tokens_per_second"]:
        return full, speed, speed
    fast = measured(best["strategy"])
    return (best, fast, speed) if fast >= LEAST_GAIN * speed else (full, speed, speed)
