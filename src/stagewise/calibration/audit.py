"""Audit of the lossless modes on one model, one machine, one dtype: is what they say what the full model says?

Design choices:
- The oracle recomputes the whole prefix for every token, uncached, one row at a time, on the plain weights, greedily.
  After a divergence it goes on from the text that was emitted, so every later position is judged as well.
- A divergence is a *tie* when arithmetic alone can explain it, else a *bug*. A decoder whose scores differ from the
  oracle's by at most d each can emit e instead of the oracle's top t only if `s(t) - s(e) <= 2 d` in the oracle's
  scores. d is measured, never with the decoder under audit: the same text is scored uncached in the audited dtype and
  in a wider one (bf16 and fp16 against fp32, fp32 against fp64), and `error = max |s_dtype - s_wide|` over positions
  and the eight highest tokens of each, the only ones between which arithmetic can choose. Hence

      bound = 2 * (error(oracle) + error(weights)),  each error at least 4 * eps(fp32 or fp64) * logit_softcap,

  where error(weights) is that of the layout decoded with: plain, packed, or packed with folded heads, whose rounding
  is one of its own. For fp64 nothing is wider: its error is that of fp32 times eps(fp64) / eps(fp32), rounding errors
  being proportional to eps.
- Emitted tokens that agree are checked too: the log-probability the decoder reports for each must lie within the same
  bound of the oracle's (*drift* beyond it is a bug), so a damaged cache is found before it changes a token.
"""

from __future__ import annotations

import copy
import hashlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from stagewise.modeling.decoding import decode
from stagewise.modeling.packed import pack, unpack
from stagewise.modeling.pooling import pool
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy

LAYOUTS = ("plain", "packed", "folded")
REMEMBERED = 8  # top tokens the oracle keeps of every position it has seen
Progress = Callable[[], None]


@dataclass
class Divergence:
    """A position at which a mode and the oracle name different tokens.

    `top2_gap` is the oracle's own between its first and second token, `emitted_gap` between its first and the emitted
    one, `bound` what numeric error can account for; all in score units (nats).
    """

    prompt: int
    position: int
    oracle_token: int
    emitted_token: int
    top2_gap: float
    emitted_gap: float
    bound: float
    verdict: str


@dataclass
class Audited:
    """One mode with one layout of the weights and one batch size, judged."""

    mode: str
    layout: str
    batch: int
    tokens: int = 0
    ties: int = 0
    bugs: int = 0
    drifts: int = 0
    largest_drift: float = 0.0
    bound: float = 0.0
    acceptance: float = 0.0
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        return "bug" if self.bugs or self.drifts else "tie" if self.ties else "equal"


# -- the oracle


def target_is_product(model: Any) -> bool:
    """Whether the full mode's target is the product of the experts (else the final path)."""
    return model.default_path == "base" and model.config.poe_mode != "none"


@torch.no_grad()
def uncached_scores(model: Any, ids: Sequence[int], first: int = 0) -> Tensor:
    """Scores (T - first, V) of the full mode after every position from `first` on, by one uncached pass."""
    inputs = model.stage_inputs(torch.tensor([list(ids)], device=model.device), path=model.default_path)
    states, tap = model.run_path(inputs)
    if target_is_product(model):
        return pool([model.stage_logits(k, states[k][:, first:])[0] for k in range(model.config.num_stages)])
    return model.final_logits(states[-1][:, first:], None if tap is None else tap[:, first:])[0]


class Oracle:
    """Recomputes every prefix from scratch and remembers a little of what it found.

    `at(ids)` returns (top tokens, their scores, logsumexp) of the full mode after `ids`.
    """

    def __init__(self, model: Any, progress: Progress | None = None):
        self.model, self.progress = model, progress
        self.known: dict[bytes, tuple[list[int], list[float], float]] = {}

    def scores(self, ids: Sequence[int]) -> Tensor:
        return uncached_scores(self.model, ids, len(ids) - 1)[0].double()

    def at(self, ids: Sequence[int]) -> tuple[list[int], list[float], float]:
        key = hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()
        found = self.known.get(key)
        if found is None:
            scores = self.scores(ids)
            if not bool(torch.isfinite(scores).all()):
                raise ValueError("the model produces NaN or infinite logits; its weights are damaged")
            top = scores.topk(min(REMEMBERED, scores.numel()))
            found = top.indices.tolist(), top.values.tolist(), float(scores.logsumexp(-1))
            self.known[key] = found
        return found

    def score_of(self, ids: Sequence[int], token: int) -> float:
        tokens, values, _ = self.at(ids)
        return values[tokens.index(token)] if token in tokens else float(self.scores(ids)[token])

    def text(self, prompt: Sequence[int], count: int) -> list[int]:
        """The oracle's own greedy text: `count` tokens after `prompt`."""
        ids = list(prompt)
        for _ in range(count):
            ids.append(self.at(ids)[0][0])
            if self.progress is not None:
                self.progress()
        return ids[len(prompt) :]


# -- the bound


def measured_error(narrow: Any, wide: Any, texts: Sequence[tuple[list[int], int]]) -> float:
    """Largest |score difference| of two models over the positions of texts (ids, first position to look at), in the
    top tokens of the second.
    """
    worst = 0.0
    for ids, first in texts:
        step = max(1, (1 << 24) // narrow.config.vocab_size)
        a, b = uncached_scores(narrow, ids, first), uncached_scores(wide, ids, first)
        for i in range(0, a.size(0), step):
            right = b[i : i + step].topk(min(REMEMBERED, b.size(-1)), dim=-1)
            left = a[i : i + step].gather(-1, right.indices)
            worst = max(worst, float((left.double() - right.values.double()).abs().max()))
    return worst


def least_error(model: Any) -> float:
    """Rounding of the scores themselves, whatever the trunk: 4 * eps * logit_softcap."""
    kind = torch.float64 if model.dtype == torch.float64 else torch.float32
    return 4 * torch.finfo(kind).eps * model.config.logit_softcap


class ErrorScale:
    """Measures `error` of a model's present weight layout against a wider copy made once (see the module)."""

    def __init__(self, model: Any, texts: Sequence[tuple[list[int], int]]):
        self.model, self.texts = model, texts
        kind = {torch.float64: torch.float32, torch.float32: torch.float64}.get(model.dtype, torch.float32)
        self.scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        if model.dtype != torch.float64:
            self.scale = 1.0
        self.other = copy.deepcopy(model).to(kind)
        self.fixed: float | None = None

    def error(self) -> float:
        if self.model.dtype == torch.float64:  # the other copy is the narrow one, its layout stays plain
            if self.fixed is None:
                self.fixed = measured_error(self.other, self.model, self.texts) * self.scale
            return max(self.fixed, least_error(self.model))
        return max(measured_error(self.model, self.other, self.texts), least_error(self.model))


# -- what is audited


def lossless_strategies(config: Any) -> dict[str, Strategy]:
    """Every lossless mode of a model: full, drafts by several stages and of several lengths, verified WAND.

    WAND takes the config's bounds where there are some; made-up margins, one of them zero, come along in any case.
    """
    found = {"full": Strategy()}
    experts = config.num_stages
    if config.poe_mode == "none" or (experts < 2 and not config.is_specialist):
        return found
    last = experts - 1 if config.is_specialist else experts - 2  # the deepest stage that can draft
    for length in (1, 4, 8):
        found[f"speculative:{length} from stage 0"] = Strategy("speculative", k_draft=length)
    if last > 0:
        found[f"speculative:3 from stage {last}"] = Strategy("speculative", draft_stage=last, k_draft=3)
        found[f"speculative:5 from prefix {last + 1}"] = Strategy(
            "speculative", draft_stage=last, draft_prefix=True, k_draft=5
        )
    found["speculative:6, confident"] = Strategy("speculative", k_draft=6, draft_confidence=0.3)
    if config.poe_wand_p99_bounds_per_stage_head and experts > 1:
        found["wand-verified"] = Strategy("wand", verified=True)
        found["wand-verified, safety 0.25"] = Strategy("wand", verified=True, safety=0.25)
    if experts > 1:
        for margin in (1.0, 0.0):
            margins = (margin,) * (experts - 1)
            found[f"wand-verified, margin {margin:g}"] = Strategy("wand", verified=True, thresholds=margins)
    return found


@contextmanager
def layout(model: Any, name: str) -> Iterator[None]:
    """The model with its weights plain, packed, or packed with folded heads, for the time of the block."""
    unpack(model)
    if name != "plain":
        pack(model, fold=name == "folded")
    try:
        yield
    finally:
        unpack(model)


def judge(
    oracle: Oracle,
    prompts: Sequence[list[int]],
    texts: Sequence[list[int]],
    logprobs: Sequence[list[float]],
    bound: float,
    record: Audited,
) -> Audited:
    """Compare texts, position by position, with what the oracle says after the same ids; fills and returns `record`."""
    record.bound = bound
    for p, (prompt, text, logp) in enumerate(zip(prompts, texts, logprobs, strict=True)):
        ids = list(prompt)
        for position, token in enumerate(text):
            tokens, values, total = oracle.at(ids)
            score = oracle.score_of(ids, token)
            gap = values[0] - score
            record.tokens += 1
            drift = abs(logp[position] - (score - total))
            record.largest_drift = max(record.largest_drift, drift)
            record.drifts += not drift <= bound
            if token != tokens[0]:
                verdict = "tie" if gap <= bound else "bug"
                record.ties += verdict == "tie"
                record.bugs += verdict == "bug"
                record.divergences.append(
                    Divergence(p, position, tokens[0], token, values[0] - values[1], gap, bound, verdict)
                )
            ids.append(token)
    return record


def audit_model(
    model: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 64,
    max_batch: int = 8,
    strategies: dict[str, Strategy] | None = None,
    layouts: Sequence[str] = LAYOUTS,
    step: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Audit a model on prompts (ids with bos), greedily, stop tokens off.

    Every strategy decodes in ragged batches of `max_batch` with each weight layout, and row by row with the last of
    them (folded heads are what generation uses). Returns `errors` and `bounds` per layout, `runs` (as `Audited`, with
    `verdict`) and the overall `verdict`: equal, tie or bug. `step(what, n)` is told of progress.
    """
    if not prompts:
        raise ValueError("prompts: at least one is needed")
    context = model.config.max_position_embeddings
    for i, ids in enumerate(prompts):
        if len(ids) + max_new_tokens > context:
            raise ValueError(f"prompt {i}: {len(ids)} tokens and max_new_tokens={max_new_tokens} exceed {context}")
    strategies = lossless_strategies(model.config) if strategies is None else strategies
    say = step or (lambda what, n: None)
    unpack(model)
    oracle = Oracle(model, lambda: say("oracle", 1))
    reference = [oracle.text(p, max_new_tokens) for p in prompts]
    scale = ErrorScale(model, [([*p, *t], len(p) - 1) for p, t in zip(prompts, reference, strict=True)])
    params = SamplingParams(max_new_tokens, stop_tokens=(), logprobs=True)
    oracle_error = scale.error()
    errors: dict[str, float] = {}
    pending: list[tuple[Audited, list[list[int]], list[list[float]]]] = []
    for name in layouts:
        with layout(model, name):
            errors[name] = scale.error()
            batches = [max_batch] + ([1] if name == layouts[-1] and len(prompts) > 1 and max_batch > 1 else [])
            for batch in batches:
                for mode, strategy in strategies.items():
                    result = decode(model, prompts, strategy, params, max_batch=batch)
                    record = Audited(mode, name, min(batch, len(prompts)), acceptance=result.acceptance)
                    pending.append((record, result.tokens, result.logprobs or []))
                    say(f"{mode}, {name}", sum(map(len, result.tokens)))
    bounds = {name: 2 * (oracle_error + error) for name, error in errors.items()}
    runs = []
    for record, texts, logprobs in pending:
        judge(oracle, prompts, texts, logprobs, bounds[record.layout], record)
        runs.append({**asdict(record), "verdict": record.verdict})
        say("judging", record.tokens)
    verdicts = {run["verdict"] for run in runs}
    return {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "fp32_attention": bool(model.config.fp32_attention),
        "oracle_error": oracle_error,
        "errors": errors,
        "bounds": bounds,
        "positions_recomputed": len(oracle.known),
        "runs": runs,
        "verdict": next(v for v in ("bug", "tie", "equal") if v in verdicts),
    }


# -- the command


def prompt_ids(tokenizer: Any, path: Path | None) -> list[list[int]]:
    """Ids of the prompts in a file (lines, or .jsonl with prompt), else of the seven card prompts; one bos each."""
    from stagewise.evaluation.probes import SEVEN_PROMPTS, read_probes

    probes = SEVEN_PROMPTS if path is None else read_probes(path)
    return [tokenizer.ensure_bos(tokenizer(probe.prompt)["input_ids"]) for probe in probes]


def audit_command(
    model: str,
    *,
    prompts: Path | None = None,
    max_new_tokens: int = 64,
    max_batch: int = 8,
    dtype: Literal["float32", "bfloat16", "float16", "float64"] | None = None,
    fp32_attention: bool = False,
    device: str | None = None,
    threads: int | None = None,
    json: Path | None = None,
) -> int:
    """Check every lossless mode against an uncached oracle; exit status 1 when one of them loses something.

    Parameters
    ----------
    model
        A model folder or repository.
    prompts
        File of prompts: lines of text, or .jsonl with prompt; default: the seven prompts of the 3B card.
    max_new_tokens
        Tokens each prompt is continued by.
    max_batch
        Rows decoded together.
    dtype
        Weight type to audit; default: as stored.
    fp32_attention
        Attend in fp32 whatever the weight type.
    device
        Where to run; default: the accelerator where there is one.
    threads
        Processor threads to use.
    json
        File for bounds, runs and divergences.

    Example: stagewise audit runs/lab/model --prompts prompts.txt --dtype bfloat16 --json audit.json
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from stagewise.evaluation.loading import load_pair
    from stagewise.evaluation.provenance import provenance, write_json

    if max_new_tokens < 1 or max_batch < 1:
        raise ValueError("max_new_tokens and max_batch must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    loaded, tokenizer = load_pair(model, dtype, device)
    loaded.config.fp32_attention = fp32_attention or loaded.config.fp32_attention
    rows = prompt_ids(tokenizer, prompts)
    strategies = lossless_strategies(loaded.config)
    decoded = len(strategies) * (len(LAYOUTS) + (len(rows) > 1 and max_batch > 1))
    total = (1 + 2 * decoded) * len(rows) * max_new_tokens
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, transient=True) as bar:
        task = bar.add_task("audit", total=total)
        result = audit_model(
            loaded,
            rows,
            max_new_tokens=max_new_tokens,
            max_batch=max_batch,
            strategies=strategies,
            step=lambda what, n: bar.update(task, description=what, advance=n),
        )
    result = {"kind": "audit", "model": model, **result, **provenance()}
    show_audit(result, tokenizer)
    if json is not None:
        write_json(json, result)
    return 1 if result["verdict"] == "bug" else 0


def show_audit(result: dict[str, Any], tokenizer: Any = None, most: int = 12) -> None:
    """The table of an audit, and its first divergences, bugs before ties."""
    from stagewise.evaluation.tables import show

    rows: list[tuple] = [
        (
            run["mode"],
            run["layout"],
            run["batch"],
            run["tokens"],
            run["ties"],
            run["bugs"],
            f"{run['largest_drift']:.2e}",
            f"{run['bound']:.2e}",
            run["verdict"],
        )
        for run in result["runs"]
    ]
    columns = ("mode", "weights", "batch", "tokens", "ties", "bugs", "largest drift", "bound", "verdict")
    title = f"{result['model']}: {result['prompts']} prompts, {result['dtype']}, against the uncached oracle; nats"
    show(title, columns, rows)

    def name(token: int) -> str:
        return str(token) if tokenizer is None else f"{token} {tokenizer.decode([token])!r}"

    events = [(run, d) for run in result["runs"] for d in run["divergences"]]
    events.sort(key=lambda e: (e[1]["verdict"] != "bug", -e[1]["emitted_gap"]))
    if events:
        found = [
            (
                f"{run['mode']}, {run['layout']}",
                d["prompt"],
                d["position"],
                name(d["oracle_token"]),
                name(d["emitted_token"]),
                f"{d['top2_gap']:.2e}",
                f"{d['emitted_gap']:.2e}",
                d["verdict"],
            )
            for run, d in events[:most]
        ]
        names = ("run", "prompt", "position", "oracle", "emitted", "top-2 gap", "gap to emitted", "verdict")
        show(f"divergences, {len(found)} of {len(events)}", names, found)
    words = {
        "equal": "every token equals the oracle's",
        "tie": "every divergence is a tie: the oracle's own gap is within this dtype's numeric error",
        "bug": "a lossless mode lost something: divergences or drift beyond numeric error",
    }
    print(words[result["verdict"]])
