"""Charts: every point is where its value says, labels never overlap, and the markup is well formed."""

import json
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from stagewise.report.plots import Series, bar_chart, line_chart, standalone, thin, ticks


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (0.7213, 0.7391), (-3.0, 12000.0), (1.5, 1.5), (0.0, 0.0)])
def test_ticks_cover_the_range_with_a_few_round_numbers(low, high):
    marks = ticks(low, high)
    assert marks[0] <= low + 1e-9 and marks[-1] >= high - 1e-9
    assert 2 <= len(marks) <= 8
    steps = {round((b - a) / (marks[1] - marks[0]), 6) for a, b in zip(marks, marks[1:], strict=False)}
    assert steps == {1.0}


def test_thinning_keeps_the_mean_and_the_limit():
    points = [(float(i), math.sin(i)) for i in range(1000)]
    thinned = thin(points, 100)
    assert len(thinned) == 100
    assert sum(y for _, y in thinned) / 100 == pytest.approx(sum(y for _, y in points) / 1000)


def test_points_lie_where_their_values_say():
    svg = line_chart([Series("a", [(0, 0), (1, 10), (2, 5)], markers=True)], title="t", x_label="x", y_label="y")
    circles = [(float(c["cx"]), float(c["cy"])) for c in _attributes(svg, "circle")]
    (x0, y0), (x1, y1), (x2, y2) = circles
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.11)
    assert (y0 - y2) * 2 == pytest.approx(y0 - y1, abs=0.21)
    shown = json.loads(_attributes(svg, "g")[1]["data-points"])
    assert [row[3] for row in shown] == ["0.0000", "10.0000", "5.0000"]


def test_end_labels_of_equal_curves_do_not_overlap():
    lines = [Series(f"expert {k}", [(0, 1.0), (1, 0.5 + 1e-5 * k)]) for k in range(6)]
    svg = line_chart(lines, title="t", x_label="x", y_label="y")
    heights = sorted(float(t["y"]) for t in _attributes(svg, "text") if t.get("class") == "label")
    assert len(heights) == 6
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) >= 14.9
    assert heights[-1] <= 320


def test_values_that_are_not_finite_are_left_out():
    svg = line_chart([Series("a", [(0, 1), (1, math.nan), (2, 3)], markers=True)], title="t", x_label="x", y_label="y")
    assert len(_attributes(svg, "circle")) == 2
    assert "nan" not in svg
    assert line_chart([Series("a", [(0, math.nan)])], title="t", x_label="x", y_label="y") == ""


def test_bars_have_the_heights_of_their_values():
    svg = bar_chart([("a", 0.5, "red"), ("b", 0.25, "blue"), ("c", 0.0, "green")], title="t", x_label="x", y_label="y")
    a, b, c = (float(r["height"]) for r in _attributes(svg, "rect"))
    assert a == pytest.approx(2 * b, abs=0.15) and c == 0


def test_names_with_markup_are_escaped_and_a_file_of_its_own_is_valid_xml():
    svg = line_chart([Series("<b>&\"'", [(0, 1), (1, 2)])], title='"<t>', x_label="<x>", y_label="&")
    root = ElementTree.fromstring(standalone(svg))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "<b>" not in svg and "<x>" not in svg


def _attributes(svg: str, tag: str) -> list[dict[str, str]]:
    root = ElementTree.fromstring(re.sub(r"&ndash;", "-", svg))
    return [dict(e.attrib) for e in root.iter(tag)]
