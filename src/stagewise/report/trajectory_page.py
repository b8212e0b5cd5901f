"""The tables of a trajectory: which columns each has, how it is drawn, and the page that shows them all."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from stagewise.report import plots
from stagewise.report.page import document, figure, section, table
from stagewise.report.plots import PRODUCT_COLOUR, Series, stage_colour

Row = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """A table by step: columns are those of the rows whose names match `pattern`, in the rows' own order."""

    title: str
    pattern: str
    unit: str
    about: str
    drawn: str = ""  # pattern of the columns in the chart; all when empty
    percent: bool = False

    def columns(self, rows: Sequence[Row]) -> list[str]:
        """Names of the columns that at least one row has."""
        return list(dict.fromkeys(key for row in rows for key in row if re.fullmatch(self.pattern, key)))

    def chart(self, rows: Sequence[Row]) -> str:
        """One line per column over the steps; nothing when there are fewer than two steps."""
        series = []
        for name in self.columns(rows):
            points = [(float(row["step"]), float(row[name])) for row in rows if name in row]
            if re.fullmatch(self.drawn or ".*", name) and len(points) > 1:
                series.append(Series(label(name), points, colour(name), markers=len(points) <= 40))
        return plots.line_chart(
            series,
            title=self.title,
            x_label="training step",
            y_label=self.unit,
            y_format=(lambda v: f"{100 * v:.2f}%") if self.percent else (lambda v: f"{v:.4f}"),
            tick_format=(lambda v: f"{100 * v:.4g}%") if self.percent else plots.short_number,
            x_format=lambda v: f"step {v:,.0f}",
        )


TABLES = {
    "bpb": Table(
        "Bits per byte",
        r"(product|mean_stage|entropy_weighted|final_path|stage|prefix)_bpb(_\d+)?|crossover_gap",
        "bits per byte",
        "The product of all experts is renormalised; crossover gap is the product minus the last expert alone.",
        drawn=r"product_bpb|stage_bpb_\d+",
    ),
    "accuracy": Table(
        "Next-token accuracy",
        r"(product|final_path|stage)_accuracy(_\d+)?",
        "share of tokens",
        "Share of validation tokens whose right continuation is ranked first.",
        drawn=r"product_accuracy|stage_accuracy_\d+",
        percent=True,
    ),
    "bounds": Table(
        "WAND exit bounds",
        r"bound_\d+_\d+",
        "nats",
        "99th percentile of how far one more expert moves the product.",
    ),
    "exits": Table(
        "Exit depth",
        r"exit_share_\d+|wand_disagreement",
        "share of tokens",
        "Where tokens leave under WAND at safety 1, and the share that differs from the full product's.",
        drawn=r"exit_share_\d+",
        percent=True,
    ),
    "acceptance": Table(
        "Accepted drafts",
        r"acceptance_\d+",
        "accepted / drafted",
        "Greedy drafts of one expert that the product keeps, on the product's own continuations.",
        percent=True,
    ),
    "routing": Table(
        "Confidence routing",
        r"(routed_share|projected_speedup)_\w+",
        "share of positions",
        "Largest share of positions that expert 0 may answer alone while the rate of regressions stays within the cap, "
        "the rate taken over routed or over all positions, and the speed-up that share projects.",
        drawn=r"routed_share_\w+",
        percent=True,
    ),
}


def label(name: str) -> str:
    """A column's name for readers."""
    words = {
        "product_bpb": "product",
        "product_accuracy": "product",
        "mean_stage_bpb": "mean of experts",
        "entropy_weighted_bpb": "entropy-weighted",
        "final_path_bpb": "final path",
        "final_path_accuracy": "final path",
        "crossover_gap": "crossover gap",
        "wand_disagreement": "differ from product",
    }
    if name in words:
        return words[name]
    if found := re.fullmatch(r"bound_(\d+)_(\d+)", name):
        return f"expert {found[1]} to {found[2]}"
    if found := re.fullmatch(r"prefix_bpb_(\d+)", name):
        return f"product of {int(found[1]) + 1}"
    if found := re.fullmatch(r"(?:stage_bpb|stage_accuracy|exit_share|acceptance)_(\d+)", name):
        return f"expert {found[1]}"
    if found := re.fullmatch(r"(routed_share|projected_speedup)_(\w+)", name):
        return f"{found[1].replace('_', ' ')}, over {found[2]}"
    return name.replace("_", " ")


def colour(name: str) -> str:
    """A column's colour: an expert's own, ink for the product."""
    found = re.search(r"_(\d+)", name)
    if found:
        return stage_colour(int(found[1]))
    return {"routed_share_all": stage_colour(0), "routed_share_routed": stage_colour(1)}.get(name, PRODUCT_COLOUR)


def table_rows(table: Table, rows: Sequence[Row]) -> tuple[list[str], list[list[Any]]]:
    """Column names and cells for a CSV file; no cells when no row has a column of this table."""
    columns = table.columns(rows)
    return ["step", *columns], [
        [row["step"], *(row.get(name, "") for name in columns)] for row in rows
    ] if columns else []


def render_trajectory(source: str, setting: dict[str, Any], rows: Sequence[Row], charts: dict[str, str]) -> str:
    """The page with every table and its chart."""
    parts = [
        '<header><p class="eyebrow">stagewise trajectory</p>'
        f"<h1>{escape(source.rstrip('/').rpartition('/')[2], quote=False)}</h1>"
        f'<p class="lead">{len(rows)} checkpoints, {setting["tokens"]:,} tokens each</p></header>'
    ]
    for name, spec in TABLES.items():
        columns, cells = table_rows(spec, rows)
        if not cells:
            continue
        shown = [
            [f"{row[0]:,}", *(_cell(v, column) for v, column in zip(row[1:], columns[1:], strict=True))]
            for row in cells
        ]
        head = ["step", *(escape(label(column)) for column in columns[1:])]
        chart = figure("", charts.get(name, ""))
        parts.append(section(spec.title, chart + table(head, shown), spec.about))
    facts = "".join(f"<dt>{escape(k.replace('_', ' '))}</dt><dd>{escape(str(v))}</dd>" for k, v in setting.items())
    parts.append(section("Setting", f"<dl>{facts}</dl>"))
    return document(f"{source} - trajectory", parts)


def _cell(value: Any, column: str) -> str:
    if value == "":
        return "&ndash;"
    if column.startswith("projected_speedup"):
        return f"{value:.3f}x"
    if "share" in column or "accuracy" in column or column.startswith(("acceptance", "wand_")):
        return f"{100 * value:.2f}%"
    return f"{value:+.6f}" if column == "crossover_gap" else f"{value:.4f}"
