"""Acceptance of drafts, per draft stage and draft length, from one teacher-forced pass.

Under greedy decoding an accepted draft equals the full model's text, so the drafter always sees that text up to its
first miss: whether stage k agrees with the product at each position of the full model's own greedy continuation decides
every round, for every length at once. On such continuations the figures are those of real greedy speculation. On other
text they tell how the two agree given that text; the result names which was used.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stagewise.calibration.exits import ExitStatistics

DEFAULT_LENGTHS = (1, 2, 3, 4, 6, 8)


def speculate(agree: np.ndarray, length: int) -> tuple[int, int, int]:
    """(accepted, drafted, rounds) of greedy speculation over one text with `agree` (T,) between draft and target.

    A round drafts `length` tokens (fewer where the text ends: one place is the target's), keeps those before the first
    miss, and adds the target's own token: the correction, or a bonus after all were accepted.
    """
    accepted = drafted = rounds = position = 0
    end = agree.size
    while position < end:
        draft = min(length, end - position - 1)
        window = agree[position : position + draft]
        hits = draft if window.all() else int(window.argmin())
        accepted += hits
        drafted += draft
        rounds += 1
        position += hits + 1
    return accepted, drafted, rounds


def expected_round(acceptance: float, length: int) -> float:
    """Expected tokens a round when every draft is accepted with the same probability: (1-a^(m+1))/(1-a)."""
    if acceptance >= 1:
        return float(length + 1)
    return (1 - acceptance ** (length + 1)) / (1 - acceptance)


def acceptance_table(
    statistics: ExitStatistics,
    early_costs: list[float],
    *,
    lengths: tuple[int, ...] = DEFAULT_LENGTHS,
    text: str = "greedy continuations",
) -> dict[str, Any]:
    """Acceptance (accepted / drafted), tokens a round and the bandwidth-bound speed-up per draft stage and length.

    `early_costs[k]` is the cost of a draft token at stage k as a share of a full one. The speed-up is
    `tokens a round / (1 + m f)`; `best` is the stage and length where it is largest. `token_agreement[k]` is the share
    of positions on which stage k names the product's token.
    """
    full = statistics.prefix_top1[-1]
    agree = (statistics.stage_top1 == full).numpy()  # (K, N)
    groups = statistics.groups.numpy()
    starts = np.flatnonzero(np.append(True, groups[1:] != groups[:-1]))
    rows = []
    for stage in range(statistics.experts - 1):
        texts = np.split(agree[stage], starts[1:])
        for length in lengths:
            if length < 1:
                raise ValueError(f"a draft length must be at least 1, got {length}")
            accepted, drafted, rounds = (sum(part) for part in zip(*(speculate(t, length) for t in texts), strict=True))
            per_round = statistics.tokens / rounds
            rows.append(
                {
                    "draft_stage": stage,
                    "k_draft": length,
                    "acceptance": accepted / drafted if drafted else 0.0,
                    "accepted": accepted,
                    "drafted": drafted,
                    "tokens_per_round": per_round,
                    "bandwidth_speedup": per_round / (1 + length * early_costs[stage]),
                }
            )
    best = max(rows, key=lambda row: row["bandwidth_speedup"])
    return {
        "text": text,
        "tokens": statistics.tokens,
        "texts": int(starts.size),
        "token_agreement": agree.mean(1).tolist(),
        "rows": rows,
        "best": {name: best[name] for name in ("draft_stage", "k_draft", "bandwidth_speedup")},
    }
