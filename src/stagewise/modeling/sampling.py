"""From scores to tokens: processors, drawing, and accepting drafts without changing the distribution.

Design choices:
- Warping is transformers' own (temperature, top-k, top-p, min-p, repetition penalty, bias); drafts and targets go
  through the same list, on the prefix each position would really have.
- Randomness belongs to a row: its seed alone decides, whatever else is in the batch.
- Three ways to draw: greedy; `sample`, where drafts are kept with probability min(1, p/q) and replaced from the
  residual norm((p - q)+); and `gumbel`, where noise keyed by (seed, position) makes every lossless mode produce the
  very same text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass
class SamplingParams:
    """How tokens are chosen and when a row stops.

    Args:
        max_new_tokens: at most so many tokens per row.
        temperature: 0 is greedy. top_k, top_p, min_p: truncations, off at 0, 1 and 0.
        repetition_penalty: as in transformers, over prompt and text; 1 is off.
        logit_bias: token id -> number added to its score.
        seed: one number (row r uses seed + r) or one per row; None draws fresh ones.
        coupling: "sample" or "gumbel".
        stop_tokens: ids that end a row (kept in its tokens); None: the model's eos ids.
        stop_strings: end a row once its text contains one of them; needs a tokenizer.
        n: samples per prompt, from one prefill.
        logprobs: report the natural log-probability of every token under the distribution the mode targets, before
            temperature and truncation.
        processors: further transformers processors, functions of (prefix ids (1, T), scores (1, V)).
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int | Sequence[int] | None = None
    coupling: str = "sample"
    stop_tokens: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    n: int = 1
    logprobs: bool = False
    processors: Sequence[Callable] = ()

    def __post_init__(self):
        def check(ok: bool, message: str) -> None:
            if not ok:
                raise ValueError(message)

        check(self.max_new_tokens >= 1, f"max_new_tokens={self.max_new_tokens} must be at least 1")
        check(self.temperature >= 0, f"temperature={self.temperature} must not be negative; 0 is greedy")
        check(self.top_k >= 0, f"top_k={self.top_k} must not be negative; 0 turns it off")
        check(0 < self.top_p <= 1, f"top_p={self.top_p} must lie in (0, 1]")
        check(0 <= self.min_p < 1, f"min_p={self.min_p} must lie in [0, 1)")
        check(self.repetition_penalty > 0, f"repetition_penalty={self.repetition_penalty} must be positive")
        check(self.coupling in ("sample", "gumbel"), f"coupling={self.coupling!r} must be sample or gumbel")
        check(self.n >= 1, f"n={self.n} must be at least 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def reads_prefix(self) -> bool:
        """Whether a processor needs the ids before the position."""
        return self.repetition_penalty != 1.0 or bool(self.processors)

    @property
    def plain(self) -> bool:
        """Whether scores reach the choice untouched, so that their normaliser cancels."""
        return not self.reads_prefix and not self.logit_bias

    def row_seeds(self, rows: int) -> list[int]:
        if self.seed is None:
            return torch.randint(0, 2**62, (rows,)).tolist()
        if isinstance(self.seed, int):
            return [self.seed + r for r in range(rows)]
        if len(self.seed) != rows:
            raise ValueError(f"seed has {len(self.seed)} entries for {rows} rows")
        return list(self.seed)


class Chooser:
    """Chooses tokens for the rows of a batch.

    Args:
        params: how. rows: number of rows, each with a generator of its own.
    """

    def __init__(self, params: SamplingParams, rows: int, device):
        self.params, self.device = params, device
        self.seeds = params.row_seeds(rows)
        self.generators = [torch.Generator().manual_seed(s) for s in self.seeds]
        before = [RepetitionPenaltyLogitsProcessor(params.repetition_penalty)] if params.repetition_penalty != 1 else []
        self.by_prefix: Callable = LogitsProcessorList([*before, *params.processors])
        self.bias: Tensor | None = None
        warpers: list = []
        if not params.greedy:
            if params.temperature != 1:
                warpers.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k:
                warpers.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                warpers.append(TopPLogitsWarper(params.top_p))
            if params.min_p > 0:
                warpers.append(MinPLogitsWarper(params.min_p))
        self.warpers: Callable | None = LogitsProcessorList(warpers) if warpers else None

    def process(self, scores: Tensor, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Processed scores (N, V): one prefix per line. Scores must be log-probabilities unless `params.plain`."""
        if self.params.logit_bias:
            if self.bias is None:
                self.bias = scores.new_zeros(scores.size(-1))
                for token, amount in self.params.logit_bias.items():
                    if not 0 <= token < scores.size(-1):
                        raise ValueError(f"logit_bias names token {token}, outside the vocabulary")
                    self.bias[token] = amount
            scores = scores + self.bias
        if self.params.reads_prefix:
            lines = [
                self.by_prefix(torch.tensor([list(p)], device=scores.device), scores[i : i + 1].clone())
                for i, p in enumerate(prefixes)
            ]
            scores = torch.cat(lines)
        if self.warpers is not None:
            scores = self.warpers(None, scores)
        return scores

    def gumbel(self, row: int, position: int, size: int) -> Tensor:
        """Standard Gumbel noise (V,) that depends on the row's seed and the position alone."""
        generator = torch.Generator().manual_seed((self.seeds[row] * 1_000_003 + position) % 2**63)
        uniform = torch.rand(size, generator=generator, dtype=torch.float64).clamp_min(1e-300)
        return -torch.log(-torch.log(uniform)).to(self.device)

    def uniform(self, row: int) -> float:
        return torch.rand((), generator=self.generators[row], dtype=torch.float64).item()

    def choose(self, scores: Tensor, row: int, position: int) -> int:
        """One token from processed scores (V,) for `row` at `position`."""
        if self.params.greedy:
            return int(scores.argmax())
        if self.params.coupling == "gumbel":
            noise = self.gumbel(row, position, scores.numel())
            return int((torch.log_softmax(scores.double(), -1) + noise).argmax())
        return draw(torch.softmax(scores.double(), -1), self.uniform(row))

    def verify(self, draft: int, draft_scores: Tensor, scores: Tensor, row: int, position: int) -> tuple[bool, int]:
        """Whether `draft`, chosen from `draft_scores`, stands under `scores` (both processed, (V,)); else what does.

        The token that results has exactly the distribution of `scores`.
        """
        if self.params.greedy or self.params.coupling == "gumbel":
            token = self.choose(scores, row, position)
            return token == draft, token
        p = torch.softmax(scores.double(), -1)
        q = torch.softmax(draft_scores.double(), -1)
        if self.uniform(row) * float(q[draft]) < float(p[draft]):
            return True, draft
        residual = (p - q).clamp_min(0)
        return False, draw(residual / residual.sum(), self.uniform(row))


def draw(probabilities: Tensor, uniform: float) -> int:
    """Token whose stretch of the cumulative distribution contains `uniform`; never one of probability zero."""
    cumulative = probabilities.cumsum(-1)
    token = int(torch.searchsorted(cumulative, uniform * float(cumulative[-1]), right=True))
    if token >= probabilities.numel() or probabilities[token] <= 0:  # rounding at the very end
        token = int(probabilities.nonzero()[-1])
    return token
