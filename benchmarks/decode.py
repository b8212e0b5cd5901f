"""Decode speed: every mode beside its baselines, all in one run, interleaved, medians of the repeats.

Parts (`--parts`, default all that can run):
    full     the 1.3B shape with random weights: `full` against the reference's way (no cache), transformers' generate
             on the same model, an equal-active-size Llama under transformers, llama.cpp (needs --peers)
    traces   1.3B and 1.5B shapes with scripted acceptance: speculation and verified WAND against the cost model
    lab      a trained model (--model): full, generate, no cache, the lossless modes, plain WAND
    batch    batch 8 with rows of different lengths against batch 1
    memory   bytes held while decoding; prefill of 512 tokens against the rate of the matrix products

    python benchmarks/decode.py --parts full traces --peers peers-folder --save
    python benchmarks/decode.py --parts lab --model runs/lab/model

Random weights are enough where only speed is asked for: no operation here depends on their values. Rates are tokens per
second after the first token; shares of bandwidth are of reading 1 GB in the same run. Prints a table per part and, as
the last line, one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

from stagewise.calibration.cost_model import Costs
from stagewise.calibration.speculation import expected_round
from stagewise.calibration.tune import measure_costs
from stagewise.evaluation.provenance import provenance, write_json
from stagewise.modeling import PoEConfig, PoEForCausalLM, load
from stagewise.modeling.decoding import Decoder, decode
from stagewise.modeling.packed import PackedLinear, pack, unpack
from stagewise.modeling.sampling import SamplingParams
from stagewise.modeling.strategy import Strategy

PARTS = ("full", "traces", "lab", "batch", "memory")
PROMPT = 64  # tokens
Side = Callable[[], float]


def median(values: list[float]) -> float:
    return statistics.median(values) if values else float("nan")


def random_model(config: PoEConfig, dtype: torch.dtype = torch.bfloat16) -> PoEForCausalLM:
    """A model whose weights repeat one block of random numbers: made in seconds at any size."""
    with torch.device("meta"):
        model = PoEForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    block = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            for piece in parameter.data.view(-1).split(block.numel()):
                piece.copy_(block[: piece.numel()])
        model.resid_lambdas.fill_(1.0)
    return model


def read_bandwidth(repeats: int = 5) -> float:
    """Bytes per second at which 1 GB is summed."""
    big = torch.ones(250_000_000)
    return big.nbytes / median([seconds(big.sum) for _ in range(repeats)])


def seconds(function: Callable[[], Any]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def interleaved(sides: dict[str, Side], repeats: int) -> dict[str, list[float]]:
    """Every side once per repeat, in turn; the first turn only warms up."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            value = side()
            if turn:
                found[name].append(value)
    return found


def prompt_ids(model: PoEForCausalLM, rows: int = 1, length: int = PROMPT, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size - 9, (rows, length), generator=generator).tolist()


def ours(model: PoEForCausalLM, prompts: list[list[int]], strategy: Strategy | str, tokens: int) -> float:
    """Tokens per second of one decode with packed weights."""
    pack(model)
    return decode(model, prompts, strategy, SamplingParams(tokens, stop_tokens=())).tokens_per_second


@torch.no_grad()
def transformers_generate(model: Any, prompts: list[list[int]], tokens: int) -> float:
    """Tokens per second of transformers' greedy generate, the first token left out."""
    if isinstance(model, PoEForCausalLM):
        unpack(model)
    ids = torch.tensor(prompts)
    settings = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    first = seconds(lambda: model.generate(ids, max_new_tokens=1, **settings))
    return tokens / (seconds(lambda: model.generate(ids, max_new_tokens=tokens + 1, **settings)) - first)


@torch.no_grad()
def without_cache(model: PoEForCausalLM, prompts: list[list[int]], tokens: int, points: int = 4) -> float:
    """Tokens per second when every token runs the model over the whole prefix again, as the reference does.

    Timed at a few lengths between the prompt's and the end, integrated by the trapezoid rule.
    """
    unpack(model)
    start = len(prompts[0])
    lengths = [start + round(i * tokens / (points - 1)) for i in range(points)]
    ids = torch.tensor(prompt_ids(model, len(prompts), lengths[-1]))
    run = model.forward_aggregated if model.config.poe_mode != "none" else model
    times = [seconds(lambda: run(ids[:, :n])) for n in lengths]  # noqa: B023
    total = sum((times[i] + times[i + 1]) / 2 * (lengths[i + 1] - lengths[i]) for i in range(points - 1))
    return tokens / total


def llama_of_equal_size() -> Any:
    """A random Llama that reads as many weights per token as the 1.3B shape: 730M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=1536,
        intermediate_size=4096,  # three matrices of it are the two of width 6144
        num_hidden_layers=24,
        num_attention_heads=12,
        num_key_value_heads=12,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


class LlamaCpp:
    """The peers folder's llama.cpp measurement, in a process of its own: {format: {decode_tok_s, prefill_tok_s}}."""

    def __init__(self, peers: Path, threads: int):
        self.script = peers / "llama_peer.py"
        wheels = sorted(peers.glob("llama_cpp_python-*.whl"))
        if not self.script.exists() or not wheels:
            raise ValueError(f"--peers {peers} must hold llama_peer.py and a llama_cpp_python wheel")
        self.folder = tempfile.TemporaryDirectory()
        with zipfile.ZipFile(wheels[-1]) as wheel:
            wheel.extractall(Path(self.folder.name, "site"))
        path = os.pathsep.join([str(Path(self.folder.name, "site")), os.environ.get("PYTHONPATH", "")])
        self.environment = {**os.environ, "PYTHONPATH": path, "TH": str(threads)}

    def __call__(self) -> dict[str, dict[str, float]]:
        command = [sys.executable, str(self.script), str(Path(self.folder.name, "models")), "--no-hf"]
        run = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=True)
        return json.loads(run.stdout.strip().splitlines()[-1])


def weight_bytes(model: PoEForCausalLM) -> int:
    """Bytes of weights read for one token by `full`: the blocks and the heads of the default output, once each."""
    config = model.config
    block = 2 * config.hidden_size * (config.num_attention_heads * config.head_dim + config.kv_size)
    block += 2 * config.hidden_size * config.intermediate_size
    heads = config.num_stages if config.per_stage_head else 1
    numbers = config.num_hidden_layers * block + heads * config.padded_vocab_size * config.hidden_size
    return numbers * model.dtype.itemsize


def table(title: str, header: tuple[str, ...], rows: list[tuple]) -> None:
    """Print rows under a header, columns as wide as their entries."""
    text = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in text) for i in range(len(header))]
    print(f"\n{title}")
    for row in text:
        print("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))))


# -- parts


def part_full(options: argparse.Namespace) -> dict[str, Any]:
    model, llama = random_model(PoEConfig.preset("poe-1.3b")), llama_of_equal_size()
    prompts, few = prompt_ids(model), max(8, options.tokens // 3)
    bandwidth: list[float] = []

    def read() -> float:
        bandwidth.append(read_bandwidth(1))
        return bandwidth[-1]

    sides: dict[str, Side] = {
        "read bandwidth": read,
        "full": lambda: ours(model, prompts, "full", options.tokens),
        "generate on the same model": lambda: transformers_generate(model, prompts, few),
        "Llama under transformers": lambda: transformers_generate(llama, prompts, few),
    }
    if options.peers is not None:
        peer = LlamaCpp(options.peers, options.threads)
        formats: dict[str, list[float]] = {}

        def cpp() -> float:
            rates = peer()
            for name, rate in rates.items():
                formats.setdefault(name, []).append(rate["decode_tok_s"])
            return rates["llama.cpp bf16"]["decode_tok_s"]

        sides["llama.cpp bf16"] = cpp
    found = interleaved(sides, options.repeats)
    found["no cache, 256 tokens"] = [without_cache(model, prompts, 256)]
    bandwidth_median, size = median(found.pop("read bandwidth")), weight_bytes(model)
    rates = {name: median(values) for name, values in found.items()}
    rows = [(n, r, rates["full"] / r, r * size / 1e9, r * size / bandwidth_median) for n, r in rates.items()]
    header = ("1.3B shape, bf16, batch 1", "tokens/s", "full is x", "GB/s", "of bandwidth")
    table(f"{size / 1e9:.2f} GB of weights a token; memory reads {bandwidth_median / 1e9:.1f} GB/s", header, rows)
    result = {"tokens_per_second": found, "median": rates, "weight_bytes": size, "read_bandwidth": bandwidth}
    if options.peers is not None:
        result["llama_cpp"] = formats
    return result


class Script:
    """Makes stage 0 agree with the product at a given rate, whatever the weights: adds to the logits of one token.

    At position p the product chooses token t(p); the drafter chooses it with probability `acceptance`, independently
    per position, else t(p) + 1. Only the choice is scripted: everything is computed as always.
    """

    def __init__(self, model: PoEForCausalLM, acceptance: float, length: int = 4096):
        generator = torch.Generator().manual_seed(1)
        self.model, self.vocabulary = model, model.config.vocab_size - 16
        self.target = torch.randint(0, self.vocabulary, (length,), generator=generator)
        agrees = torch.rand(length, generator=generator) < acceptance
        self.draft = torch.where(agrees, self.target, self.target + 1)
        self.decoder: Decoder | None = None

    def expert_logits(self, stages: Any, states: Any) -> list[torch.Tensor]:
        found = type(self.model).expert_logits(self.model, stages, states)
        assert self.decoder is not None and self.decoder.cache is not None
        last = len(self.decoder.cache.ids[0]) + 1
        for stage, logits in zip(stages, found, strict=True):
            at = slice(last - logits.size(1), last)
            token, boost = (self.draft[at], 1e3) if stage == 0 and len(stages) == 1 else (self.target[at], 1e4)
            logits[0, torch.arange(logits.size(1)), token] += boost
        return found

    def rate(self, prompts: list[list[int]], strategy: Strategy, tokens: int) -> float:
        """Tokens per second of one scripted decode, its first round left out."""
        self.decoder = Decoder(self.model, prompts, strategy, SamplingParams(tokens, stop_tokens=()))
        self.model.expert_logits = self.expert_logits  # type: ignore[method-assign]
        text: list[int] = []
        later = 0
        try:
            for event in self.decoder.run():
                if event.committed:
                    text += event.tokens
                    later += len(event.tokens) if self.decoder.first_commit is not None else 0
        finally:
            del self.model.expert_logits
        assert text == self.target[PROMPT : PROMPT + tokens].tolist(), "the scripted text is the full model's"
        assert self.decoder.first_commit is not None
        return later / (self.decoder.seconds - self.decoder.first_commit)

    def tokens_per_round(self, drafts: int, tokens: int) -> float:
        """What this very trace allows after the first round; on average `(1 - a**(m + 1)) / (1 - a)`."""
        position, end, rounds = PROMPT, PROMPT + tokens, []
        while position < end:
            most, kept = min(drafts, end - position - 1), 0
            while kept < most and self.draft[position + kept] == self.target[position + kept]:
                kept += 1
            rounds.append(kept + 1)
            position += kept + 1
        return sum(rounds[1:]) / len(rounds[1:])


def predicted(costs: Costs, tokens_per_round: float, drafts: int) -> float:
    """S of the cost model: tokens of a round over its cost, relative to full, with the measured pass costs."""
    return tokens_per_round * costs.full() / costs.round(drafts + 1, 0, 1)


def part_traces(options: argparse.Namespace) -> dict[str, Any]:
    return {preset: traces_of(preset, options) for preset in options.shapes}


def traces_of(preset: str, options: argparse.Namespace) -> dict[str, Any]:
    """Gains of speculation and verified WAND at scripted acceptances beside what the cost model allows."""
    model = pack(random_model(PoEConfig.preset(preset)))
    prompts, tokens = prompt_ids(model), options.trace_tokens
    costs = measure_costs(model, prompt_ids(model, 1, PROMPT + 10), widths=range(1, 10), repeats=options.repeats)
    found: dict[str, Any] = {"v": costs.pass_costs(0), "f": costs.share(0), "modes": {}}
    rows = []
    always = (-1.0,) * (model.config.num_stages - 1)  # margins that never stop drafting
    for acceptance in options.acceptance:
        script = Script(model, acceptance)
        m = max(range(1, 9), key=lambda n: predicted(costs, expected_round(acceptance, n), n))  # noqa: B023
        modes = {
            "full": Strategy("full"),
            "speculative": Strategy("speculative", draft_stage=0, k_draft=m),
            "verified WAND": Strategy("wand", verified=True, max_pending=m, thresholds=always),
        }
        rates = interleaved(
            {name: lambda s=s: script.rate(prompts, s, tokens) for name, s in modes.items()},  # type: ignore[misc] # noqa: B023
            options.repeats,
        )
        full, bound = median(rates.pop("full")), predicted(costs, script.tokens_per_round(m, tokens), m)
        for name, values in rates.items():
            gain = median(values) / full
            rows.append((f"a={acceptance} {name}, {m} drafts", full, median(values), gain, bound, gain / bound))
            found["modes"][f"{acceptance} {name}"] = {
                "drafts": m,
                "full_tokens_per_second": full,
                "tokens_per_second": values,
                "gain": gain,
                "bound_of_this_trace": bound,
                "bound_on_average": predicted(costs, expected_round(acceptance, m), m),
            }
    passes = ", ".join(f"{n}: {c:.2f}" for n, c in found["v"].items())
    header = (f"{preset}, {model.dtype}".replace("torch.", ""), "full tok/s", "tok/s", "gain", "S", "of S")
    table(f"f = {found['f']:.3f}; v(n) = {passes}", header, rows)
    return found


def part_lab(options: argparse.Namespace) -> dict[str, Any]:
    model = load(options.model, dtype=options.dtype)
    stages = model.config.num_stages
    prompts, tokens = prompt_ids(model), 256
    if options.prompt_file is not None:
        from stagewise.modeling import load_tokenizer

        text = options.prompt_file.read_text(encoding="utf-8")
        prompts = [load_tokenizer(options.model).encode(text)[:PROMPT]]
    candidates = {f"speculative, {m} drafts": Strategy("speculative", k_draft=m) for m in (1, 2, 3, 4, 6, 8)}
    if model.config.poe_wand_p99_bounds_per_stage_head:
        for safety in (1.0, 0.5, 0.25, 0.1):
            candidates[f"verified WAND, safety {safety}"] = Strategy("wand", verified=True, safety=safety)
        candidates["plain WAND"] = Strategy("wand")
    candidates["auto"] = Strategy("auto")
    sides: dict[str, Side] = {"full": lambda: ours(model, prompts, "full", tokens)}
    for name, strategy in candidates.items():
        sides[name] = lambda strategy=strategy: ours(model, prompts, strategy, tokens)  # type: ignore[misc]
    sides["generate"] = lambda: transformers_generate(model, prompts, tokens)
    sides["no cache"] = lambda: without_cache(model, prompts, tokens)
    found = interleaved(sides, options.repeats)
    rates = {name: median(values) for name, values in found.items()}
    result: dict[str, Any] = {"tokens_per_second": found, "median": rates, "prompt": prompts[0]}
    header = (f"{stages} stages, {model.dtype}".replace("torch.", ""), "tokens/s", "of full", "full is x")
    table(
        f"{options.model}, 256 tokens", header, [(n, r, r / rates["full"], rates["full"] / r) for n, r in rates.items()]
    )
    if "plain WAND" in candidates:
        result["wand_agreement"] = wand_agreement(model, prompts[0], tokens)
        print(f"plain WAND: top-1 agreement with full on its own text {result['wand_agreement']:.3f}")
    tuned = Path(options.model) / "elastic.json"
    if tuned.is_file():
        stored = json.loads(tuned.read_text(encoding="utf-8"))
        result["tuned"] = {k: stored[k] for k in ("strategy", "predicted_tokens_per_second") if k in stored}
        print(f"tuned: {result['tuned']}")
    return result


@torch.no_grad()
def wand_agreement(model: PoEForCausalLM, prompt: list[int], tokens: int) -> float:
    """Share of plain WAND's tokens that the full model would have chosen after the same prefix."""
    text = decode(model, [prompt], Strategy("wand"), SamplingParams(tokens, stop_tokens=())).tokens[0]
    unpack(model)
    best = model.forward_aggregated(torch.tensor([prompt + text]))[0, len(prompt) - 1 : -1].argmax(-1)
    return float((best == torch.tensor(text)).float().mean())


def part_batch(options: argparse.Namespace) -> dict[str, Any]:
    return {name: batch_of(name, options) for name in ["1.3B shape", *([str(options.model)] if options.model else [])]}


def batch_of(name: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Rates of eight rows of different lengths and of the first alone."""
    random = name == "1.3B shape"
    model = random_model(PoEConfig.preset("poe-1.3b")) if random else load(name, dtype=options.dtype)
    many = [row[: PROMPT - 6 * i] for i, row in enumerate(prompt_ids(model, 8))]
    sides: dict[str, Side] = {}
    for label, prompts in (("batch 1", many[:1]), ("batch 8", many)):
        for mode in ("full",) if random else ("full", "auto"):
            sides[f"{label} {mode}"] = lambda p=prompts, m=mode: ours(model, p, m, options.tokens)  # type: ignore[misc]
    found = interleaved(sides, options.repeats)
    one = median(found["batch 1 full"])
    rows = [(side, median(values), median(values) / one) for side, values in found.items()]
    table(f"{name}, rows of different lengths", ("all rows together", "tokens/s", "x batch 1"), rows)
    return found


def part_memory(options: argparse.Namespace) -> dict[str, Any]:
    model = random_model(PoEConfig.preset("poe-1.3b"))
    plain = sum(p.nbytes for p in model.parameters())
    pack(model)
    layers = {id(m.packed): m.packed.nbytes() for m in model.modules() if isinstance(m, PackedLinear)}
    folded = sum(w.nbytes() for w in model.folded_heads.values())
    held = sum(p.nbytes for p in model.parameters()) + sum(layers.values())
    prompts = prompt_ids(model, 1, 512)
    decoder = Decoder(model, prompts, Strategy("full"), SamplingParams(2, stop_tokens=()))
    for _ in decoder.run():
        pass
    cache = decoder.cache.bytes()

    def prefill() -> float:
        last = Decoder(model, prompts, Strategy("full"), SamplingParams(1, stop_tokens=()))
        for _ in last.run():
            pass
        return 512 / last.seconds

    flops = 2 * 512 * (weight_bytes(model) / model.dtype.itemsize - model.config.padded_vocab_size * 1536)
    products: dict[tuple[int, int], int] = {(1536, 1536): 4 * 24, (6144, 1536): 24, (1536, 6144): 24}

    def gemm() -> float:
        spent = 0.0
        for (out, size), count in products.items():
            x, w = torch.randn(512, size).bfloat16(), torch.randn(out, size).bfloat16()
            spent += count * median([seconds(lambda: x @ w.T) for _ in range(3)])  # noqa: B023
        return 512 / spent

    found = interleaved({"prefill": prefill, "matrix products alone": gemm}, options.repeats)
    share = median(found["prefill"]) / median(found["matrix products alone"])
    rows = [(name, median(v), median(v) * flops / 512 / 1e9) for name, v in found.items()]
    table("prefill of 512 tokens, 1.3B shape", ("", "tokens/s", "GFLOP/s"), rows)
    sizes = {"plain weights": plain, "packed weights": held, "folded heads": folded, "cache of 513 tokens": cache}
    rows = [(name, size / 1e9) for name, size in sizes.items()]
    table(f"prefill reaches {100 * share:.0f}% of the products' rate", ("bytes", "GB"), rows)
    return {"rates": found, "share_of_gemm": share, "bytes": sizes}


def main() -> None:
    """Run the parts, print tables and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=None)
    parser.add_argument("--model", type=Path, help="folder of a trained model for the lab and batch parts")
    parser.add_argument("--prompt-file", type=Path, help="text whose beginning prompts the lab part")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peers", type=Path, help="folder with llama_peer.py and a llama_cpp_python wheel")
    parser.add_argument("--shapes", nargs="+", default=["poe-1.3b", "poe-1.5b"], help="presets of the traces part")
    parser.add_argument("--acceptance", nargs="+", type=float, default=[0.7, 0.88, 0.95])
    parser.add_argument("--tokens", type=int, default=24, help="tokens of a timed decode (default 24)")
    parser.add_argument("--trace-tokens", type=int, default=64, help="tokens of a scripted decode (default 64)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--save", action="store_true", help="also write a file under benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    parts = options.parts or [p for p in PARTS if p != "lab" or options.model is not None]
    if "lab" in parts and options.model is None:
        parser.error("the lab part needs --model")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items() if k != "peers"}
    result: dict[str, Any] = {"benchmark": "decode", "setting": settings, "peers": options.peers is not None}
    result |= provenance(seed=0)
    run = {"full": part_full, "traces": part_traces, "lab": part_lab, "batch": part_batch, "memory": part_memory}
    result["parts"] = {name: run[name](options) for name in parts}
    if options.save:
        name = f"{date.today()}-{platform.machine()}-{os.cpu_count()}cpu-decode-{'-'.join(parts)}.json"
        write_json(Path(__file__).parent / "results" / name, result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
