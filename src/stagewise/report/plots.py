"""Charts as inline SVG, written by hand.

- No plotting library: a chart is a string, colours are CSS variables of the page, so one drawing serves light and dark.
- Lines carry their own labels at the right end, pushed apart where they would overlap: no legend to look up.
- Every series keeps its points in `data-points`, from which the page's script shows exact values under the pointer.
- `standalone` adds the colours to a chart, so that it can also be kept as an .svg file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape

WIDE, NARROW = 1000, 520  # drawing widths of a chart that fills the page and of one of two side by side
STAGE_COLOURS = 8  # --expert-0 .. --expert-7, then round again
PRODUCT_COLOUR = "var(--ink)"

LIGHT = (
    "--ink:#1b1f24;--muted:#667080;--line:#e3e6ea;--card:#fff;--accent:#2f7de1;"
    "--expert-0:#0a9494;--expert-1:#2f7de1;--expert-2:#7a5be0;--expert-3:#d1479b;"
    "--expert-4:#d9660f;--expert-5:#a08900;--expert-6:#4a9636;--expert-7:#8a6d5a;"
)
DARK = (
    "--ink:#e7eaee;--muted:#98a2ae;--line:#2a3037;--card:#171b1f;--accent:#6aa7f5;"
    "--expert-0:#2cc4bd;--expert-1:#5fa2f7;--expert-2:#a48bf5;--expert-3:#ee74ba;"
    "--expert-4:#f2904a;--expert-5:#d6bd3a;--expert-6:#7cc768;--expert-7:#b99a86;"
)


@dataclass(frozen=True)
class Series:
    """One line of a chart: points (x, y), with optional intervals (low, high) and marker colours, one a point."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str = PRODUCT_COLOUR
    dashed: bool = False
    markers: bool = False
    faint: bool = False
    intervals: Sequence[tuple[float, float]] = field(default=())
    marker_colours: Sequence[str] = field(default=())


def stage_colour(stage: int) -> str:
    """The colour that expert `stage` has everywhere: a CSS colour."""
    return f"var(--expert-{stage % STAGE_COLOURS})"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover [low, high]; the outer ones lie on or outside the range."""
    if high <= low:
        high = low + max(abs(low) * 0.1, 1e-6)
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def short_number(value: float) -> str:
    """A tick label: 12000 -> 12k, 0.25 -> 0.25, never more digits than the number has."""
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            scale = {"B": 1e9, "M": 1e6, "k": 1e3}[suffix]
            return f"{value / scale:.4g}{suffix}"
    return f"{value:.6g}"


def thin(points: Sequence[tuple[float, float]], limit: int = 200) -> list[tuple[float, float]]:
    """At most `limit` points: runs of neighbours are replaced by their mean, so spikes shrink."""
    size = math.ceil(len(points) / limit) if points else 1
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    y_format: Callable[[float], str] = lambda v: f"{v:.4f}",
    x_format: Callable[[float], str] = short_number,
    tick_format: Callable[[float], str] = short_number,
    y_range: tuple[float, float] | None = None,
    width: int = WIDE,
    height: int = 320,
) -> str:
    """An SVG with one line per series, labelled at its right end; points that are not finite are left out.

    `y_range` (low, high) cuts off what lies outside, so that the start of a loss curve does not flatten its end.
    """
    lines = [_finite(s) for s in series]
    lines = [s for s in lines if s.points]
    if not lines:
        return ""
    xs = [x for s in lines for x, _ in s.points]
    ys = [y for s in lines for _, y in s.points] + [v for s in lines for pair in s.intervals for v in pair]
    y_low, y_high = y_range or (min(ys), max(ys))
    y_marks = ticks(y_low, y_high)
    y_low, y_high = y_marks[0], y_marks[-1]
    labels = [s for s in lines if not s.faint]
    left, top, bottom = _left_margin(tick_format(mark) for mark in y_marks), 14, 46
    right = 24 + min(max((len(s.name) for s in labels), default=0) * 7, 190)
    x_low, x_high = min(xs), max(xs)
    pad = (x_high - x_low) * (0.06 if x_ticks else 0.0) or (0.5 if x_high == x_low else 0.0)
    x_low, x_high = x_low - pad, x_high + pad

    def px(x: float) -> float:
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def py(y: float) -> float:
        return top + (y_high - y) / (y_high - y_low) * (height - top - bottom)

    out = [_open(title, width, height)]
    for mark in y_marks:
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(mark):.1f}" y2="{py(mark):.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{py(mark) + 4:.1f}" text-anchor="end">{tick_format(mark)}</text>')
    if x_ticks is None:
        x_ticks = [(t, short_number(t)) for t in ticks(x_low, x_high, 6) if x_low <= t <= x_high]
    for x, text in x_ticks:
        out.append(
            f'<text x="{px(x):.1f}" y="{height - bottom + 18}" text-anchor="middle">{escape(text, quote=False)}</text>'
        )
    out.append(_axis_titles(x_label, y_label, left, right, width, height))
    name = "clip-" + "".join(c if c.isalnum() else "-" for c in title.lower())
    out.append(
        f'<clipPath id="{name}"><rect x="{left - 6}" y="{top - 6}" width="{width - left - right + 12}" '
        f'height="{height - top - bottom + 12}"/></clipPath><g clip-path="url(#{name})">'
    )
    out.extend(_draw_series(s, i, px, py, x_format, y_format) for i, s in enumerate(lines))
    out.append("</g>")
    out.append(_end_labels(labels, px, py, top, height - bottom, width - right))
    return "".join(out) + "</svg>"


def bar_chart(
    bars: Sequence[tuple[str, float, str]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_format: Callable[[float], str] = lambda v: f"{100 * v:.1f}%",
    tick_format: Callable[[float], str] = lambda v: f"{100 * v:.3g}%",
    width: int = WIDE,
    height: int = 280,
) -> str:
    """An SVG of vertical bars (label, value, colour), each with its value written above it."""
    if not bars:
        return ""
    marks = ticks(0.0, max(value for _, value, _ in bars) or 1.0, 4)
    left, top, bottom, right = _left_margin(tick_format(mark) for mark in marks), 24, 46, 24
    slot = (width - left - right) / len(bars)
    bar_width = min(slot * 0.62, 96)

    def py(y: float) -> float:
        return top + (marks[-1] - y) / marks[-1] * (height - top - bottom)

    out = [_open(title, width, height)]
    for mark in marks:
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py(mark):.1f}" y2="{py(mark):.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{py(mark) + 4:.1f}" text-anchor="end">{tick_format(mark)}</text>')
    for i, (label, value, colour) in enumerate(bars):
        centre, name = left + slot * (i + 0.5), escape(label, quote=False)
        out.append(
            f'<rect x="{centre - bar_width / 2:.1f}" y="{py(value):.1f}" width="{bar_width:.1f}" '
            f'height="{max(py(0) - py(value), 0):.1f}" rx="3" fill="{colour}"/>'
            f'<text class="value" x="{centre:.1f}" y="{py(value) - 7:.1f}" text-anchor="middle">'
            f"{y_format(value)}</text>"
            f'<text x="{centre:.1f}" y="{height - bottom + 18}" text-anchor="middle">{name}</text>'
        )
    out.append(_axis_titles(x_label, y_label, left, right, width, height))
    return "".join(out) + "</svg>"


def standalone(svg: str) -> str:
    """The same chart as a file of its own: namespace and colours inside."""
    head, rest = svg.split(">", 1)
    style = (
        f"svg{{{LIGHT}background:var(--card);font:13px system-ui,sans-serif}}"
        f"@media(prefers-color-scheme:dark){{svg{{{DARK}}}}}"
        "text{fill:var(--muted)}.grid{stroke:var(--line)}.label,.value{font-weight:600}.value{fill:var(--ink)}"
    )
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style}</style>{rest}\n'


def _left_margin(labels: Iterable[str]) -> int:
    """Room for the tick labels and the axis title beside them."""
    return 34 + 8 * max(map(len, labels))


def _open(title: str, width: int, height: int) -> str:
    return f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'


def _axis_titles(x_label: str, y_label: str, left: int, right: int, width: int, height: int) -> str:
    x_middle = (left + width - right) / 2
    y_middle = (height - 32) / 2
    return (
        f'<text class="axis-title" x="{x_middle:.1f}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x_label, quote=False)}</text>"
        f'<text class="axis-title" transform="translate(15 {y_middle:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label, quote=False)}</text>"
    )


def _finite(s: Series) -> Series:
    keep = [i for i, (x, y) in enumerate(s.points) if math.isfinite(x) and math.isfinite(y)]
    intervals = [s.intervals[i] for i in keep] if len(s.intervals) == len(s.points) else []
    colours = [s.marker_colours[i] for i in keep] if s.marker_colours else []
    return replace(s, points=[s.points[i] for i in keep], intervals=intervals, marker_colours=colours)


def _draw_series(
    s: Series,
    index: int,
    px: Callable[[float], float],
    py: Callable[[float], float],
    x_format: Callable[[float], str],
    y_format: Callable[[float], str],
) -> str:
    out = []
    drawn = list(s.points) if s.markers else thin(s.points)
    path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in drawn)
    shown = [[round(px(x), 1), round(py(y), 1), x_format(x), y_format(y)] for x, y in drawn]
    data = "" if s.faint else f' class="series" data-name="{escape(s.name)}" data-points="{escape(json.dumps(shown))}"'
    style = ' stroke-dasharray="5 4"' if s.dashed else ""
    opacity = ' opacity="0.3"' if s.faint else ""
    out.append(f'<g{data} style="color:{s.colour}"{opacity}>')
    for (x, _), (low, high) in zip(s.points, s.intervals, strict=False):
        at = px(x) + 3 * index
        out.append(
            f'<path d="M{at:.1f} {py(low):.1f}V{py(high):.1f}m-4 0h8M{at - 4:.1f} {py(low):.1f}h8" '
            'stroke="currentColor" stroke-width="1.2" fill="none" opacity=".65"/>'
        )
    out.append(
        f'<polyline points="{path}" fill="none" stroke="currentColor" stroke-width="2" '
        f'stroke-linejoin="round" stroke-linecap="round"{style}/>'
    )
    if s.markers:
        fills = s.marker_colours or ["currentColor"] * len(drawn)
        out.extend(
            f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="4.5" fill="{fill}" stroke="var(--card)" '
            f'stroke-width="1.5"><title>{escape(s.name, quote=False)}: {y_format(y)}</title></circle>'
            for (x, y), fill in zip(drawn, fills, strict=True)
        )
    return "".join(out) + "</g>"


def _last_level(points: Sequence[tuple[float, float]]) -> float:
    tail = points[-max(1, len(points) // 25) :]
    return sum(y for _, y in tail) / len(tail)


def _end_labels(
    lines: Sequence[Series],
    px: Callable[[float], float],
    py: Callable[[float], float],
    top: float,
    bottom: float,
    edge: float,
) -> str:
    gap = 15.0
    placed = sorted(((py(_last_level(s.points)), s) for s in lines), key=lambda pair: pair[0])
    heights = [y for y, _ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    overflow = heights[-1] - bottom if heights else 0.0
    if overflow > 0:
        heights[-1] -= overflow
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    out = []
    for (true_y, s), y in zip(placed, heights, strict=True):
        end = px(s.points[-1][0])
        if abs(true_y - y) > 3 or edge - end > 12:
            out.append(
                f'<path d="M{end + 5:.1f} {true_y:.1f}L{edge + 6:.1f} {y:.1f}" stroke="{s.colour}" '
                'stroke-width="1" opacity=".45" fill="none"/>'
            )
        out.append(
            f'<text class="label" x="{edge + 10:.1f}" y="{y + 4:.1f}" style="fill:{s.colour}">'
            f"{escape(s.name, quote=False)}</text>"
        )
    return "".join(out)
