"""Tuning: the fastest lossless mode of one model on one machine, predicted by a cost model and then measured.

Design choices:
- What is measured: milliseconds of every stage at several numbers of new positions, of the heads, of a round's
  bookkeeping; and, on the full model's own greedy text, where each drafter agrees with it. Costs are timed on a real
  cache in interleaved repeats, medians taken. `cost_model` turns them into predictions.
- What is stored was measured as well: the fastest by prediction runs beside full before it is believed.
- The result is elastic.json in the model folder, which mode auto reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

from stagewise.calibration.cost_model import LENGTHS, Costs, Trace, candidates, choose
from stagewise.modeling.decoding import Decoder
from stagewise.modeling.frontier import FrontierCache
from stagewise.modeling.packed import pack
from stagewise.modeling.pooling import pool
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import ELASTIC_FILE, Strategy

WIDTHS = (1, 2, 3, 4, 5, 6, 7, 9)  # positions of a verification: drafts and one more


# -- measuring


def draft_settings(config: Any) -> list[tuple[int, int]]:
    """(draft stage, number of drafting experts) worth trying: every stage below the target's, alone and as a prefix."""
    if config.poe_mode == "none":
        return []
    stages = range(config.num_stages - (0 if config.is_specialist else 1))
    return [(k, 1) for k in stages] + [(k, k + 1) for k in stages if k > 0]


@torch.no_grad()
def agreement_traces(
    model: Any, prompts: Sequence[list[int]], texts: Sequence[list[int]], chunk: int = 256
) -> tuple[dict[tuple[int, int], list[Trace]], list[list[float]]]:
    """Where every drafter names the token of the full model's greedy `texts`, and the first expert's margins."""
    settings = draft_settings(model.config)
    agreement: dict[tuple[int, int], list[Trace]] = {key: [] for key in settings}
    margins: list[list[float]] = []
    if not settings:
        return agreement, margins
    experts = max(k for k, _ in settings) + 1
    for prompt, text in zip(prompts, texts, strict=True):
        ids = torch.tensor([[*prompt, *text[:-1]]], device=model.device)
        states, _ = model.run_path(model.stage_inputs(ids, path=model.default_path), experts)
        first = len(prompt) - 1
        found: dict[tuple[int, int], list[bool]] = {key: [] for key in settings}
        margin: list[float] = []
        for start in range(0, len(text), chunk):
            target = torch.tensor(text[start : start + chunk], device=model.device)
            part = slice(first + start, first + start + len(target))
            logits = [model.stage_logits(k, states[k][:, part])[0] for k in range(experts)]
            for k, drafters in settings:
                scores = pool(logits[k + 1 - drafters : k + 1])
                found[k, drafters] += (scores.argmax(-1) == target).tolist()
            top = logits[0].topk(2, dim=-1).values
            margin += (top[:, 0] - top[:, 1]).tolist()
        for key, agree in found.items():
            agreement[key].append(Trace(agree, [True] * len(agree)))
        margins.append(margin)
    return agreement, margins


def clock(model: Any) -> float:
    """Milliseconds, after everything asked of the device is done."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return 1000 * time.perf_counter()


@torch.no_grad()
def measure_costs(
    model: Any,
    rows: Sequence[list[int]],
    *,
    widths: Sequence[int] = WIDTHS,
    repeats: int = 7,
    step: Callable[[int], None] | None = None,
) -> Costs:
    """Time stages and heads on a cache that holds all but the last max(widths) ids of `rows`, one repeat after another.

    Costs without `overhead`, which only a whole decode shows.
    """
    path, config = model.default_path, model.config
    depth, experts = len(model.path_stages(path)), 0 if config.poe_mode == "none" else config.num_stages
    final = path != "base" or experts == 0
    cache = FrontierCache(model, len(rows), paths=(path,), retain_all=True)
    longest = max(widths)
    if min(map(len, rows)) <= longest:
        raise ValueError(f"texts of {min(map(len, rows))} tokens are too short to time {longest} positions on")
    cache.extend([r[:-longest] for r in rows])
    for k in range(depth):
        cache.advance(k, path=path)
    start = cache.lengths()
    stages: list[dict[int, list[float]]] = [{n: [] for n in widths} for _ in range(depth)]
    heads: dict[int, dict[int, list[float]]] = {c: {n: [] for n in widths} for c in range(1, experts + 1)}
    target: dict[int, list[float]] = {n: [] for n in widths} if final else {}
    for turn in range(repeats + 1):  # the first one only warms up
        for n in widths:
            began = clock(model)
            cache.extend([r[len(r) - longest : len(r) - longest + n] for r in rows])
            states: list[Tensor] = []
            tap = None
            for k in range(depth):
                output, _, _ = cache.advance(k, path=path)
                states.append(output.hidden)
                tap = output.tap
                began, spent = (now := clock(model)), now - began
                if turn:
                    stages[k][n].append(spent)
            for c in range(1, experts + 1):
                pool(model.expert_logits(list(range(c)), states[:c])).argmax(-1).tolist()
                began, spent = (now := clock(model)), now - began
                if turn:
                    heads[c][n].append(spent)
            if final:
                model.final_logits(states[-1], tap, None, path).argmax(-1).tolist()
                if turn:
                    target[n].append(clock(model) - began)
            cache.rollback(start)
        if step is not None:
            step(1)

    def medians(times: dict[int, list[float]]) -> dict[int, float]:
        return {n: median(t) for n, t in times.items()}

    return Costs([medians(s) for s in stages], {c: medians(h) for c, h in heads.items()}, medians(target))


def decode_rate(model: Any, prompts: Sequence[list[int]], strategy: Strategy, tokens: int) -> float:
    """Tokens per second after the first round, all rows together."""
    decoder = Decoder(model, prompts, strategy, SamplingParams(tokens, stop_tokens=()))
    later = 0
    for event in decoder.run():
        if event.committed and decoder.first_commit is not None:
            later += len(event.tokens)
    assert decoder.first_commit is not None
    return later / max(1e-9, decoder.seconds - decoder.first_commit)


def tune_model(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 96,
    batch: int = 1,
    repeats: int = 7,
    step: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Find the fastest lossless mode for `batch` rows at a time: what elastic.json stores.

    Returns `strategy` (fields of a Strategy), `measured` (stage, head and pass costs in ms, acceptance), predictions
    of every candidate, predicted and measured tokens/s of the chosen mode and of full, batch and dtype.
    """
    if not prompts:
        raise ValueError("prompts: at least one is needed")
    if batch < 1 or repeats < 1 or max_new_tokens < 2:
        raise ValueError("batch and repeats must be at least 1, max_new_tokens at least 2")
    say = step or (lambda what, n: None)
    config = model.config
    pack(model)
    if len(prompts) < batch:
        prompts = [prompts[i % len(prompts)] for i in range(batch)]
    groups = [list(prompts[i : i + batch]) for i in range(0, len(prompts) - batch + 1, batch)]
    prompts = [p for group in groups for p in group]
    texts: list[list[int]] = []
    for group in groups:
        decoder = Decoder(model, group, Strategy(), SamplingParams(max_new_tokens, stop_tokens=()))
        for _ in decoder.run():
            pass
        texts += decoder.result().tokens
        say("full text", 1)
    agreement, margins = agreement_traces(model, prompts, texts)
    say("agreement", 1)
    whole = [[*p, *t] for p, t in zip(groups[0], texts, strict=False)]
    room = max_new_tokens // 2  # costs at half of the text's length, the mean context
    longest = max(1, min(max(WIDTHS), min(map(len, whole)) - 1))
    widths = [n for n in WIDTHS if n <= longest]
    rows = [ids[: max(len(ids) - room, longest + 1)] for ids in whole]
    costs = measure_costs(model, rows, widths=widths, repeats=repeats, step=lambda n: say("costs", n))

    speeds: dict[Strategy, list[float]] = {}

    def measure(strategies: Sequence[Strategy], times: int) -> None:
        for turn in range(times):
            for strategy in strategies:
                rate = decode_rate(model, groups[turn % len(groups)], strategy, max_new_tokens)
                speeds.setdefault(strategy, []).append(rate)
                say(f"measuring {strategy.mode}", 1)

    full = Strategy()
    measure([full], min(3, repeats))
    costs.overhead = max(0.0, 1000 * batch / median(speeds[full]) - costs.full())
    ranked = candidates(costs, agreement, margins, config, batch, [m for m in LENGTHS if m + 1 <= longest] or [1])
    if ranked[0]["strategy"] != full:
        speeds.pop(full)
        measure([full, ranked[0]["strategy"]], max(2, min(5, repeats)))
    entry, speed, full_speed = choose(ranked, lambda strategy: median(speeds[strategy]))
    full_entry = next(e for e in ranked if e["strategy"] == full)
    experts = 0 if config.poe_mode == "none" else config.num_stages
    acceptance = [
        {"draft_stage": e["strategy"].draft_stage, "draft_prefix": e["strategy"].draft_prefix}
        | {"k_draft": e["strategy"].k_draft, "acceptance": e["acceptance"], "tokens_per_round": e["tokens_per_round"]}
        for e in ranked
        if e["strategy"].mode == "speculative"
    ]
    return {
        "strategy": asdict(entry["strategy"]),
        "predicted_tokens_per_second": entry["tokens_per_second"],
        "measured_tokens_per_second": speed,
        "full_predicted_tokens_per_second": full_entry["tokens_per_second"],
        "full_measured_tokens_per_second": full_speed,
        "measured": {
            "stage_ms": costs.stages,
            "head_ms": costs.heads,
            "final_head_ms": costs.target,
            "round_overhead_ms": costs.overhead,
            "pass_costs": [costs.pass_costs(k) for k in range(experts - (0 if config.is_specialist else 1))],
            "draft_share": [costs.share(k) for k in range(experts - (0 if config.is_specialist else 1))],
            "acceptance": sorted(acceptance, key=lambda a: (a["draft_stage"], a["draft_prefix"], a["k_draft"])),
            "context": sum(map(len, rows)) / len(rows),
        },
        "candidates": [{**e, "strategy": asdict(e["strategy"])} for e in ranked],
        "batch": batch,
        "dtype": str(model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
    }


def store_tuning(folder: str | Path, result: dict[str, Any]) -> Path:
    """Write elastic.json into a model folder, atomically; returns its path."""
    from stagewise.evaluation.provenance import write_json

    path = Path(folder) / ELASTIC_FILE
    write_json(path, result)
    return path


# -- the command


def tune_command(
    model: str,
    *,
    prompts: Path | None = None,
    max_new_tokens: int = 96,
    batch: int = 1,
    repeats: int = 7,
    dry_run: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    device: str | None = None,
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Measure costs and acceptance here, choose the fastest lossless mode, and store it in the model folder.

    Parameters
    ----------
    model
        A model folder; a repository is measured, nothing is stored.
    prompts
        File of prompts like those to come: lines of text, or .jsonl with prompt; default: the seven prompts of the 3B
        card.
    max_new_tokens
        Tokens each prompt is continued by.
    batch
        Rows decoded together.
    repeats
        Interleaved repeats of every timing.
    dry_run
        Measure and print, store nothing.
    dtype
        Weight type to tune for; default: as stored.
    device
        Where to run; default: the accelerator where there is one.
    threads
        Processor threads to use.
    json
        A further file for the result.

    Example: stagewise tune runs/lab/model --prompts prompts.txt --dtype bfloat16
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from stagewise.calibration.audit import prompt_ids
    from stagewise.evaluation.loading import load_pair
    from stagewise.evaluation.provenance import provenance, write_json

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_pair(model, dtype, device)
    rows = prompt_ids(tokenizer, prompts)
    total = max(1, len(rows) // max(1, batch)) + 2 + repeats + 13
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("tune", total=total)
        result = tune_model(
            loaded,
            rows,
            max_new_tokens=max_new_tokens,
            batch=batch,
            repeats=repeats,
            step=lambda what, n: bar.update(task, description=what, advance=n),
        )
    result |= {"kind": "tuning", "model": model, **provenance()}
    show_tuning(result)
    if json is not None:
        write_json(json, result)
    if dry_run or not Path(model).is_dir():
        print(f"nothing stored{'' if dry_run else f': {model} is not a folder'}")
        return
    print(f"stored in {store_tuning(model, result)}; mode auto uses it")


def describe(strategy: dict[str, Any]) -> str:
    """A strategy in a few words."""
    if strategy["mode"] == "speculative":
        name = "prefix up to stage" if strategy["draft_prefix"] else "stage"
        return f"speculative, {strategy['k_draft']} drafts by {name} {strategy['draft_stage']}"
    if strategy["mode"] == "wand":
        return f"verified WAND, safety {strategy['safety']:g}"
    return str(strategy["mode"])


def show_tuning(result: dict[str, Any], most: int = 8) -> None:
    """The tables of a tuning."""
    from stagewise.evaluation.tables import show

    measured = result["measured"]
    setting = f"{result['dtype']}, batch {result['batch']}, {result['threads']} threads"
    widths = list(measured["stage_ms"][0])
    rows: list[tuple] = [(f"stage {k}", *(f"{s[n]:.3f}" for n in widths)) for k, s in enumerate(measured["stage_ms"])]
    rows += [(f"heads of {c}", *(f"{h[n]:.3f}" for n in widths)) for c, h in measured["head_ms"].items()]
    if measured["final_head_ms"]:
        rows.append(("final head", *(f"{measured['final_head_ms'][n]:.3f}" for n in widths)))
    rows += [
        (f"v(n) beyond stage {k}, f = {f:.3f}", *(f"{v.get(n, 1):.2f}" for n in widths))
        for k, (v, f) in enumerate(zip(measured["pass_costs"], measured["draft_share"], strict=True))
    ]
    show(f"{result['model']}: milliseconds by new positions a row; {setting}", ("", *map(str, widths)), rows)
    rows = [
        (
            describe(e["strategy"]),
            f"{e['acceptance']:.1%}" if e["strategy"]["mode"] != "full" else None,
            f"{e['tokens_per_round']:.2f}",
            f"{e['tokens_per_second']:.1f}",
            f"{e['speedup']:.3f}x",
        )
        for e in result["candidates"][:most]
    ]
    show("predicted, the fastest first", ("mode", "acceptance", "tokens/round", "tokens/s", "over full"), rows)
    rows = [
        ("full", result["full_predicted_tokens_per_second"], result["full_measured_tokens_per_second"]),
        (
            f"chosen: {describe(result['strategy'])}",
            result["predicted_tokens_per_second"],
            result["measured_tokens_per_second"],
        ),
    ]
    show("tokens per second", ("mode", "predicted", "measured"), [(a, f"{b:.1f}", f"{c:.1f}") for a, b, c in rows])
