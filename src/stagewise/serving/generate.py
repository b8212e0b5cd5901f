"""`stagewise generate`: continue prompts in any mode, streamed to the terminal or written to a file.

Design choices:
- Prompts are read as `tokenizer(text)` reads them (special tokens are parsed); a missing <|bos|> is added, never a
  second one.
- Text goes to standard output, everything about it to standard error.
- A file of prompts is decoded in batches. Finished lines collect in OUT.part; with the same prompts and settings a
  later run goes on from there; OUT itself appears whole, in the order of the prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def load_for_inference(
    path: str, dtype: str | None = None, device: str | None = None, threads: int | None = None
) -> tuple[Any, Any]:
    """A model with packed weights, and its tokenizer; on the accelerator where there is one."""
    import torch

    from stagewise.evaluation.loading import load_pair
    from stagewise.modeling.packed import pack

    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads={threads} must be at least 1")
        torch.set_num_threads(threads)
    model, tokenizer = load_pair(path, dtype, device)
    return pack(model), tokenizer


def prompt_ids(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt with exactly one bos in front; special tokens in the text are parsed."""
    return tokenizer.ensure_bos(tokenizer(text)["input_ids"])


def read_prompts(path: Path) -> list[str]:
    """Prompts of a file: the `prompt` of every line of .jsonl, else every line that is not blank."""
    if not path.is_file():
        raise FileNotFoundError(f"prompts: no file {path}")
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            found.append(line)
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not a JSON line: {error}") from None
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise ValueError(f"{path}:{number}: a line needs a text named prompt")
        found.append(record["prompt"])
    if not found:
        raise ValueError(f"prompts: {path} holds no prompt")
    return found


def summary(result: Any, stages: int) -> str:
    """One line about a result: speed, depth, acceptance."""
    count = sum(map(len, result.tokens))
    parts = [f"{count} tokens in {result.seconds:.2f} s", f"{result.tokens_per_second:.1f} tokens/s after the first"]
    parts.append(f"mean depth {result.mean_depth:.2f} of {stages} stages")
    if result.drafted:
        parts.append(f"acceptance {result.acceptance:.1%} ({result.accepted} of {result.drafted} drafts)")
    return ", ".join(parts)


def stream_text(model: Any, tokenizer: Any, ids: list[int], strategy: Any, params: Any, screen: Any) -> Any:
    """Decode one row onto a screen; returns the Result. Raises ValueError when the row cannot be decoded."""
    from stagewise.modeling.decoding import Decoder

    decoder = Decoder(model, [ids], strategy, params, tokenizer)
    for event in decoder.run():
        if event.committed:
            screen.commit(event.tokens, event.stages)
        else:
            screen.draft(event.tokens)
    screen.finish()
    result = decoder.result()
    if result.errors[0] is not None:
        raise ValueError(result.errors[0])
    return result


# -- files of prompts


class Ledger:
    """Finished lines of a run over a file: OUT.part while it grows, OUT once it is whole.

    Args:
        out: the file to end up with. settings: what determines the lines; others' remains are not gone on from.
    """

    def __init__(self, out: Path, settings: dict[str, Any], overwrite: bool = False):
        self.out, self.part = out, out.with_name(out.name + ".part")
        if out.exists() and not overwrite:
            raise FileExistsError(f"{out} exists; choose another --out or pass --overwrite")
        if not out.parent.is_dir():
            raise FileNotFoundError(f"out: no folder {out.parent}")
        self.key = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
        self.lines: dict[int, list[dict[str, Any]]] = {}
        self._read()
        temporary = self.part.with_name(f".{self.part.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"settings": self.key}) + "\n")
            for index, rows in self.lines.items():
                file.write(json.dumps({"index": index, "rows": rows}, ensure_ascii=False) + "\n")
        os.replace(temporary, self.part)

    def _read(self) -> None:
        if not self.part.is_file():
            return
        lines = self.part.read_text(encoding="utf-8", errors="replace").splitlines()
        try:
            if json.loads(lines[0])["settings"] != self.key:
                return
            for line in lines[1:]:
                record = json.loads(line)
                self.lines[record["index"]] = record["rows"]
        except (ValueError, KeyError, IndexError):  # the last line of a killed run
            return

    def add(self, finished: dict[int, list[dict[str, Any]]]) -> None:
        """Keep the rows of some prompts."""
        with self.part.open("a", encoding="utf-8") as file:
            for index, rows in finished.items():
                file.write(json.dumps({"index": index, "rows": rows}, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines.update(finished)

    def close(self) -> None:
        """Write OUT whole, in order, and forget OUT.part."""
        temporary = self.out.with_name(f".{self.out.name}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            for index in sorted(self.lines):
                for row in self.lines[index]:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        os.replace(temporary, self.out)
        self.part.unlink(missing_ok=True)


def decode_file(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    strategy: Any,
    params: Any,
    ledger: Ledger,
    max_batch: int,
) -> Iterator[tuple[int, Any]]:
    """Decode what the ledger lacks, batch by batch; yields (prompts done, Result). A row's error is its line's."""
    from dataclasses import replace

    from stagewise.modeling.decoding import decode

    open_prompts = [i for i in range(len(prompts)) if i not in ledger.lines]
    n = params.n
    for first in range(0, len(open_prompts), max_batch):
        batch = open_prompts[first : first + max_batch]
        chosen = params
        if params.seed is not None:  # a row keeps its seed whatever was done before
            chosen = replace(params, seed=[params.seed + i * n + s for i in batch for s in range(n)])
        ids = [prompt_ids(tokenizer, prompts[i]) for i in batch]
        result = decode(model, ids, strategy, chosen, tokenizer=tokenizer, raise_errors=False)
        finished: dict[int, list[dict[str, Any]]] = {}
        for r, (tokens, used) in enumerate(zip(result.tokens, result.stages_used, strict=True)):
            index = batch[r // n]
            row: dict[str, Any] = {"index": index, "prompt": prompts[index]}
            if n > 1:
                row["sample"] = r % n
            row["text"] = tokenizer.decode_bytes(tokens, skip_special_tokens=True).decode("utf-8", "replace")
            row |= {"tokens": tokens, "stages_used": used, "finish": result.finish[r], "error": result.errors[r]}
            if result.logprobs is not None:
                row["logprobs"] = result.logprobs[r]
            finished.setdefault(index, []).append(row)
        ledger.add(finished)
        yield len(ledger.lines), result


def generate_file(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    strategy: Any,
    params: Any,
    out: Path,
    *,
    max_batch: int = 8,
    name: str = "",
    overwrite: bool = False,
) -> int:
    """Decode a list of prompts into a .jsonl file, with progress; returns how many lines carry an error."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if max_batch < 1:
        raise ValueError(f"max_batch={max_batch} must be at least 1")
    settings = {
        "model": name,
        "dtype": str(model.dtype),
        "strategy": asdict(strategy),
        "params": asdict(params),
        "prompts": list(prompts),
    }
    ledger = Ledger(out, settings, overwrite)
    kept, done, seconds = len(ledger.lines), 0, 0.0
    bars = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*bars, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=len(prompts), completed=kept)
        for finished, result in decode_file(model, tokenizer, prompts, strategy, params, ledger, max_batch):
            progress.update(task, completed=finished)
            done += sum(map(len, result.tokens))
            seconds += result.seconds
    errors = sum(row["error"] is not None for rows in ledger.lines.values() for row in rows)
    ledger.close()
    speed = f", {done} tokens at {done / seconds:.1f} tokens/s with prefill" if seconds else ""
    before = f", {kept} of them finished before" if kept else ""
    print(f"{out}: {len(prompts)} prompts{before}{speed}; {errors} errors", file=sys.stderr)
    return errors


# -- the command


def generate(
    model: str,
    *,
    prompt: str | None = None,
    prompts: Path | None = None,
    out: Path | None = None,
    mode: str = "auto",
    max_new_tokens: int = 128,
    draft_stage: int = 0,
    draft_prefix: bool = False,
    draft_confidence: float = 0.0,
    safety: float | None = None,
    bounds: list[float] | None = None,
    certificate: Path | None = None,
    max_pending: int = 8,
    stage_weights: list[float] | None = None,
    head_mode: Literal["dual", "base", "spec"] | None = None,
    specialist: str | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int | None = None,
    coupling: Literal["sample", "gumbel"] = "sample",
    n: int = 1,
    stop: list[str] | None = None,
    ignore_eos: bool = False,
    logprobs: bool = False,
    show_stages: bool = False,
    max_batch: int = 8,
    overwrite: bool = False,
    dtype: Dtype | None = None,
    device: str | None = None,
    threads: int | None = None,
) -> None:
    """Continue a prompt, at any depth, in any mode; or a file of prompts.

    Parameters
    ----------
    model
        A model folder or repository.
    prompt
        Text to continue.
    prompts
        File of prompts: lines of text, or .jsonl with prompt; needs --out.
    out
        File of results, one JSON line a prompt; a run that was stopped goes on where it was.
    mode
        full, prefix:2, stage:0, composition:0,2, wand, wand-verified, speculative:4, or auto: what tune found, else
        full.
    max_new_tokens
        Tokens to add at most.
    draft_stage
        Stage that drafts in speculative modes.
    draft_prefix
        Draft with the product of the stages up to the draft stage.
    draft_confidence
        End a draft once the drafter's top probability falls below it.
    safety
        Factor on the exit bounds of wand; 1 unless given.
    bounds
        Exit bounds of wand in nats, one per boundary; default: the config's.
    certificate
        A certificate whose margins wand uses instead of safety and bounds.
    max_pending
        Provisional tokens of wand-verified.
    stage_weights
        Weights of a composition's stages.
    head_mode
        Heads of a specialist: dual, base or spec.
    specialist
        NAME=PATH of a specialist to attach to the base and use.
    temperature
        0 is greedy.
    top_k
        Sample among so many tokens; 0 is off.
    top_p
        Sample among the most probable tokens with this probability together.
    min_p
        Sample among tokens with this share of the top probability.
    repetition_penalty
        Penalty on tokens seen before; 1 is off.
    seed
        Seed of sampling; row r uses seed + r.
    coupling
        sample, or gumbel: the same text from the same seed in every lossless mode.
    n
        Samples a prompt.
    stop
        Strings that end the text.
    ignore_eos
        Do not stop at end-of-text tokens.
    logprobs
        Record the log-probability of every token (with --out).
    show_stages
        Colour tokens by the stage that emitted them.
    max_batch
        Prompts decoded together.
    overwrite
        Replace an existing --out.
    dtype
        Weight type to load; default: as stored.
    device
        Where to run; default: the accelerator where there is one.
    threads
        Processor threads to use.

    Example: stagewise generate runs/lab/model --prompt "The capital of France is" --mode speculative:4 --show-stages
    """
    from dataclasses import replace

    from stagewise.modeling.decoding import decode
    from stagewise.modeling.generation import certified_thresholds
    from stagewise.modeling.sampling import SamplingParams
    from stagewise.modeling.strategy import Strategy
    from stagewise.serving.screen import Screen, stage_legend

    if (prompt is None) == (prompts is None):
        raise ValueError("give either --prompt TEXT or --prompts FILE")
    if (prompts is None) != (out is None):
        raise ValueError("--prompts and --out go together")
    settings: dict[str, Any] = {"draft_stage": draft_stage, "draft_prefix": draft_prefix, "max_pending": max_pending}
    settings |= {"draft_confidence": draft_confidence, "head_mode": head_mode}
    if bounds is not None:
        settings["p99_bounds"] = tuple(bounds)
    if certificate is not None:
        settings["thresholds"] = certified_thresholds(certificate)
    if stage_weights is not None:
        settings["weights"] = tuple(stage_weights)
    strategy = Strategy.parse(mode, **settings)
    if safety is not None:
        strategy = replace(strategy, safety=safety)
    params = SamplingParams(
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        coupling=coupling,
        n=n,
        stop_strings=tuple(stop or ()),
        stop_tokens=() if ignore_eos else None,
        logprobs=logprobs,
    )
    texts = None if prompts is None else read_prompts(prompts)
    loaded, tokenizer = load_for_inference(model, dtype, device, threads)
    if specialist is not None:
        strategy = replace(strategy, path=attach_specialist(loaded, specialist))
    strategy = strategy.resolve(loaded)
    if texts is not None and out is not None:
        generate_file(
            loaded, tokenizer, texts, strategy, params, out, max_batch=max_batch, name=model, overwrite=overwrite
        )
        return
    assert prompt is not None
    ids = prompt_ids(tokenizer, prompt)
    terminal = sys.stdout.isatty()

    def token_bytes(tokens: list[int]) -> bytes:
        return tokenizer.decode_bytes(tokens, skip_special_tokens=True)

    if n == 1:
        screen = Screen(sys.stdout, token_bytes, terminal, show_stages)
        result = stream_text(loaded, tokenizer, ids, strategy, params, screen)
    else:
        result = decode(loaded, [ids], strategy, params, tokenizer=tokenizer)
        for i, (tokens, used) in enumerate(zip(result.tokens, result.stages_used, strict=True)):
            print(f"--- sample {i}")
            screen = Screen(sys.stdout, token_bytes, terminal, show_stages)
            screen.commit(tokens, used)
            screen.finish()
    count = len(result.stage_runs)
    if show_stages:
        print(stage_legend(result.stages_used, count, sys.stderr.isatty()), file=sys.stderr)
    how = strategy.mode if mode != "auto" else f"auto: {strategy.mode}"
    print(f"{how}: {summary(result, count)}", file=sys.stderr)


def attach_specialist(model: Any, text: str) -> str:
    """Attach NAME=PATH to a base and return NAME."""
    from stagewise.modeling.packed import pack

    name, sign, path = text.partition("=")
    if not sign or not name or not path:
        raise ValueError(f"specialist={text!r} must have the form NAME=PATH")
    model.attach(name, path)
    pack(model)
    return name
