"""The report: one HTML page that needs nothing but itself.

- Style, script, charts and data are inside the page; its content security policy forbids every request.
- A section exists only where there is something measured to show, and says with what setting it was measured.
- One colour per expert, the same in every chart, table and sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from stagewise.hub.measurements import plain_name
from stagewise.report import plots
from stagewise.report.content import Content, Sample, finite
from stagewise.report.plots import PRODUCT_COLOUR, Series, stage_colour

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


CERTIFICATE = {
    "epsilon": "disagreement promised at most",
    "delta": "chance that the promise is wrong",
    "loss": "what disagrees",
    "safety": "safety factor certified",
    "disagreement": "disagreement observed",
    "n": "prompts",
    "documents": "documents they come from",
    "p_value": "p-value",
    "mean_stages": "stages a token takes, mean",
}


def render(content: Content) -> str:
    """The whole page as a string."""
    parts = [
        _header(content),
        _samples(content),
        _curves(content),
        _depth(content),
        _elastic(content),
        _agreement(content),
        _probes(content),
        _setting(content),
    ]
    return document(f"{content.title} - stagewise report", parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A page of ready-made parts, with style, colours and script inside and every request forbidden."""
    colours = f":root{{{plots.LIGHT}}}\n@media(prefers-color-scheme:dark){{:root{{{plots.DARK}}}}}\n"
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title, quote=False)}</title>\n<style>\n{colours}{_asset('page.css')}</style>\n"
        f"</head>\n<body>\n<main>\n{body}\n<footer>Written by stagewise. Every figure was measured; what was not is "
        'left out.</footer>\n</main>\n<div id="tip" role="tooltip"></div>\n'
        f"<script>\n{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return resources.files("stagewise.report").joinpath(name).read_text(encoding="utf-8")


def section(title: str, body: str, about: str = "") -> str:
    """A titled block; nothing when the body is empty."""
    if not body:
        return ""
    note = f'<p class="about">{about}</p>' if about else ""
    return f"<section>\n<h2>{title}</h2>\n{note}{body}\n</section>"


def figure(caption: str, svg: str) -> str:
    """A chart with its caption, if there is one; nothing when there is no chart."""
    words = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{words}{svg}</figure>" if svg else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    """An HTML table of ready-made cells; `total` sets the last row in bold."""
    if not rows:
        return ""
    lines = ["".join(f"<td>{cell}</td>" for cell in row) for row in rows]
    body = "".join(
        f'<tr class="total">{line}</tr>' if total and i == len(lines) - 1 else f"<tr>{line}</tr>"
        for i, line in enumerate(lines)
    )
    titles = "".join(f"<th>{name}</th>" for name in head)
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{body}</tbody></table>"


def dot(stage: int) -> str:
    """The coloured square of an expert."""
    return f'<span class="dot" style="background:{stage_colour(stage)}"></span>'


def number(value: Any, digits: int = 4) -> str:
    """A figure, or a dash where there is none."""
    return f"{value:.{digits}f}" if finite(value) else "&ndash;"


def percent(value: Any, digits: int = 1) -> str:
    """A share as percent, or a dash."""
    return f"{100 * value:.{digits}f}%" if finite(value) else "&ndash;"


def count(value: Any) -> str:
    """A whole number with separators, or a dash."""
    return f"{int(value):,}" if finite(value) else "&ndash;"


def _header(c: Content) -> str:
    kind = {"none": "trained end to end", "residual_logop": "residual Log-OP training"}
    mode = c.config.get("poe_mode")
    lead = c.recipe.get("description") or ""
    if not lead and mode:
        layers = c.config.get("poe_stage_layers") or []
        lead = (
            f"{c.config.get('num_hidden_layers')} layers of width {c.config.get('hidden_size')}"
            + (f" in {len(layers)} stages of {', '.join(map(str, layers))}" if len(layers) > 1 else "")
            + f"; {kind.get(mode, f'{mode} training')}."
        )
    tiles = []
    ev = c.evaluation
    for key, name in (("product_bpb", "product of all experts"), ("final_path_bpb", "final path")):
        if finite(ev.get(key)) and not (key == "final_path_bpb" and "product_bpb" in ev):
            tiles.append((number(ev[key]), f"bits per byte, {name}", _on_tokens(ev)))
    stage_bpb = ev.get("stage_bpb") or []
    if stage_bpb:
        best = min(range(len(stage_bpb)), key=lambda k: stage_bpb[k])
        tiles.append((number(stage_bpb[best]), "bits per byte, best single expert", f"expert {best}"))
        depth = c.stage_depths()
        if len(depth) == len(stage_bpb):
            tiles.append((number(stage_bpb[0]), "bits per byte, expert 0 alone", f"{depth[0]} of {depth[-1]} layers"))
    if finite(ev.get("product_accuracy")):
        tiles.append((percent(ev["product_accuracy"]), "next token right, product", ""))
    for label in ("parameters", "tokens trained", "training time"):
        if label in c.setting:
            tiles.append((c.setting[label], label, ""))
    cells = "".join(
        f'<div class="tile"><div class="figure">{value}</div><div class="name">{name}</div>'
        f'<div class="note">{note}</div></div>'
        for value, name, note in tiles
    )
    tile_block = f'<div class="tiles">{cells}</div>' if cells else ""
    return (
        f'<header><p class="eyebrow">stagewise report</p><h1>{escape(c.title, quote=False)}</h1>'
        f'<p class="lead">{escape(lead, quote=False)}</p></header>{tile_block}'
    )


def _on_tokens(ev: dict[str, Any]) -> str:
    return f"{count(ev['tokens'])} validation tokens" if finite(ev.get("tokens")) else ""


def _samples(c: Content) -> str:
    rules = "".join(f" {escape(rule, quote=False)}" for rule in dict.fromkeys(s.rule for s in c.samples))
    return section(
        "What the experts say",
        "".join(sample_block(s) for s in c.samples),
        "Each token carries the colour of the expert that decided it; point at a token, or tab to it, to see what "
        f"every expert and their product would have said there.{rules}",
    )


def sample_block(sample: Sample) -> str:
    """A continuation as coloured tokens, with each predictor's top tokens as data for the hover panel."""
    stages = max((len(t.top) - 1 for t in sample.tokens), default=0)
    used = [sum(t.stage == k for t in sample.tokens) for k in range(stages)]
    legend = "".join(
        f"<span>{dot(k)}expert {k}: {used[k]} of {len(sample.tokens)} tokens</span>" for k in range(stages)
    )
    spans = []
    for token in sample.tokens:
        columns = [
            {
                "name": f"expert {k}" if k < stages else "product",
                "colour": stage_colour(k) if k < stages else PRODUCT_COLOUR,
                "top": [[visible(text), round(p, 4)] for text, p in top],
            }
            for k, top in enumerate(token.top)
        ]
        best = ", ".join(f"{column['name']} {column['top'][0][0]}" for column in columns if column["top"])
        spans.append(
            f'<span class="token" tabindex="0" style="--stage:{stage_colour(token.stage)}" data-stage="{token.stage}" '
            f'data-shown="{escape(visible(token.text))}" data-note="decided by expert {token.stage}" '
            f'data-top="{escape(json.dumps(columns, ensure_ascii=False))}" aria-label="{escape(best)}">'
            f"{escape(token.text, quote=False)}</span>"
        )
    return (
        f'<div class="legend">{legend}</div><p class="sample"><span class="prompt">{escape(sample.prompt, quote=False)}'
        f"</span>{''.join(spans)}</p>"
    )


def visible(text: str) -> str:
    """A token with its white space made visible, for a list of tokens."""
    return text.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u2423") or "\u2205"


def curve_colour(name: str) -> str:
    """The colour of a curve by its name: an expert's own, ink for everything else."""
    digits = name.rpartition(" ")[2]
    return stage_colour(int(digits)) if name.startswith("expert ") and digits.isdigit() else PRODUCT_COLOUR


def _curves(c: Content) -> str:
    if c.curves is None:
        return ""
    charts = []
    for caption, curves, y_label, digits in (
        ("Training loss", c.curves.loss, "nats per token", 3),
        ("Validation", c.curves.validation, "bits per byte", 4),
    ):
        series = [
            Series(name, points, curve_colour(name), dashed=name == "final path", markers=len(points) <= 30)
            for name, points in curves.items()
        ]
        svg = plots.line_chart(
            series,
            y_range=_settled_range(curves) if digits == 3 else None,
            title=caption,
            x_label="step",
            y_label=y_label,
            y_format=partial(_fixed, digits=digits),
            x_format=lambda v: f"step {v:,.0f}",
        )
        charts.append(figure(caption, svg))
    return section(
        "Training", "".join(charts), "Losses are means over neighbouring steps; point at a curve for values."
    )


def _fixed(value: float, digits: int) -> str:
    return f"{value:.{digits}f}"


def _settled_range(curves: dict[str, list[tuple[float, float]]]) -> tuple[float, float] | None:
    """From the lowest loss to what all curves are below after the first twentieth of training."""
    points = [point for curve in curves.values() for point in curve if finite(point[1])]
    if not points:
        return None
    start, end = min(x for x, _ in points), max(x for x, _ in points)
    return min(y for _, y in points), max(y for x, y in points if x >= start + 0.05 * (end - start))


def _depth(c: Content) -> str:
    ev = c.evaluation
    stage_bpb, prefix_bpb = ev.get("stage_bpb") or [], ev.get("prefix_bpb") or []
    rows: list[list[str]] = []
    intervals = ev.get("intervals") or {}
    depths = c.stage_depths()
    count_of = len(stage_bpb)
    if len(depths) != count_of:
        depths = list(range(1, count_of + 1))
    for k in range(count_of):
        rows.append(
            [
                f"{dot(k)}expert {k}",
                f"{depths[k]}",
                number(stage_bpb[k]) + _interval(_at(intervals.get("stage_bpb"), k)),
                percent((ev.get("stage_accuracy") or [None] * count_of)[k], 2),
                number(prefix_bpb[k]) + _interval(_at(intervals.get("prefix_bpb"), k)) if k < len(prefix_bpb) else "",
                percent((ev.get("prefix_accuracy") or [None] * count_of)[k], 2),
            ]
        )
    if not rows:
        if not finite(ev.get("final_path_bpb")):
            return ""
        rows = [["final path", number(ev["final_path_bpb"]), percent(ev.get("final_path_accuracy"), 2)]]
        return section("Bits per byte", table(["path", "bits per byte", "accuracy"], rows), _evaluation_setting(ev))
    chart = plots.line_chart(
        [
            Series(
                "one expert",
                list(zip(map(float, depths), stage_bpb, strict=True)),
                "var(--accent)",
                dashed=True,
                markers=True,
                marker_colours=[stage_colour(k) for k in range(count_of)],
                intervals=[(low, high) for low, high in intervals.get("stage_bpb", [])],
            ),
            Series(
                "product so far",
                list(zip(map(float, depths), prefix_bpb, strict=True)),
                PRODUCT_COLOUR,
                markers=True,
                intervals=[(low, high) for low, high in intervals.get("prefix_bpb", [])],
            ),
        ],
        title="Bits per byte by depth",
        x_label="trunk layers evaluated" if c.stage_depths() else "stages evaluated",
        y_label="bits per byte",
        x_ticks=[(float(d), f"{d}") for d in depths],
        x_format=lambda v: f"{v:.0f} layers",
        height=300,
    )
    others = []
    for key, name in (
        ("product", "product of all experts, renormalised"),
        ("mean_stage", "mean of the experts' own"),
        ("entropy_weighted", "product weighted by each expert's entropy"),
        ("final_path", "final path (last layer, shared head)"),
    ):
        if finite(ev.get(f"{key}_bpb")):
            others.append(
                [
                    name,
                    number(ev[f"{key}_bpb"]) + _interval(intervals.get(f"{key}_bpb")),
                    percent(ev.get(f"{key}_accuracy"), 2),
                ]
            )
    if finite(ev.get("crossover_gap")):
        others.append(["product minus last expert", f"{ev['crossover_gap']:+.4f}", ""])
    head = ["", "layers", "alone: bits per byte", "accuracy", "product so far: bits per byte", "accuracy"]
    return section(
        "Bits per byte by depth",
        figure("Lower is better", chart)
        + table(head, rows)
        + "<br>"
        + table(["", "bits per byte", "accuracy"], others),
        _evaluation_setting(ev),
    )


def _at(values: Any, k: int) -> Any:
    return values[k] if isinstance(values, list) and k < len(values) else None


def _interval(pair: Any) -> str:
    if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(map(finite, pair)):
        return ""
    return f' <span class="interval">[{pair[0]:.4f}, {pair[1]:.4f}]</span>'


def _evaluation_setting(ev: dict[str, Any]) -> str:
    parts = []
    if finite(ev.get("tokens")):
        parts.append(f"Validation text: {count(ev['tokens'])} tokens")
        if finite(ev.get("bytes")):
            parts[-1] += f", {count(ev['bytes'])} bytes"
        if finite(ev.get("documents")):
            parts[-1] += f", {count(ev['documents'])} documents"
    if ev.get("intervals"):
        parts.append("brackets are 95% bootstrap intervals over documents")
    return "; ".join(parts) + "." if parts else ""


def _elastic(c: Content) -> str:
    blocks = []
    if c.exit_shares:
        chart = plots.bar_chart(
            [(f"expert {k}", share, stage_colour(k)) for k, share in enumerate(c.exit_shares)],
            title="Exit depth",
            x_label="expert that emitted the token",
            y_label="share of tokens",
            width=plots.NARROW,
        )
        blocks.append(section("Where tokens leave", figure("Exit depth", chart), escape(c.exit_setting, quote=False)))
    if c.acceptance:
        by_stage: dict[int, list[tuple[float, float]]] = {}
        for row in c.acceptance:
            by_stage.setdefault(int(row["draft_stage"]), []).append((float(row["k_draft"]), float(row["acceptance"])))
        lengths = sorted({x for points in by_stage.values() for x, _ in points})
        chart = plots.line_chart(
            [Series(f"expert {k}", sorted(pts), stage_colour(k), markers=True) for k, pts in sorted(by_stage.items())],
            title="Accepted drafts",
            x_label="draft length (tokens)",
            y_label="accepted / drafted",
            x_ticks=[(x, f"{x:.0f}") for x in lengths],
            y_format=lambda v: f"{100 * v:.1f}%",
            tick_format=lambda v: f"{100 * v:.3g}%",
            width=plots.NARROW,
            height=280,
        )
        setting = escape(str(c.setting.get("acceptance setting", "")), quote=False)
        blocks.append(section("Accepted drafts", figure("By drafting expert and draft length", chart), setting))
    out = f'<div class="pair">{"".join(blocks)}</div>' if len(blocks) == 2 else "".join(blocks)
    rows = [
        [
            number(row.get("cap"), 3),
            escape(str(row.get("rate_over", ""))),
            percent(row.get("routed_share"), 2),
            number(row.get("threshold"), 3),
            number(row.get("accuracy_loss_over_all"), 4),
            f"{row['projected_speedup']:.3f}x" if finite(row.get("projected_speedup")) else "&ndash;",
        ]
        for row in c.routing
    ]
    head = ["regressions allowed", "as a share of positions", "answered by expert 0", "margin (nats)"]
    body = table([*head, "net accuracy loss", "projected speed-up"], rows)
    if c.bounds:
        cells = [[f"{k} to {k + 1}", number(bound)] for k, bound in enumerate(c.bounds)]
        body += "<br>" * bool(body) + table(["deepening the product from expert", "largest change (p99, nats)"], cells)
    if c.exits:
        names = [f"expert {k}" for k in range(len(c.exits[0]["exit_shares"]))]
        cells = [
            [f"{part.get('safety', 1.0):g}", *map(percent, part["exit_shares"]), percent(part.get("disagreement"), 2)]
            for part in c.exits
        ]
        body += "<br>" * bool(body) + table(["WAND safety", *names, "differ from the product"], cells)
    if c.certificate:
        pairs = [
            [
                CERTIFICATE[key],
                escape(f"{c.certificate[key]:.6g}" if finite(c.certificate[key]) else c.certificate[key]),
            ]
            for key in CERTIFICATE
            if key in c.certificate
        ]
        body += "<br>" * bool(body) + table(["certificate for early exits", ""], pairs)
    return out + section("Calibration", body)


def _agreement(c: Content) -> str:
    agreement = c.evaluation.get("agreement") or {}
    rows = agreement.get("matrix") or []
    names = [plain_name(name) for name in agreement.get("names") or []]
    low = min((v for row in rows for v in row), default=0.0)
    cells = []
    for name, row in zip(names, rows, strict=True):
        shades = [round(8 + 52 * (v - low) / max(1 - low, 1e-9)) for v in row]
        cells.append(
            [escape(name)]
            + [
                f'<span class="shade" style="background:color-mix(in srgb,var(--accent) {shade}%,transparent)">'
                f"{percent(v)}</span>"
                for v, shade in zip(row, shades, strict=True)
            ]
        )
    body = table(["", *map(escape, names)], cells)
    errors = c.evaluation.get("expected_calibration_error") or {}
    if errors:
        pairs = [[escape(plain_name(name)), number(value)] for name, value in errors.items()]
        body += "<br>" * bool(body) + table(["", "expected calibration error"], pairs)
    about = "Share of positions at which two predictors rank the same token first" if cells else ""
    if errors:
        about += (
            "; e" if about else "E"
        ) + "xpected calibration error: how far confidence is from accuracy, on average"
    return section("Agreement and confidence", body, about + ".")


def _probes(c: Content) -> str:
    if not c.probes:
        return ""
    modes = list(dict.fromkeys(mode for probe in c.probes for mode in probe["texts"]))
    rows = [
        [escape(str(probe["prompt"]), quote=False)]
        + [f"{escape(str(probe['texts'].get(mode, '')), quote=False)}" for mode in modes]
        for probe in c.probes
    ]
    body = (
        table(["prompt", *map(escape, modes)], rows)
        .replace("<td>", '<td class="text">')
        .replace("<th>", '<th class="text">')
    )
    return section("Probe prompts", body, "Greedy continuations.")


def _setting(c: Content) -> str:
    pairs = "".join(
        f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in c.setting.items() if not k.endswith(" setting")
    )
    body = f"<dl>{pairs}</dl>" if pairs else ""
    if c.recipe:
        text = escape(json.dumps(c.recipe, indent=2, ensure_ascii=False, default=str), quote=False)
        body += f"<br><details><summary>The recipe in full</summary><pre>{text}</pre></details>"
    return section("Setting", body)


def write_page(content: Content, out: Path, *, force: bool = False) -> Path:
    """Write the page to `out`; `FileExistsError` when something is there already and `force` is not set."""
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists already: give --force to replace it, or another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(render(content), encoding="utf-8")
    temporary.replace(out)
    return out
