"""`stagewise compare`: modes and models side by side, how fast each is and how much of the reference text it repeats.

The reference is the first model's full mode. Agreement is the share of the reference's text that a mode repeats before
its first difference, in bytes, so that models with different tokenizers can be compared; a lossless mode has 100%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def agreement(reference: Sequence[bytes], texts: Sequence[bytes]) -> float:
    """Share of the reference texts repeated before the first difference of each, in bytes; 1 when all are equal."""
    same = total = 0
    for a, b in zip(reference, texts, strict=True):
        total += max(len(a), len(b))
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return same / total if total else 1.0


def compare_modes(
    model: Any, tokenizer: Any, prompts: Sequence[str], modes: Sequence[str], params: Any, *, repeats: int = 1
) -> list[dict[str, Any]]:
    """Decode prompts in every mode, interleaved over `repeats`; a mode a model does not have carries an `error`.

    Returns a dict per mode: texts (bytes), tokens_per_second (median), mean_depth, acceptance, or error.
    """
    from stagewise.modeling.decoding import decode
    from stagewise.modeling.strategy import Strategy
    from stagewise.serving.generate import prompt_ids

    strategies = {mode: Strategy.parse(mode) for mode in modes}
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    found: dict[str, dict[str, Any]] = {mode: {"mode": mode} for mode in modes}
    speeds: dict[str, list[float]] = {mode: [] for mode in modes}
    for _ in range(repeats):
        for mode, strategy in strategies.items():
            if "error" in found[mode]:
                continue
            try:
                result = decode(model, ids, strategy, params, tokenizer=tokenizer)
            except ValueError as error:
                found[mode]["error"] = str(error)
                continue
            speeds[mode].append(result.tokens_per_second)
            found[mode] |= {
                "texts": [tokenizer.decode_bytes(tokens, skip_special_tokens=True) for tokens in result.tokens],
                "mean_depth": result.mean_depth,
                "stages": len(result.stage_runs),
                "acceptance": result.acceptance if result.drafted else None,
            }
    for mode, entry in found.items():
        if "error" not in entry:
            entry["tokens_per_second"] = median(speeds[mode])
    return list(found.values())


def default_modes(config: Any) -> list[str]:
    """full, every shorter prefix, WAND where bounds are stored, speculation."""
    if config.poe_mode == "none" or config.num_stages < 2:
        return ["full"]
    modes = ["full", *(f"prefix:{k}" for k in range(config.num_stages - 1, 0, -1))]
    if config.poe_wand_p99_bounds_per_stage_head:
        modes += ["wand", "wand-verified"]
    return [*modes, "speculative:4"]


def compare(
    *models: str,
    prompt: list[str] | None = None,
    prompts: Path | None = None,
    modes: list[str] | None = None,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    repeats: int = 1,
    texts: bool = True,
    dtype: Dtype | None = None,
    device: str | None = None,
    threads: int | None = None,
    json: Path | None = None,
) -> None:
    """Show modes and models side by side: speed, depth, acceptance, agreement with the first model's full mode.

    Parameters
    ----------
    models
        Model folders or repositories; the first is the reference.
    prompt
        Text to continue; may be given several times.
    prompts
        File of prompts instead.
    modes
        Modes in short form, separated by commas or given several times; default: what each model has.
    max_new_tokens
        Tokens to add at most.
    temperature
        0 is greedy; sampled modes are coupled, so that lossless ones still agree.
    seed
        Seed of sampling.
    repeats
        Interleaved repeats; speeds are medians.
    texts
        Show the texts too.
    dtype
        Weight type to load; default: as stored.
    device
        Where to run; default: the accelerator where there is one.
    threads
        Processor threads to use.
    json
        File for figures and texts.

    Example: stagewise compare runs/lab/model --prompt "The opposite of hot is" --modes full,prefix:1,speculative:4
    """
    from stagewise.evaluation.provenance import provenance, write_json
    from stagewise.evaluation.tables import show
    from stagewise.modeling.sampling import SamplingParams
    from stagewise.serving.generate import load_for_inference, read_prompts

    if not models:
        raise ValueError("name at least one model")
    if (not prompt) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    if repeats < 1:
        raise ValueError(f"repeats={repeats} must be at least 1")
    lines = list(prompt) if prompt else read_prompts(prompts)  # type: ignore[arg-type]
    params = SamplingParams(max_new_tokens, temperature=temperature, seed=seed, coupling="gumbel")
    rows: list[dict[str, Any]] = []
    reference: list[bytes] | None = None
    for path in models:
        model, tokenizer = load_for_inference(path, dtype, device, threads)
        chosen = split_modes(modes) if modes else default_modes(model.config)
        extra = reference is None and "full" not in chosen
        found = compare_modes(
            model, tokenizer, lines, ["full", *chosen] if extra else chosen, replace(params), repeats=repeats
        )
        if reference is None:
            full = next(entry for entry in found if entry["mode"] == "full")
            if "error" in full:
                raise ValueError(full["error"])
            reference = full["texts"]
        for entry in found[1:] if extra else found:
            if "texts" in entry:
                entry["agreement"] = agreement(reference, entry["texts"])
                entry["texts"] = [text.decode("utf-8", "replace") for text in entry["texts"]]
            rows.append({"model": path, **entry})
        del model
    how = "greedy" if not temperature else f"temperature {temperature:g}"
    setting = f"{len(lines)} prompts, {max_new_tokens} new tokens, {how}"
    table = [
        (
            row["model"],
            row["mode"],
            row.get("error") or f"{row['tokens_per_second']:.1f}",
            f"{row['mean_depth']:.2f} of {row['stages']}" if "mean_depth" in row else None,
            f"{row['acceptance']:.1%}" if row.get("acceptance") is not None else None,
            f"{row['agreement']:.1%}" if "agreement" in row else None,
        )
        for row in rows
    ]
    columns = ("model", "mode", "tokens/s", "depth", "acceptance", "agreement")
    show(f"{setting}; agreement with full of {models[0]}", columns, table)
    if texts:
        for i, line in enumerate(lines):
            shown = [(row["model"], row["mode"], repr(row["texts"][i])) for row in rows if "texts" in row]
            show(f"{line!r}", ("model", "mode", "text"), shown)
    if json is not None:
        result = {"kind": "comparison", "prompts": lines, "rows": rows, "max_new_tokens": max_new_tokens}
        write_json(json, {**result, "temperature": temperature, "repeats": repeats, **provenance(seed)})


def split_modes(modes: Sequence[str]) -> list[str]:
    """Modes of a list in which commas separate modes too, but not the stages of a composition."""
    found: list[str] = []
    for piece in (p.strip() for text in modes for p in text.split(",")):
        if piece.isdigit() and found and found[-1].startswith("composition:"):
            found[-1] += f",{piece}"
        elif piece:
            found.append(piece)
    return list(dict.fromkeys(found))
