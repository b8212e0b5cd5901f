"""The whole calibration of a model: bounds, routing, acceptance and certificate, on text it has not seen.

Design choices:
- Two disjoint sets of documents: every eighth for prompts, the rest for bounds and routing, so that the certificate is
  not tested on what set its bounds. Where documents are few, one gives several prompts: the certificate says how many
  documents stand behind its prompts.
- One pass over the text and one over the full product's own continuations; everything else is counting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from stagewise.calibration.certificate import LOSSES, certify
from stagewise.calibration.exits import exit_statistics, require_experts
from stagewise.calibration.routing import DEFAULT_CAPS, routing_probe
from stagewise.calibration.speculation import DEFAULT_LENGTHS, acceptance_table
from stagewise.calibration.wand_bounds import MINIMUM_TOKENS, check_enough, exit_report, wand_bounds
from stagewise.evaluation.inspection import Costs
from stagewise.evaluation.loading import load_pair, progress_bar
from stagewise.evaluation.provenance import provenance
from stagewise.evaluation.rows import Batch, document_batches, manifest, pad_rows
from stagewise.evaluation.sources import evaluation_texts
from stagewise.modeling.decoding import decode
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy

PROMPT_EVERY = 8  # one document in so many is kept for prompts


def split_documents(
    texts: Iterable[str], encode: Callable[[str], list[int]], tokens: int, prompts: int, prompt_tokens: int
) -> tuple[list[tuple[str, list[int]]], list[tuple[str, list[int]]]]:
    """Documents (text, ids) for prompts and for measuring, disjoint.

    Reads until `tokens` tokens are there to measure on and `prompts` documents to take prompts from, or all is read.
    Prompt documents hold `prompt_tokens` tokens at least.
    """
    for_prompts: list[tuple[str, list[int]]] = []
    measured: list[tuple[str, list[int]]] = []
    total = 0
    for number, text in enumerate(texts, 1):
        ids = encode(text)
        turn = total >= tokens or number % PROMPT_EVERY == 0
        if turn and len(ids) >= prompt_tokens and len(for_prompts) < prompts:
            for_prompts.append((text, ids))
        elif ids and total < tokens:
            measured.append((text, ids))
            total += len(ids)
        if total >= tokens and len(for_prompts) >= prompts:
            break
    return for_prompts, measured


def draw_prompts(documents: list[list[int]], prompts: int, prompt_tokens: int, seed: int) -> list[list[int]]:
    """Prompts of `prompt_tokens` ids at random places, no two overlapping, spread evenly over the documents.

    Fewer than `prompts` when the documents are too short for that many.
    """
    generator = torch.Generator().manual_seed(seed)
    places = []  # per document, the starts of its windows in random order
    for ids in documents:
        count = len(ids) // prompt_tokens
        slack = int(torch.randint(0, len(ids) - count * prompt_tokens + 1, (1,), generator=generator))
        order = torch.randperm(count, generator=generator).tolist()
        places.append([slack + i * prompt_tokens for i in order])
    drawn: list[list[int]] = []
    for turn in range(max(map(len, places), default=0)):
        for ids, starts in zip(documents, places, strict=True):
            if turn < len(starts) and len(drawn) < prompts:
                drawn.append(ids[starts[turn] : starts[turn] + prompt_tokens])
    return drawn


def numbered(batches: Iterable[Batch], progress: Callable[[int], None]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows with a number each, which makes every row a text of its own; `progress` hears the tokens done."""
    done = number = 0
    for batch in batches:
        count = batch.inputs.shape[0]
        yield batch.inputs, batch.targets, torch.arange(number, number + count)
        number += count
        done += int((batch.targets != -1).sum())
        progress(done)


def greedy_continuations(
    model: Any, prompts: list[list[int]], new_tokens: int, *, batch_rows: int = 16
) -> list[tuple[list[int], list[int]]]:
    """Rows (inputs, targets) of each prompt and the full product's own greedy text of exactly `new_tokens`."""
    params = SamplingParams(max_new_tokens=new_tokens, stop_tokens=())
    result = decode(model, prompts, Strategy("full", path="base"), params, max_batch=batch_rows)
    rows = []
    for prompt, new in zip(prompts, result.tokens, strict=True):
        stream = prompt + new
        rows.append((stream[:-1], [-1] * (len(prompt) - 1) + new))
    return rows


def calibrate_model(
    path: str,
    data: list[str] | None = None,
    tokens: int = MINIMUM_TOKENS,
    *,
    allow_fewer_tokens: bool = False,
    caps: list[float] | None = None,
    draft_lengths: list[int] | None = None,
    prompts: int = 256,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    epsilon: float = 0.05,
    delta: float = 0.05,
    loss: str = "text",
    seed: int = 0,
    batch_tokens: int = 8192,
    dtype: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Measure everything an elastic decoder asks of a model: what `stagewise calibrate` writes as calibration.json.

    Bounds, exit shares and the routing probe are measured on `tokens` tokens of text; acceptance and the certificate on
    the full product's greedy continuations of `prompts` other documents, which the bounds have not seen. Returns
    `p99_bounds`, `exits`, `routing`, `speculation` (on continuations, and on text), `certificate` (or
    `no_certificate`, the reason), counts, manifests and provenance.
    """
    minimum = 1 if allow_fewer_tokens else MINIMUM_TOKENS
    if tokens < minimum:
        check_enough(tokens, minimum)
    for name, value in (("prompts", prompts), ("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if loss not in LOSSES:
        raise ValueError(f"loss={loss!r} must be one of {', '.join(LOSSES)}")
    model, tokenizer = load_pair(path, dtype, device)
    require_experts(model)
    context, bos = int(model.config.max_position_embeddings), tokenizer.bos_token_id
    if prompt_tokens + new_tokens + 1 > context:
        raise ValueError(f"prompt_tokens + new_tokens = {prompt_tokens + new_tokens} exceed the context of {context}")
    source = evaluation_texts(data, path)
    chosen = tuple(caps) if caps else DEFAULT_CAPS
    lengths = tuple(draft_lengths) if draft_lengths else DEFAULT_LENGTHS
    early = Costs(model.config, str(model.dtype).removeprefix("torch."), 1).early_costs()

    prompt_texts, measured = split_documents(
        source.documents, tokenizer.encode_ordinary, tokens, prompts, prompt_tokens
    )
    opening = draw_prompts([ids for _, ids in prompt_texts], prompts, prompt_tokens, seed)
    documents = [ids for _, ids in measured]
    available = sum(map(len, documents))
    check_enough(available, minimum)
    if not opening:
        raise ValueError(f"no document of {prompt_tokens} tokens is left for prompts: give more text")

    with progress_bar(f"calibrating {path}", available) as bar:
        batches = document_batches(documents, bos, context, batch_tokens=batch_tokens)
        statistics = exit_statistics(model, numbered(batches, bar), tokenizer.token_byte_lengths, max_tokens=tokens)
    bounds = wand_bounds(statistics, minimum=minimum)
    result: dict[str, Any] = {
        "kind": "calibration",
        "model": path,
        "tokens": statistics.tokens,
        "p99_bounds": bounds,
        "exits": [exit_report(statistics, bounds, safety) for safety in (0.25, 0.5, 1.0, 2.0)],
        "routing": routing_probe(statistics, early[0], chosen),
        "draft_costs": early,
        "speculation_on_text": acceptance_table(statistics, early, lengths=lengths, text="validation text"),
    }
    stored = model.config.poe_wand_p99_bounds_per_stage_head
    if stored:
        result["previous_p99_bounds"] = list(stored)

    pairs = greedy_continuations(model, [[bos, *ids] for ids in opening], new_tokens)
    step = max(1, batch_tokens // (prompt_tokens + new_tokens))
    parts = []
    for start in range(0, len(pairs), step):
        inputs, targets = pad_rows(pairs[start : start + step], bos)
        parts.append((inputs, targets, torch.arange(start, start + len(inputs))))
    greedy = exit_statistics(model, parts)
    result["speculation"] = acceptance_table(greedy, early, lengths=lengths)
    try:
        result["certificate"] = certify(greedy, bounds, epsilon=epsilon, delta=delta, loss=loss)
        result["certificate"] |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "source": source.name}
        result["certificate"]["documents"] = len(prompt_texts)
    except ValueError as error:
        result["no_certificate"] = str(error)
    result["data"] = manifest(source.name, [text for text, _ in measured])
    result["prompts"] = {**manifest(source.name, [text for text, _ in prompt_texts]), "count": len(opening)}
    result["dtype"] = str(model.dtype).removeprefix("torch.")
    return {**result, **provenance(seed)}
