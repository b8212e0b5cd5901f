"""A continuation with a look inside: which expert decided each token, and what every expert would have said.

- With WAND bounds in the model's config the tokens come from `generate_wand`; the deciding expert is the one that
  emitted.
- Without bounds they are the product's greedy tokens, and the deciding expert is the first one from which on every
  deeper product already has that token in front: no calibration is needed, but it is known only in hindsight.
"""

from __future__ import annotations

import codecs
import functools
from typing import Any

import torch

from stagewise.evaluation.bpb import boundary_states, expert_count, inference
from stagewise.report.content import Sample, SampleToken

WAND_RULE = (
    "Decoded with WAND at safety 1.0: a token leaves at the first expert whose margin exceeds the stored bounds."
)
SETTLED_RULE = (
    "Greedy tokens of the full product; the colour is the first expert from which on every deeper product keeps the "
    "token (known in hindsight: this model has no exit bounds yet)."
)


def trace_sample(model: Any, tokenizer: Any, prompt: str, *, max_new_tokens: int = 60, top: int = 5) -> Sample:
    """Continue `prompt` greedily and attribute every token to an expert.

    Returns a `Sample` whose tokens carry the `top` most likely tokens of each of the K experts and of their product,
    with probabilities. Raises `ValueError` for a model without experts.
    """
    experts = expert_count(model)
    if not experts:
        raise ValueError("poe_mode is none: a model trained end to end has no experts to trace")
    ids = [tokenizer.bos_token_id, *tokenizer.encode_ordinary(prompt)]
    room = int(model.config.max_position_embeddings) - len(ids)
    if room < 1:
        raise ValueError(f"prompt has {len(ids)} tokens, the context is {model.config.max_position_embeddings}")
    start = torch.tensor([ids], device=model.device)  # (1, T)
    length = min(max_new_tokens, room)
    with inference(model):
        used: list[int] | None = None
        if getattr(model.config, "poe_wand_p99_bounds_per_stage_head", None):
            out, stages = model.generate_wand(start, max_new_tokens=length, return_stages_used=True)
            used = _flat(stages)
        else:
            out = model.generate_prefix(start, max_stages=experts, max_new_tokens=length)
        new = out[0, len(ids) :].tolist()
        tops, settled = _experts_at(model, out[:, :-1], len(ids) - 1, experts, top, new)

    @functools.cache
    def name(token: int) -> str:
        return tokenizer.decode_bytes([token]).decode("utf-8", errors="replace")

    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    tokens = [
        SampleToken(
            text=decoder.decode(tokenizer.decode_bytes([token])),
            stage=(used or settled)[i],
            top=[[(name(index), probability) for index, probability in column] for column in tops[i]],
        )
        for i, token in enumerate(new)
    ]
    return Sample(prompt, tokens, SETTLED_RULE if used is None else WAND_RULE)


def _flat(stages: Any) -> list[int]:
    """The stages of the first row as a plain list: a tensor, a list, or a list of rows."""
    values = stages.tolist() if hasattr(stages, "tolist") else list(stages)
    return list(values[0]) if values and isinstance(values[0], (list, tuple)) else [int(v) for v in values]


def _experts_at(
    model: Any, ids: torch.Tensor, first: int, experts: int, top: int, new: list[int]
) -> tuple[list[list[list[tuple[int, float]]]], list[int]]:
    """Top tokens per position and predictor, and the expert at which each emitted token was settled."""
    states, _, _ = boundary_states(model, ids, final=False)
    total: torch.Tensor | None = None
    columns, winners = [], []
    for k in range(experts):
        logits = model.stage_logits(k, states[k][:, first:])[0]  # (N, V)
        total = logits if total is None else total + logits
        columns.append(logits.softmax(-1).topk(top, dim=-1))
        winners.append(total.argmax(-1))
    assert total is not None
    columns.append((total / experts).softmax(-1).topk(top, dim=-1))
    tops = [
        [list(zip(c.indices[i].tolist(), c.values[i].tolist(), strict=True)) for c in columns] for i in range(len(new))
    ]
    settled = []
    for i, token in enumerate(new):
        stage = experts - 1
        while stage > 0 and int(winners[stage - 1][i]) == token:
            stage -= 1
        settled.append(stage)
    return tops, settled
