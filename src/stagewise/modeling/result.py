"""What decoding yields: events while it runs, a result when it is done."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Event:
    """Something to show while decoding. A committed event replaces every provisional one of its row before it."""

    row: int
    tokens: list[int]
    stages: list[int]
    committed: bool


@dataclass
class Result:
    """What decoding produced; rows are in the order of the prompts, n samples of a prompt adjacent.

    tokens: new ids per row, the stop token included. stages_used: index of the stage that emitted each.
    logprobs: natural log-probability of each token under the target distribution before temperature and truncation
    (the exiting prefix's for plain WAND). finish: "stop", "length" or "error" per row, errors the message.
    drafted, accepted: draft tokens proposed and kept. stage_runs: how often each stage ran.
    prefill_seconds: until the first token is committed; seconds: all of it.
    """

    tokens: list[list[int]]
    stages_used: list[list[int]]
    finish: list[str]
    errors: list[str | None]
    logprobs: list[list[float]] | None = None
    drafted: int = 0
    accepted: int = 0
    rounds: int = 0
    stage_runs: list[int] = field(default_factory=list)
    prefill_seconds: float = 0.0
    seconds: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of drafted tokens that were kept; 0 when nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else 0.0

    @property
    def mean_depth(self) -> float:
        """Mean number of stages that stood behind an emitted token."""
        used = [s + 1 for row in self.stages_used for s in row]
        return sum(used) / len(used) if used else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Rate after the first token, over all rows; 0 when only one was made."""
        count = sum(map(len, self.tokens)) - len(self.tokens)
        rest = self.seconds - self.prefill_seconds
        return count / rest if rest > 0 and count > 0 else 0.0


def merge(results: list[Result]) -> Result:
    """One result of several batches decoded in turn."""

    def joined(name: str) -> list:
        return [x for r in results for x in getattr(r, name)]

    return Result(
        tokens=joined("tokens"),
        stages_used=joined("stages_used"),
        finish=joined("finish"),
        errors=joined("errors"),
        logprobs=joined("logprobs") if results[0].logprobs is not None else None,
        drafted=sum(r.drafted for r in results),
        accepted=sum(r.accepted for r in results),
        rounds=sum(r.rounds for r in results),
        stage_runs=[sum(x) for x in zip(*(r.stage_runs for r in results), strict=True)],
        prefill_seconds=sum(r.prefill_seconds for r in results),
        seconds=sum(r.seconds for r in results),
    )
