"""A calibration as terminal tables; every table states units and setting in its title."""

from __future__ import annotations

from typing import Any

from stagewise.evaluation.tables import show


def show_calibration(result: dict[str, Any]) -> None:
    """The tables of a calibration."""
    setting = f"{result['tokens']:,} tokens of {result['data']['source']}, {result['dtype']}"
    rows: list[tuple[Any, ...]]
    rows = [(f"{j} -> {j + 1}", bound) for j, bound in enumerate(result["p99_bounds"])]
    show(f"exit bounds, 99th percentile, nats: {setting}", ("step", "bound"), rows)
    experts = len(result["p99_bounds"]) + 1
    rows = [(f"{e['safety']:g}", *e["exit_shares"], e["disagreement"]) for e in result["exits"]]
    stages = [f"stage {k}" for k in range(experts)]
    show("exits at a safety factor, share of tokens", ("safety", *stages, "differs from full"), rows)
    rows = [
        (
            f"{r['cap']:g} of {r['rate_over']}",
            f"{r['routed_share']:.2%}",
            r["threshold"],
            r["regression_over_routed"],
            r["regression_over_all"],
            r["accuracy_loss_over_all"],
            f"{r['projected_speedup']:.3f}x",
        )
        for r in result["routing"]
    ]
    columns = ("regression cap", "routed", "margin, nats", "of routed", "of all", "net accuracy loss", "projected")
    show("routing to stage 0: regressions are positions full gets right and stage 0 wrong", columns, rows)
    for name in ("speculation", "speculation_on_text"):
        table = result[name]
        rows = [
            (
                f"stage {r['draft_stage']}, {r['k_draft']} tokens",
                r["acceptance"],
                r["tokens_per_round"],
                f"{r['bandwidth_speedup']:.3f}x",
            )
            for r in table["rows"]
        ]
        title = f"acceptance (accepted / drafted) on {table['text']}, {table['tokens']:,} tokens"
        show(title, ("draft", "acceptance", "tokens/round", "bandwidth-bound"), rows)
    if "no_certificate" in result:
        print(result["no_certificate"])
        return
    c = result["certificate"]
    what = "texts" if c["loss"] == "text" else "tokens"
    print(
        f"certificate: with probability {1 - c['delta']:g}, unverified WAND at safety {c['safety']:g} differs from the "
        f"full model on at most {c['epsilon']:.1%} of {what}; {c['disagreement']:.2%} seen on {c['n']} prompts of "
        f"{c['prompt_tokens']} tokens continued by {c['new_tokens']}; mean stages {c['mean_stages']:.2f}"
    )
    if c["documents"] < c["n"]:
        print(f"note: its prompts come from {c['documents']} documents; prompts of one document are alike")
