"""Probe sets: the same prompts through every mode, the rank of the right answer, and how often text ends in a loop.

Design choices:
- The default set is the seven prompts of the 3B card's trajectory; a file of prompts is text with `prompt<TAB>target`
  lines or .jsonl with `prompt` and `target`. Targets are optional.
- A target's rank is that of its first token after the prompt, 1 the best: in the product of all experts against the
  shared head alone (the final path). A win is a better rank of the product.
- A text loops when it ends in three or more repetitions of the same at most 32 tokens, eight tokens or more in all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LONGEST_PERIOD, REPETITIONS, SHORTEST_LOOP = 32, 3, 8


@dataclass(frozen=True)
class Probe:
    """A prompt and the text that should follow it, if there is one."""

    prompt: str
    target: str | None = None


SEVEN_PROMPTS = (
    Probe("The capital of France is", " Paris"),
    Probe("The chemical symbol of gold is", " Au"),
    Probe("If yesterday was Friday, then tomorrow will be", " Sunday"),
    Probe("The opposite of hot is", " cold"),
    Probe("The planets of the solar system are:", " Mercury"),
    Probe("My favorite color is"),
    Probe("If 5*x + 3 = 13, then x is", " 2"),
)


def read_probes(path: str | Path) -> list[Probe]:
    """Probes of a file: `.jsonl` with prompt and target, else lines of text with an optional target after a tab."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {path}")
    probes = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not a JSON line: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get("prompt"), str) or not record["prompt"]:
                raise ValueError(f"{path}:{number}: a probe needs a text named prompt")
            probes.append(Probe(record["prompt"], record.get("target") or None))
        else:
            prompt, _, target = line.partition("\t")
            probes.append(Probe(prompt, target or None))
    if not probes:
        raise ValueError(f"prompts: {path} holds no prompt")
    return probes


def loops(tokens: Sequence[int]) -> bool:
    """Whether a text ends in repetitions of one short piece."""
    for period in range(1, min(LONGEST_PERIOD, len(tokens) // REPETITIONS) + 1):
        length = max(REPETITIONS * period, SHORTEST_LOOP)
        if len(tokens) >= length and all(tokens[-i] == tokens[-i - period] for i in range(1, length - period + 1)):
            return True
    return False


def default_modes(config: Any) -> list[str]:
    """Every mode the model has, in the short form of strategies: WAND only where bounds are stored."""
    if config.poe_mode == "none":
        return ["full"]
    modes = ["full"] + [f"prefix:{k}" for k in range(config.num_stages - 1, 0, -1)]
    modes += [f"stage:{k}" for k in range(1, config.num_stages)]
    if config.num_stages > 1:
        if config.poe_wand_p99_bounds_per_stage_head:
            modes.append("wand")
        modes.append("speculative:4")
    return modes


def target_ranks(model: Any, prompt: Sequence[int], target: int) -> dict[str, int]:
    """Rank of token `target` after `prompt` (ids with bos): `product` and `final_path` (shared head alone), 1 the
    best.
    """
    ids = torch.tensor([list(prompt)], device=model.device)
    ranks = {}
    with torch.no_grad():
        for name, mode in (("product", "aggregate"), ("final_path", "final")):
            if name == "product" and model.config.poe_mode == "none":
                continue
            scores = model(ids, output_mode=mode, path="base").logits[0, -1]  # (V,)
            if not bool(torch.isfinite(scores).all()):
                raise ValueError(f"{name} has NaN or infinite logits: the weights are damaged or training diverged")
            ranks[name] = int((scores > scores[target]).sum()) + 1
    return ranks


def compare_ranks(ranks: Sequence[dict[str, int]]) -> dict[str, Any]:
    """Mean ranks, and wins, ties and losses of the product against the shared head alone, over probes with targets."""
    both = [rank for rank in ranks if len(rank) == 2]
    summary: dict[str, Any] = {"targets": len(ranks)}
    for name in ("product", "final_path"):
        known = [rank[name] for rank in ranks if name in rank]
        if known:
            summary[f"mean_rank_{name}"] = sum(known) / len(known)
    if both:
        summary["wins"] = sum(rank["product"] < rank["final_path"] for rank in both)
        summary["ties"] = sum(rank["product"] == rank["final_path"] for rank in both)
        summary["losses"] = sum(rank["product"] > rank["final_path"] for rank in both)
    return summary


def run_probes(
    model: Any,
    tokenizer: Any,
    probes: Sequence[Probe] = SEVEN_PROMPTS,
    *,
    modes: Sequence[str] | None = None,
    max_new_tokens: int = 60,
    draft_stage: int = 0,
) -> dict[str, Any]:
    """Greedy text of every probe in every mode, target ranks, and their summary, as JSON types.

    Returns `modes`, `probes` (each with `texts` by mode: text, tokens, looped, stages_used; and `ranks` when it has a
    target) and `summary` (`ranks`, and `loop_rate` and `mean_depth` by mode).
    """
    from stagewise.modeling.decoding import decode
    from stagewise.modeling.sampling import SamplingParams
    from stagewise.modeling.strategy import Strategy

    modes = list(modes) if modes else default_modes(model.config)
    prompts = [list(tokenizer.ensure_bos(tokenizer.encode_ordinary(probe.prompt))) for probe in probes]
    rows: list[dict[str, Any]] = []
    for probe, ids in zip(probes, prompts, strict=True):
        row: dict[str, Any] = {"prompt": probe.prompt, "target": probe.target, "texts": {}}
        if probe.target is not None:
            target = tokenizer.encode_ordinary(probe.target)
            if not target:
                raise ValueError(f"the target {probe.target!r} of {probe.prompt!r} has no tokens")
            row["target_token"] = tokenizer.decode(target[:1])
            row["ranks"] = target_ranks(model, ids, target[0])
        rows.append(row)
    params = SamplingParams(max_new_tokens=max_new_tokens)
    loop_rate, depth = {}, {}
    for mode in modes:
        extra = {"draft_stage": draft_stage} if mode.startswith("speculative") else {}
        result = decode(model, prompts, Strategy.parse(mode, **extra), params)
        for row, tokens, used in zip(rows, result.tokens, result.stages_used, strict=True):
            row["texts"][mode] = {
                "text": tokenizer.decode(tokens, skip_special_tokens=True),
                "tokens": tokens,
                "looped": loops(tokens),
                "stages_used": used,
            }
        loop_rate[mode] = sum(row["texts"][mode]["looped"] for row in rows) / len(rows)
        depth[mode] = result.mean_depth
    ranks = compare_ranks([row["ranks"] for row in rows if "ranks" in row])
    summary = {"ranks": ranks, "loop_rate": loop_rate, "mean_depth": depth}
    return {"modes": modes, "max_new_tokens": max_new_tokens, "probes": rows, "summary": summary}


def grid(reports: Sequence[Mapping[str, Any]], mode: str = "full") -> list[list[str]]:
    """Texts by prompt (rows) and checkpoint (columns) in one mode."""
    prompts = [row["prompt"] for row in reports[0]["probes"]]
    return [
        [prompt, *(report["probes"][i]["texts"][mode]["text"] for report in reports)]
        for i, prompt in enumerate(prompts)
    ]
