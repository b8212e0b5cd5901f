"""What local learning costs: flat stage training against end to end, both sides in one run.

At one shape (default: width 512, 12 layers in 4 equal stages, 1024 tokens, vocabulary 8192) it measures
- the rate of the model's own matrix products, forward and both backward ones: what this machine can give;
- forward + backward of both objectives, alternating, medians of the repeats; the optimizer apart;
- bytes autograd keeps for backward at their peak;
- bf16 compute with fp32 masters against fp32.

    python benchmarks/train.py --repeats 5

Times are wall clock; processor seconds are given too, which stay comparable on a machine that is also doing other
things. Prints a table and, as the last line, one JSON object; `--save` also writes it under benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from stagewise.evaluation.provenance import hardware, provenance, write_json
from stagewise.modeling import PoEConfig, PoEForCausalLM
from stagewise.training.cost import training_flops
from stagewise.training.objectives import Objective
from stagewise.training.optimizer import MuonAdamW, Rates, parameter_groups
from stagewise.training.precision import ComputeModel

OBJECTIVES = ("none", "flat", "residual_logop")


def build(options: argparse.Namespace, mode: str) -> PoEForCausalLM:
    """The model of the benchmark with an objective; c_proj and heads random, so that no product is with zeros."""
    config = PoEConfig(
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.length,
        poe_stage_layers=[options.layers // 4] * 4,
        poe_mode=mode,
        per_stage_head=options.per_stage_head and mode != "none",
    )
    model = PoEForCausalLM(config).init_weights(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "c_proj" in name or "lm_head" in name:
                parameter.normal_(0.0, 0.02)
    return model


def gemm_rate(options: argparse.Namespace, dtype: torch.dtype) -> torch.Tensor:
    """FLOP per wall and per processor second, (2,), of the model's matrix products.

    Each is timed on its own and weighted as often as the model has it.
    """
    size, inner, tokens = options.width, 4 * options.width, options.rows * options.length
    products = [(size, size, 4 * options.layers), (inner, size, options.layers), (size, inner, options.layers)]
    products.append((options.vocabulary, size, 4))
    work, spent = 0.0, torch.zeros(2, dtype=torch.float64)
    for out_features, in_features, count in products:
        x = torch.randn(tokens, in_features).to(dtype)
        weight = torch.randn(out_features, in_features).to(dtype)
        grad = torch.randn(tokens, out_features).to(dtype)
        for product in (lambda: x @ weight.T, lambda: grad @ weight, lambda: grad.T @ x):  # noqa: B023
            product()
            work += 2.0 * tokens * in_features * out_features * count
            spent += count * median([clock(product) for _ in range(options.repeats)])
    return work / spent


def clock(function: Any) -> torch.Tensor:
    """Wall and processor seconds of one call, (2,)."""
    begun, used = time.perf_counter(), time.process_time()
    function()
    return torch.tensor([time.perf_counter() - begun, time.process_time() - used], dtype=torch.float64)


def median(times: list[torch.Tensor]) -> torch.Tensor:
    """Median of each clock, (2,)."""
    return torch.stack(times).quantile(0.5, dim=0)


class SavedBytes:
    """Peak bytes of storages that autograd keeps for backward, weights left out; a context manager."""

    def __init__(self, model: torch.nn.Module):
        self.alive = self.peak = 0
        self._held: dict[int, tuple[int, int]] = {}
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> Any:
        key = tensor.untyped_storage().data_ptr()
        if key in self._weights:
            return tensor
        count, size = self._held.get(key, (0, 0))
        if count == 0:
            size = tensor.untyped_storage().nbytes()
            self.alive += size
            self.peak = max(self.peak, self.alive)
        self._held[key] = (count + 1, size)
        return _Kept(tensor, lambda: self._release(key))

    def _release(self, key: int) -> None:
        count, size = self._held[key]
        self._held[key] = (count - 1, size)
        self.alive -= size if count == 1 else 0

    @staticmethod
    def _unpack(kept: Any) -> torch.Tensor:
        return kept.tensor if isinstance(kept, _Kept) else kept

    def __enter__(self) -> SavedBytes:
        self._hooks.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._hooks.__exit__(*arguments)


class _Kept:
    def __init__(self, tensor: torch.Tensor, release: Any):
        self.tensor, self.release = tensor, release

    def __del__(self) -> None:
        self.release()


def measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Per objective: median seconds of forward + backward and of the optimizer, peak saved bytes, FLOPs per token."""
    ids = torch.randint(0, options.vocabulary, (options.rows, options.length + 1))
    tokens = options.rows * options.length
    sides: dict[str, tuple[ComputeModel, Objective, MuonAdamW]] = {}
    results: dict[str, dict[str, Any]] = {}
    for mode in options.objectives:
        master = build(options, mode)
        compute = ComputeModel(master, dtype)
        objective = Objective.from_config(master.config)
        optimizer = MuonAdamW(parameter_groups(master.named_parameters(), options.width, Rates(matrix_lr=1e-4)))
        sides[mode] = compute, objective, optimizer
        with SavedBytes(compute.model) as saved:
            objective.forward_backward(compute.model, ids[:, :-1], ids[:, 1:], normaliser=tokens)
        optimizer.step()
        flops = training_flops(master.config, options.length)
        results[mode] = {
            "saved_bytes": saved.peak,
            "flops_per_token": flops.total,
            "flops_per_token_without_earlier_heads": flops.total - flops.earlier,
            "parameters": sum(p.numel() for p in master.parameters()),
        }
    times: dict[str, list[torch.Tensor]] = {mode: [] for mode in sides}
    updates: dict[str, list[torch.Tensor]] = {mode: [] for mode in sides}
    for _ in range(options.repeats):
        for mode, (compute, objective, optimizer) in sides.items():
            optimizer.zero_grad(set_to_none=True)
            run = (compute.model, ids[:, :-1], ids[:, 1:])
            times[mode].append(clock(lambda: objective.forward_backward(*run, normaliser=tokens)))  # noqa: B023
            updates[mode].append(clock(optimizer.step) + clock(compute.refresh))
    for mode, result in results.items():
        result["seconds"], result["processor_seconds"] = median(times[mode]).tolist()
        result["all_seconds"] = torch.stack(times[mode]).tolist()
        result["optimizer_seconds"], result["optimizer_processor_seconds"] = median(updates[mode]).tolist()
        result["tokens_per_second"] = tokens / result["seconds"]
    return results


def profile(options: argparse.Namespace, mode: str) -> str:
    """Where the time of one bf16 forward + backward goes, by operator."""
    compute = ComputeModel(build(options, mode), torch.bfloat16)
    ids = torch.randint(0, options.vocabulary, (options.rows, options.length + 1))
    objective = Objective.from_config(compute.master.config)
    objective.forward_backward(compute.model, ids[:, :-1], ids[:, 1:])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        objective.forward_backward(compute.model, ids[:, :-1], ids[:, 1:])
    return profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50)


def main() -> None:
    """Measure, print a table and one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("width", 512), ("layers", 12), ("length", 1024), ("vocabulary", 8192), ("rows", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--per-stage-head", action="store_true", help="one more head per stage on the staged sides")
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), choices=[*OBJECTIVES, "hier"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32"])
    parser.add_argument("--profile", choices=[*OBJECTIVES, "hier"], help="print one profile of this objective instead")
    parser.add_argument("--save", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.profile:
        print(profile(options, options.profile))
        return
    result: dict[str, Any] = {"benchmark": "train", "setting": vars(options), **provenance(seed=0), "sides": {}}
    columns = ("tokens/s", "s/pass", "CPU s", "of GEMM", "by CPU s", "MFLOP/token", "saved MiB", "optimizer s")
    print(f"{'':<18}" + "".join(f"{column:>13}" for column in columns), flush=True)
    for name in options.dtypes:
        wall_rate, processor_rate = gemm_rate(options, getattr(torch, name)).tolist()
        sides = measure(options, getattr(torch, name))
        result["sides"][name] = {"gemm_flops_per_second": wall_rate, "gemm_flops_per_processor_second": processor_rate}
        result["sides"][name] |= sides
        print(f"{name}: GEMM at the model's shapes {wall_rate / 1e9:.0f} GFLOP/s")
        for mode, side in sides.items():
            work = side["flops_per_token"] * options.rows * options.length
            side["share_of_gemm"] = work / side["seconds"] / wall_rate
            side["share_of_gemm_by_processor_time"] = work / side["processor_seconds"] / processor_rate
            print(
                f"  {mode:<16}{side['tokens_per_second']:>13,.0f}{side['seconds']:>13.3f}"
                f"{side['processor_seconds']:>13.3f}{side['share_of_gemm']:>13.1%}{side['share_of_gemm_by_processor_time']:>13.1%}"
                f"{side['flops_per_token'] / 1e6:>13,.1f}{side['saved_bytes'] / 2**20:>13.1f}"
                f"{side['optimizer_seconds']:>13.3f}"
            )
    for name, half in result["sides"].items():
        if not {"none", "flat"} <= half.keys():
            continue
        flat, end_to_end = half["flat"], half["none"]
        keys = {"time": "seconds", "processor_time": "processor_seconds", "flops": "flops_per_token"}
        ratios = {ratio: flat[key] / end_to_end[key] for ratio, key in {**keys, "saved_bytes": "saved_bytes"}.items()}
        ratios["time_over_flops"] = ratios["time"] / ratios["flops"]
        ratios["processor_time_over_flops"] = ratios["processor_time"] / ratios["flops"]
        result.setdefault("flat_over_end_to_end", {})[name] = ratios
        print(
            f"flat over end to end, {name}: time {ratios['time']:.3f}x, CPU time {ratios['processor_time']:.3f}x, "
            f"FLOPs {ratios['flops']:.3f}x (time over FLOPs {ratios['time_over_flops']:.3f}, by CPU time "
            f"{ratios['processor_time_over_flops']:.3f}), saved bytes {ratios['saved_bytes']:.2f}x"
        )
    if options.save:
        machine = str(hardware().get("processor", "machine")).lower().replace(" ", "-")[:40]
        write_json(Path(__file__).parent / "results" / f"{date.today()}-{machine}-train.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
