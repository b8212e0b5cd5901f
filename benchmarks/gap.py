"""The gap between local and end-to-end learning: every objective at equal tokens, seed and data, and ideas to close it.

Groups of runs, in this order, of tiny models built directly (no run folders):
- rates: end to end and flat at multiples of the scaled learning rates; the rest uses the multiple that suits end to
  end best, so that no staged objective gains from a rate chosen for it;
- main: end to end, flat, hier and residual Log-OP (w 0.5 and 1), shared and per-stage heads, several seeds;
- cells: the same with one seed where one thing differs: width, stage layout, corpus (`--text FILES`);
- ideas: changes that keep stages independent (no gradient of the residual stream crosses a boundary), each against
  residual Log-OP with w 0.5 and per-stage heads (see `gap_ideas.py`);
- best ideas: the best of them with the other seeds; half rate: main again at half the rate, to see whether seeds lie
  closer there; far cells: where several things differ.

    python benchmarks/gap.py --text a.txt b.txt --minutes 40 --save

Every finished run is a line of OUT/runs.jsonl; the same command goes on where it stopped. A gap is the relative
difference of bits per byte to the end-to-end model of the same corpus, width and seed. Prints tables and, as the last
line, one JSON object; `--save` also writes it under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gap_ideas import BASELINE, END_TO_END, FLAT, IDEAS, OBJECTIVES, LocalObjective, Variant, check, staged_groups
from torch import Tensor

from stagewise.data import corpus_texts, open_training_data
from stagewise.evaluation.bpb import bits_per_byte, evaluate_bpb, inference
from stagewise.evaluation.provenance import commit, hardware, provenance, write_json
from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.recipe import DataSection, Recipe, Source
from stagewise.tokenizer import train_tokenizer
from stagewise.training.cost import training_flops
from stagewise.training.objectives import Objective
from stagewise.training.optimizer import MuonAdamW, Rates, parameter_groups
from stagewise.training.precision import ComputeModel
from stagewise.training.schedule import Schedule

LAYOUTS = ([2, 2, 2, 2], [4, 2, 1, 1])
FIT_TOKENS = 2048  # fresh training tokens that product weights are fitted on
GROUPS = ("rates", "main", "cells", "ideas", "best ideas", "half rate", "far cells")
BEST_IDEAS = 4


@dataclass
class Tokens:
    """A corpus as rows for all runs: `ids` and `targets` (seeds, steps, R, T), validation and fitting rows."""

    ids: Tensor
    targets: Tensor
    validation: tuple[Tensor, Tensor]
    fitting: tuple[Tensor, Tensor]
    lengths: Tensor  # (V,) bytes of every token
    facts: dict[str, Any] = field(default_factory=dict)


def prepare(corpus: str, options: argparse.Namespace) -> Tokens:
    """Tokens of a corpus, encoded once and kept in OUT: every seed has its own block of one stream."""
    shape = [options.seeds, options.steps, options.batch // options.length, options.length, options.vocabulary]
    path = options.out / f"tokens-{corpus}-{'-'.join(map(str, shape))}.pt"
    if not path.exists():
        source = Source(name=corpus, kind="embedded") if corpus == "embedded" else Source(
            name=corpus, kind="text", path=[str(one) for one in options.text]
        )  # fmt: skip
        section = DataSection(sources=[source], validation_fraction=0.08)
        tokenizer = train_tokenizer(corpus_texts(section, options.train_bytes), options.vocabulary)
        data = open_training_data(section, tokenizer, options.length, seed=0)
        total = options.seeds * options.steps * shape[2]
        ids, targets = (rows.to(torch.int16) for rows in data.train.next_batch(total))
        facts = {
            "documents": data.manifest["train"]["documents"],
            "train_tokens": data.manifest["train"]["tokens"],
            "train_bytes": data.manifest["train"]["bytes"],
            "held_out_documents": data.manifest["validation"]["documents"],
            "content_sha256": data.manifest["sources"][0]["content_sha256"],
            "epochs_of_all_seeds": data.report()["sources"][0]["epochs"],
        }
        tokens = {
            "ids": ids.view(*shape[:4]),
            "targets": targets.view(*shape[:4]),
            "validation": data.validation_rows(options.eval_tokens),
            "fitting": data.train.next_batch(FIT_TOKENS // options.length),
            "lengths": tokenizer.token_byte_lengths,
            "facts": facts,
        }
        options.out.mkdir(parents=True, exist_ok=True)
        torch.save(tokens, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)
    return Tokens(**torch.load(path))


@dataclass(frozen=True)
class Run:
    """One model to train."""

    group: str
    corpus: str
    width: int
    layout: tuple[int, ...]
    variant: Variant
    seed: int
    rate: float  # multiple of the scaled learning rates


def recipe_of(run: Run, options: argparse.Namespace) -> Recipe:
    """The run as a recipe, for the scaling of rates that recipes have."""
    variant = run.variant
    model = {
        "hidden_size": run.width, "num_hidden_layers": sum(run.layout), "num_attention_heads": run.width // 32,
        "vocab_size": options.vocabulary, "max_position_embeddings": options.length,
        "poe_mode": variant.mode, "poe_stage_layers": list(variant.layout or run.layout),
        "per_stage_head": variant.per_stage_head, "residual_weight": variant.residual_weight,
    }  # fmt: skip
    rates = {"matrix_lr": 0.02, "embedding_lr": 0.3, "unembedding_lr": 0.008, "scalar_lr": 0.5}
    return Recipe.model_validate(
        {
            "name": "gap",
            "model": model,
            "data": {"sources": [{"name": "embedded", "kind": "embedded"}]},
            "optimizer": {name: value * run.rate for name, value in rates.items()},
            "training": {
                "steps": options.steps,
                "batch_tokens": options.batch,
                "micro_batch": options.batch // options.length,
                "sequence_length": options.length,
                "dtype": options.dtype,
            },
        }
    )


def train(run: Run, tokens: Tokens, options: argparse.Namespace) -> dict[str, Any]:
    """Train and measure one model: figures of `evaluate_bpb`, the fitted product, sizes, FLOPs, the loss on the way."""
    begun = time.perf_counter()
    recipe, variant = recipe_of(run, options), run.variant
    master = PoEForCausalLM(PoEConfig(**recipe.model.config_arguments())).init_weights(run.seed)
    if variant.x0_lambda is not None:
        with torch.no_grad():
            master.x0_lambdas.fill_(variant.x0_lambda)
    kind = LocalObjective if variant.local else Objective
    objective = kind.from_config(master.config, **variant.local)
    groups = parameter_groups(master.named_parameters(), run.width, Rates(**recipe.scaled_rates()))
    if variant.stage_rates:
        groups = list(staged_groups(groups, master.config, variant.stage_rates))
    optimizer = MuonAdamW(groups, orthogonalise_dtype=torch.float32)
    schedule = Schedule(options.steps, warmup_steps=10, momentum_warmup_steps=min(100, options.steps))
    compute = ComputeModel(master.train(), getattr(torch, options.dtype))
    curve = []
    for step in range(options.steps):
        ids, targets = tokens.ids[run.seed, step].long(), tokens.targets[run.seed, step].long()
        losses = objective.forward_backward(compute.model, ids, targets)
        schedule.apply(optimizer, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        compute.refresh()
        if step % 20 == 0 or step == options.steps - 1:
            curve.append([step, [round(value, 4) for value in losses.stage.tolist()]])
    trained = time.perf_counter() - begun
    batches = list(zip(*(part.split(32) for part in tokens.validation), strict=True))
    figures = evaluate_bpb(master, batches, tokens.lengths)
    if variant.mode != "none":
        figures |= fitted_product(master, tokens, batches)
    flops = training_flops(master.config, options.length)
    extra = 6.0 * options.vocabulary * run.width if variant.final_path else 0.0
    return {
        **figures,
        "parameters": sum(p.numel() for p in master.parameters()),
        "flops_per_token": flops.total + extra,
        "flops_per_token_without_earlier_heads": flops.total - flops.earlier + extra,
        "train_seconds": trained,
        "seconds": time.perf_counter() - begun,
        "stage_loss": curve,
    }


def fitted_product(model: PoEForCausalLM, tokens: Tokens, batches: list) -> dict[str, Any]:
    """BPB of the product whose K weights (free in sum) were fitted on training rows the model has not seen."""

    def logits_of(ids: Tensor) -> Tensor:
        states, _ = model.run_path(model.stage_inputs(ids))
        return torch.stack([model.stage_logits(k, state).flatten(0, 1) for k, state in enumerate(states)])  # (K, N, V)

    with inference(model):
        ids, targets = tokens.fitting
        logits, goal = logits_of(ids), targets.reshape(-1)
    count = len(logits)
    weights = torch.full((count,), 1.0 / count, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(torch.tensordot(weights, logits, 1), goal, ignore_index=-1)
        loss.backward()
        return loss

    solver.step(closure)  # type: ignore[arg-type]
    nats = size = 0.0
    with inference(model):
        for ids, targets in batches:
            goal = targets.reshape(-1)
            length = torch.where(goal >= 0, tokens.lengths[goal.clamp_min(0)], 0)
            each = F.cross_entropy(torch.tensordot(weights, logits_of(ids), 1), goal, ignore_index=-1, reduction="none")
            nats += float(each[length > 0].double().sum())
            size += float(length.sum())
    return {"fitted_product_bpb": bits_per_byte(nats, size), "fitted_weights": weights.tolist()}


def plan(options: argparse.Namespace, rate: float, ledger: Ledger) -> Iterator[Run]:
    """All runs after the rates, the most important first; what is done when a run is asked for decides the best ideas.

    Stages mean nothing to an end-to-end model: it is trained once for all layouts.
    """
    home, cell = ("embedded", options.widths[0]), tuple(LAYOUTS[0])
    corpora = ["embedded"] + ["text"] * bool(options.text)

    def objectives(group: str, corpus: str, width: int, layout: tuple[int, ...]) -> Iterator[Run]:
        for variant in OBJECTIVES:
            yield Run(group, corpus, width, cell if variant.mode == "none" else layout, variant, 0, rate)

    for seed in range(options.seeds):
        for variant in OBJECTIVES:
            yield Run("main", *home, cell, variant, seed, rate)
    near = [("embedded", options.widths[0], tuple(LAYOUTS[1]))]
    near += [(corpus, options.widths[0], cell) for corpus in corpora[1:]]
    near += [("embedded", width, cell) for width in options.widths[1:]]
    for one in near:
        yield from objectives("cells", *one)
    ideas = [Run("ideas", *home, cell, variant, 0, rate) for variant in IDEAS]
    yield from ideas
    done = [(row["product_bpb"], number) for number, row in enumerate(map(ledger.find, ideas)) if row]
    for _, number in sorted(done)[:BEST_IDEAS]:
        for seed in range(1, options.seeds):
            yield replace(ideas[number], group="best ideas", seed=seed)
    for seed in range(options.seeds):
        for variant in OBJECTIVES:
            yield Run("half rate", *home, cell, variant, seed, rate / 2)
    for width in options.widths:
        for corpus in corpora:
            for layout in map(tuple, LAYOUTS):
                if (corpus, width, layout) not in [(*home, cell), *near]:
                    yield from objectives("far cells", corpus, width, layout)


class Ledger:
    """OUT/runs.jsonl: finished runs, found again by everything that defines them; the group is no part of that."""

    def __init__(self, options: argparse.Namespace):
        self.path, self.options, self.rows = options.out / "runs.jsonl", options, {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self.rows[self._key(row["run"], row["setting"])] = row

    @staticmethod
    def _key(run: dict[str, Any], setting: dict[str, Any]) -> str:
        return json.dumps([{k: v for k, v in run.items() if k != "group"}, setting], sort_keys=True)

    @property
    def setting(self) -> dict[str, Any]:
        """What all runs share."""
        return {name: getattr(self.options, name) for name in ("steps", "batch", "length", "vocabulary", "dtype")}

    def find(self, run: Run) -> dict[str, Any] | None:
        """The row of a finished run, or None."""
        return self.rows.get(self._key(asdict(run), self.setting))

    def add(self, run: Run, figures: dict[str, Any]) -> dict[str, Any]:
        """Append a finished run."""
        row = json.loads(json.dumps({"run": asdict(run), "setting": self.setting, **figures}))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[self._key(asdict(run), self.setting)] = row
        return row


def headline(row: dict[str, Any], mode: str) -> float:
    """The figure a model is used with: the product's of a staged one, the final path's otherwise."""
    return row["final_path_bpb"] if mode == "none" else row["product_bpb"]


def summarise(runs: list[Run], ledger: Ledger) -> list[dict[str, Any]]:
    """One row for each corpus, width, layout and variant: means over seeds, gaps to the end-to-end run of each seed."""
    cells: dict[tuple, list[tuple[Run, dict[str, Any]]]] = {}
    for run in dict.fromkeys(runs):
        row = ledger.find(run)
        key = (run.corpus, run.width, run.variant.layout or run.layout, run.rate, run.variant.name)
        if row is not None and all(run.seed != other.seed for other, _ in cells.get(key, [])):
            cells.setdefault(key, []).append((run, row))
    table = []
    for (corpus, width, layout, rate, name), members in cells.items():
        run, first = members[0]
        result: dict[str, Any] = {"corpus": corpus, "width": width, "layout": list(layout), "rate": rate}
        result |= {"variant": name, "group": run.group, "seeds": [one.seed for one, _ in members]}
        result |= {
            key: first[key] for key in ("parameters", "flops_per_token", "flops_per_token_without_earlier_heads")
        }
        for key in ("stage_bpb", "prefix_bpb", "fitted_weights"):
            if key in first:
                result[key] = [
                    statistics.fmean(column) for column in zip(*(row[key] for _, row in members), strict=True)
                ]
        outputs = {"product": "product_bpb", "fitted_product": "fitted_product_bpb", "final_path": "final_path_bpb"}
        for key in outputs.values():
            if key in first:
                result[key] = statistics.fmean(row[key] for _, row in members)
        gaps: dict[str, list[float]] = {}
        against: list[float] = []
        for one, row in members:
            plain = replace(one, variant=END_TO_END, layout=tuple(LAYOUTS[0]))
            reference, baseline = ledger.find(plain), ledger.find(replace(one, variant=BASELINE))
            if reference is not None:
                values = {label: row[key] for label, key in outputs.items() if key in row}
                values |= {"last_stage": row["stage_bpb"][-1]} if "stage_bpb" in row else {}
                for label, value in values.items():
                    gaps.setdefault(label, []).append(value / reference["final_path_bpb"] - 1)
            if baseline is not None and "ideas" in one.group:
                against.append(row["product_bpb"] / baseline["product_bpb"] - 1)
        result["gap"] = {label: statistics.fmean(values) for label, values in gaps.items()}
        result["gap_sd"] = {label: statistics.stdev(values) for label, values in gaps.items() if len(values) > 1}
        if against:
            result["product_against_baseline"] = {"mean": statistics.fmean(against), "each": against}
        table.append(result)
    return table


def show(table: list[dict[str, Any]]) -> None:
    """Print the summary."""
    print(
        f"{'variant':<50}{'corpus':>9}{'width':>6}{'layout':>9}{'rate':>6}{'seeds':>6}{'params':>9}{'MFLOP':>7}{'product':>9}"
        f"{'last':>8}{'final':>8}{'fitted':>8} | gap: {'product':>8}{'last':>8}{'final':>8}{'vs base':>9}"
    )

    def number(value: float | None, form: str, width: int) -> str:
        return f"{'' if value is None else format(value, form):>{width}}"

    for row in table:
        gap, stages = row["gap"], row.get("stage_bpb", [None])
        print(
            f"{row['variant']:<50}{row['corpus']:>9}{row['width']:>6}{','.join(map(str, row['layout'])):>9}"
            f"{row['rate']:>6g}{len(row['seeds']):>6}{row['parameters']:>9,}{row['flops_per_token'] / 1e6:>7.2f}"
            + number(row.get("product_bpb"), ".4f", 9)
            + number(stages[-1], ".4f", 8)
            + number(row.get("final_path_bpb"), ".4f", 8)
            + number(row.get("fitted_product_bpb"), ".4f", 8)
            + " |      "
            + number(gap.get("product"), "+.2%", 8)
            + number(gap.get("last_stage"), "+.2%", 8)
            + number(gap.get("final_path"), "+.2%", 8)
            + number(row.get("product_against_baseline", {}).get("mean"), "+.2%", 9)
        )


def main() -> None:
    """Do the runs that are missing, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, nargs="+", help="text files of the second corpus")
    parser.add_argument("--out", type=Path, default=Path("runs/gap"), help="where tokens and finished runs are kept")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--rates", type=float, nargs="+", default=[2.0, 5.0, 12.0])
    for name, default in (("steps", 130), ("batch", 1024), ("length", 128), ("vocabulary", 512), ("seeds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--train-bytes", type=int, default=2_000_000, help="of text the tokenizer is trained on")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--minutes", type=float, help="start no run that would not end within this time")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    check()
    begun, source = time.monotonic(), commit()  # the code that runs is the one loaded at the start
    options.out.mkdir(parents=True, exist_ok=True)
    ledger, corpora, taken = Ledger(options), {}, {}  # taken: seconds of the runs of a width

    def do(run: Run) -> dict[str, Any] | None:
        row = ledger.find(run)
        if row is None and run.group in options.groups:
            if run.corpus not in corpora:
                corpora[run.corpus] = prepare(run.corpus, options)
            left = None if options.minutes is None else options.minutes * 60 - (time.monotonic() - begun)
            if left is not None and left < statistics.median(taken.get(run.width, [0.0])) * 1.2:
                return None
            row = ledger.add(run, train(run, corpora[run.corpus], options) | {"commit": source})
            taken.setdefault(run.width, []).append(row["seconds"])
            print(
                f"{time.monotonic() - begun:6.0f} s  {run.group:<6} {run.corpus} {run.width} {run.variant.name}, seed "
                f"{run.seed}, rate {run.rate:g}: {headline(row, run.variant.mode):.4f} in {row['seconds']:.1f} s",
                flush=True,
            )
        return row

    home = ("embedded", options.widths[0], tuple(LAYOUTS[0]))
    trials = {
        variant.name: {rate: do(Run("rates", *home, variant, 0, rate)) for rate in options.rates}
        for variant in (END_TO_END, FLAT)
    }
    rates = {
        name: {rate: headline(row, "none" if name == END_TO_END.name else "flat") for rate, row in rows.items() if row}
        for name, rows in trials.items()
    }
    finished = rates[END_TO_END.name]
    if not finished:
        raise SystemExit("no end-to-end run is finished: add rates to --groups, or more --minutes")
    rate = min(finished, key=finished.__getitem__)
    runs = []
    for run in plan(options, rate, ledger):
        do(run)
        runs.append(run)
    table = summarise(runs, ledger)
    for width in options.widths:
        show([row for row in table if row["width"] == width])
    missing = sorted({f"{run.group}: {run.corpus} {run.width} {run.variant.name}, {run.layout}, seed {run.seed}"
                      for run in runs if ledger.find(run) is None})  # fmt: skip
    setting = {name: value for name, value in vars(options).items() if name not in ("text", "out", "groups", "save")}
    setting |= {"text": [one.name for one in options.text or []]}
    facts = {name: prepare(name, options).facts for name in sorted({run.corpus for run in runs})}
    result = {
        "benchmark": "gap", "setting": setting, **provenance(seed=0), "rate_chosen": rate, "bpb_by_rate": rates,
        "corpora": facts, "table": table, "missing": missing,
    }  # fmt: skip
    if options.save:
        machine = str(hardware().get("processor", "machine")).lower().replace(" ", "-")[:40]
        folder = Path(__file__).parent / "results"
        rows = [ledger.find(run) for run in dict.fromkeys(runs)]
        write_json(folder / f"{date.today()}-{machine}-gap.json", result | {"runs": [row for row in rows if row]})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
