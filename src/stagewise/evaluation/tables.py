"""Results as terminal tables; every table states units and setting in its title."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 140  # columns of a table that goes into a file


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], *, texts: int = 1) -> None:
    """Print one table; the first `texts` columns are text, the others numbers, None an empty cell."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    table = Table()
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    console.print(title, style="bold", soft_wrap=True, markup=False, highlight=False)
    console.print(table)


def cell(value: Any) -> str:
    """A value as a table shows it: four decimals, thousands separated, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def bounds(interval: Sequence[float]) -> str:
    """`0.7201 to 0.7290`."""
    return f"{interval[0]:.4f} to {interval[1]:.4f}"


def size(count: float) -> str:
    """Bytes in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def evaluation_rows(report: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows (predictor, bits per byte, interval, accuracy, interval, calibration error) of one model's report."""
    errors, intervals = report["expected_calibration_error"], report["intervals"]
    rows: list[tuple[Any, ...]] = []
    for k, bpb in enumerate(report.get("stage_bpb", [])):
        rows.append(
            (
                f"stage {k} alone",
                bpb,
                bounds(intervals["stage_bpb"][k]),
                report["stage_accuracy"][k],
                bounds(intervals["stage_accuracy"][k]),
                errors[f"stage_{k}"],
            )
        )
    experts = len(rows)
    for k, bpb in enumerate(report.get("prefix_bpb", [])):
        rows.append(
            (
                "product of all" if k + 1 == experts else f"product of the first {k + 1}",
                bpb,
                bounds(intervals["prefix_bpb"][k]),
                report["prefix_accuracy"][k],
                bounds(intervals["prefix_accuracy"][k]),
                errors[f"prefix_{k + 1}"],
            )
        )
    for name, title in (("entropy_weighted", "entropy-weighted product"), ("final_path", "final path")):
        if f"{name}_bpb" in report:
            rows.append(
                (
                    title,
                    report[f"{name}_bpb"],
                    bounds(intervals[f"{name}_bpb"]),
                    report[f"{name}_accuracy"],
                    bounds(intervals[f"{name}_accuracy"]),
                    errors[name],
                )
            )
    return rows


def show_evaluation(report: Mapping[str, Any], setting: str) -> None:
    """The tables of one model's report."""
    show(
        f"{report['model']}: {setting}",
        ("predictor", "bits per byte", "interval", "accuracy", "interval", "ECE"),
        evaluation_rows(report),
    )
    if "mean_stage_bpb" in report:
        low, high = report["intervals"]["crossover_gap"]
        print(
            f"mean_stage_bpb {report['mean_stage_bpb']:.4f}   product_bpb {report['product_bpb']:.4f}   "
            f"final_path_bpb {report['final_path_bpb']:.4f}   "
            f"crossover gap {report['crossover_gap']:+.4f} ({low:+.4f} to {high:+.4f})"
        )
    names = report["agreement"]["names"]
    if len(names) > 1:
        rows = [(name, *row) for name, row in zip(names, report["agreement"]["matrix"], strict=True)]
        show("share of tokens with the same top token", ("", *names), rows)


def show_difference(difference: Mapping[str, Any], first: str, second: str) -> None:
    """Paired differences of two models."""
    rows = [
        (name, f"{entry['difference']:+.4f}", f"{entry['interval'][0]:+.4f} to {entry['interval'][1]:+.4f}")
        for name, entry in difference.items()
    ]
    show(f"{second} minus {first}, paired by document", ("figure", "difference", "95% interval"), rows)


def show_costs(report: Mapping[str, Any], name: str) -> None:
    """The tables of an inspection."""
    total = report["parameters"]
    show(
        f"{name}: {total:,} parameters",
        ("part", "parameters", "share"),
        [(part, count, f"{count / total:.1%}") for part, count in report["parts"].items()],
    )
    for title, key in (("stage", "stages"), ("mode", "modes")):
        rows = [
            (
                cost["name"],
                cost["layers"],
                cost["heads"],
                cost["parameters"],
                f"{cost['flops'] / 1e9:.3f}",
                size(cost["bytes_read"]),
                size(cost["kv_bytes_per_token"]),
                size(cost["kv_bytes"]),
            )
            for cost in report[key]
        ]
        columns = (title, "layers", "heads", "parameters", "GFLOP/token", "read/token", "KV/position", "KV in all")
        show(f"one token at {report['context']:,} tokens of context, {report['dtype']}, batch 1", columns, rows)
    memory = report["memory"]
    for place, free in memory["free"].items():
        verdict = "fits" if memory["fits"][place] else "does not fit"
        kv = f"KV of {memory['batch']} x {report['context']:,} tokens {size(memory['kv'])}"
        weights = f"weights {size(memory['weights'])} + folded heads {size(memory['folded_heads'])}"
        print(f"{place}: {verdict}: {weights} + {kv} = {size(memory['needed'])}; free {size(free)}")


def show_lambdas(lambdas: Sequence[Mapping[str, Any]]) -> None:
    """The factors of the residual stream and of the embedding, layer by layer."""
    rows = [(f"layer {entry['layer']}", entry["resid"], entry["x0"]) for entry in lambdas]
    show("factors on entering a layer", ("", "residual stream", "embedding"), rows)


def show_heads(report: Mapping[str, Any]) -> None:
    """The tables of a head analysis."""
    count = len(report["norms"])
    rows = [
        (
            f"head {k}",
            report["norms"][k],
            f"{report['energy'][k]:.1%}",
            f"{report['unique'][k]:.1%}",
            f"{report['unique_norm'][k]:.1%}",
            *report["joint_cosine"][k],
        )
        for k in range(count)
    ]
    columns = ("", "norm", "in top direction", "unique (squared)", "unique (norm)")
    show("stage heads; last columns: joint cosine of top directions", (*columns, *(f"{k}" for k in range(count))), rows)
    for k, sides in enumerate(report.get("loading_tokens", [])):
        for side, entries in sides.items():
            print(f"head {k} {side}: " + " ".join(repr(entry["token"]) for entry in entries))


def show_beta_sweep(report: Mapping[str, Any]) -> None:
    """What scaling all heads, or dropping one, costs."""
    rows = [(f"all heads x {e['beta']:g}", e["product_bpb"], f"{e['difference']:+.4f}") for e in report["all"]]
    rows += [(f"without head {e['stage']}", e["product_bpb"], f"{e['difference']:+.4f}") for e in report["without"]]
    show("product of all experts with scaled heads", ("heads", "bits per byte", "difference"), rows)


def show_probes(report: Mapping[str, Any]) -> None:
    """Texts of one model by prompt and mode, ranks and rates."""
    for row in report["probes"]:
        ranks = row.get("ranks", {})
        rank = ", ".join(f"{name} {value}" for name, value in ranks.items())
        title = f"{row['prompt']!r}" + (f": rank of {row['target_token']!r}: {rank}" if ranks else "")
        texts = [(mode, repr(found["text"]), found["looped"]) for mode, found in row["texts"].items()]
        show(title, ("mode", "greedy text", "loops"), texts, texts=2)
    summary = report["summary"]
    rows = [(mode, rate, summary["mean_depth"][mode]) for mode, rate in summary["loop_rate"].items()]
    show(f"{report['model']}: {len(report['probes'])} prompts", ("mode", "loop rate", "mean stages"), rows)
    ranks = summary["ranks"]
    if "wins" in ranks:
        print(
            f"mean target rank: product {ranks['mean_rank_product']:.1f}, shared head alone "
            f"{ranks['mean_rank_final_path']:.1f}; wins/ties/losses {ranks['wins']}/{ranks['ties']}/{ranks['losses']}"
        )


def show_probe_grid(reports: Sequence[Mapping[str, Any]]) -> None:
    """Texts of several checkpoints by prompt, in their first mode."""
    from stagewise.evaluation.probes import grid

    mode = reports[0]["modes"][0]
    names = [str(report["model"]) for report in reports]
    rows = [tuple(row) for row in grid(reports, mode)]
    show(f"greedy text, mode {mode}", ("prompt", *names), rows, texts=len(names) + 1)
