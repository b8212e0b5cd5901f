"""Several specialists and base experts speaking together: their distributions combined token by token.

Design choices:
- A member is an attached specialist, the base's product (`base`) or one of its experts (`stage:0`); a recipe such as
  ``chat + 0.5 tool`` gives their weights.
- A combination rule is a typed function under a decorator; it sees log-probabilities and weights and returns scores.
- One cache holds every path, so members whose overlays are equal share the base's keys and values and its work.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from stagewise.modeling import PoEForCausalLM
from stagewise.modeling.decoding import Result, tail
from stagewise.modeling.frontier import FrontierCache
from stagewise.modeling.pooling import normalise, pool
from stagewise.modeling.sampling import Chooser, SamplingParams

Rule = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {}


def combination_rule(name: str) -> Callable[[Rule], Rule]:
    """Register a function of log-probabilities (M, B, V) and weights (M,) that returns scores (B, V)."""

    def register(rule: Rule) -> Rule:
        RULES[name] = rule
        return rule

    return register


@combination_rule("log_op")
def log_op(logp: Tensor, weights: Tensor) -> Tensor:
    """Logarithmic opinion pool: sum of w_m log p_m, weights as given (normalised they are a geometric mean)."""
    return (weights[:, None, None] * logp).sum(0)


@combination_rule("mixture")
def mixture(logp: Tensor, weights: Tensor) -> Tensor:
    """Linear opinion pool: log of sum of w_m p_m, weights normalised to 1 (they must not be negative)."""
    if bool((weights < 0).any()):
        raise ValueError("a mixture has no negative weights; use the rule log_op")
    return torch.logsumexp(logp + (weights / weights.sum()).log()[:, None, None], dim=0)


@combination_rule("most_certain")
def most_certain(logp: Tensor, weights: Tensor) -> Tensor:
    """At each position the member with the least entropy speaks, its entropy divided by its weight."""
    entropy = -(logp.exp() * logp).sum(-1) / weights[:, None]  # (M, B)
    return logp.gather(0, entropy.argmin(0)[None, :, None].expand(1, *logp.shape[1:]))[0]


def parse_members(text: str) -> dict[str, float]:
    """Weights by member from ``chat + 0.5 tool - 0.2 base``. Raises ValueError for anything else."""
    signed = re.findall(r"([+-]?)\s*(?:(\d+(?:\.\d+)?)\s*\*?\s*)?([A-Za-z_]\w*(?::\d+)?)\s*", text)
    if not signed or re.sub(r"[+-]?\s*(?:\d+(?:\.\d+)?\s*\*?\s*)?[A-Za-z_]\w*(?::\d+)?\s*", "", text).strip():
        raise ValueError(f"cannot read {text!r}: write members as 'chat + 0.5 tool' or 'base + stage:0'")
    found: dict[str, float] = {}
    for sign, weight, name in signed:
        if name in found:
            raise ValueError(f"{name} is named twice in {text!r}")
        found[name] = float(weight or 1.0) * (-1 if sign == "-" else 1)
    return found


class Composition:
    """Members of a model with their weights and the rule that combines them.

    `members`: weights by name, or their short form. Raises ValueError for a member the model does not have.
    """

    def __init__(self, model: PoEForCausalLM, members: Mapping[str, float] | str, rule: str = "log_op"):
        self.model = model
        self.members = parse_members(members) if isinstance(members, str) else dict(members)
        if rule not in RULES:
            raise ValueError(f"unknown combination rule {rule!r}; known: {', '.join(RULES)}")
        if not self.members:
            raise ValueError("a composition needs at least one member")
        self.rule = RULES[rule]
        for name in self.members:
            kind, _, index = name.partition(":")
            if kind == "stage" and index:
                model.check_stage(int(index), "stage")
            elif name != "base":
                model.path(name)
        self.paths = list(dict.fromkeys("base" if n == "base" or ":" in n else n for n in self.members))
        self.weights = torch.tensor(list(self.members.values()), device=model.device)

    def _member_logp(self, name: str, states: dict, taps: dict, wanted: list[int], counts: dict) -> Tensor:
        """Log-probabilities (B, 1, V) of one member at the last pending position."""
        model = self.model

        def last(stage: int, path: str) -> Tensor:
            key = model.stage_key(stage, path)
            return tail(states[key], counts[key], wanted)

        if name.startswith("stage:"):
            stage = int(name.partition(":")[2])
            return normalise(model.stage_logits(stage, last(stage, "base")))
        if name == "base" and model.config.poe_mode != "none":
            logits = [model.stage_logits(k, last(k, "base")) for k in model.path_stages("base")]
            return normalise(pool(logits))
        stage = model.path_stages(name)[-1]
        key = model.stage_key(stage, name)
        tap = None if taps[key] is None else tail(taps[key], counts[key], wanted)
        return normalise(model.final_logits(last(stage, name), tap, path=name))

    def advance(self, cache: FrontierCache) -> Tensor:
        """Run everything pending in `cache`; combined scores (B, V) at every row's last position."""
        states: dict[tuple, Tensor] = {}
        taps: dict[tuple, Tensor | None] = {}
        counts: dict[tuple, list[int]] = {}
        for path in self.paths:
            for stage in self.model.path_stages(path):
                output, _, count = cache.advance(stage, path=path)
                if output is not None:
                    key = self.model.stage_key(stage, path)
                    states[key], taps[key], counts[key] = output.hidden, output.tap, [max(1, c) for c in count]
        wanted = [1] * cache.rows
        logp = torch.stack([self._member_logp(n, states, taps, wanted, counts)[:, 0] for n in self.members])
        return self.rule(logp, self.weights.to(logp.dtype))

    @torch.no_grad()
    def log_probabilities(self, ids: Tensor) -> Tensor:
        """Combined log-probabilities (B, V) of what follows `ids` (B, T)."""
        cache = FrontierCache(self.model, ids.size(0), paths=self.paths)
        cache.extend(ids.tolist())
        return normalise(self.advance(cache))

    @torch.no_grad()
    def decode(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Result:
        """Continue every prompt with the members' combined distribution, cached.

        `stages_used` holds -1: no single stage emits. Raises ValueError for a prompt that is empty or too long.
        """
        context = self.model.config.max_position_embeddings
        for row, prompt in enumerate(prompts):
            if not prompt or len(prompt) + params.max_new_tokens > context:
                raise ValueError(
                    f"row {row}: {len(prompt)} prompt tokens and max_new_tokens={params.max_new_tokens} must fit the "
                    f"context of {context}, and a prompt needs at least one token"
                )
        begun = time.perf_counter()
        cache = FrontierCache(self.model, len(prompts), paths=self.paths)
        cache.extend([list(prompt) for prompt in prompts])
        chooser = Chooser(params, len(prompts), self.model.device)
        eos = self.model.generation_config.eos_token_id if params.stop_tokens is None else params.stop_tokens
        stops = set(eos if isinstance(eos, (list, tuple, set)) else [] if eos is None else [eos])
        tokens: list[list[int]] = [[] for _ in prompts]
        finish = [""] * len(prompts)
        prefill = 0.0
        for step in range(params.max_new_tokens):
            scores = chooser.process(normalise(self.advance(cache)), cache.ids)
            prefill = prefill or time.perf_counter() - begun
            new: list[list[int]] = [[] for _ in prompts]
            for row in range(len(prompts)):
                if finish[row]:
                    continue
                token = chooser.choose(scores[row], row, len(cache.ids[row]))
                tokens[row].append(token)
                finish[row] = "stop" if token in stops else "length" if step + 1 == params.max_new_tokens else ""
                new[row] = [] if finish[row] else [token]
            if all(finish):
                break
            cache.extend(new)
            cache.commit(cache.lengths())
        used = [[-1] * len(row) for row in tokens]
        seconds = time.perf_counter() - begun
        return Result(tokens, used, finish, [None] * len(prompts), prefill_seconds=prefill, seconds=seconds)
