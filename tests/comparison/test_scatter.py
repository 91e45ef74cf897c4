"""The scatter plot, by the coordinates that stand in it."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from rrsq.comparison.scatter import Axis, Level, Point, scatter


def drawn(points: list[Point], levels: list[Level], *, log: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(scatter(points, levels, Axis("bits"), Axis("KL", log), "a <picture>"))


def centres(svg: ElementTree.Element) -> list[tuple[float, float]]:
    return [(float(c.attrib["cx"]), float(c.attrib["cy"])) for c in svg.iter("circle")]


def heights_of_names(svg: ElementTree.Element) -> dict[str, float]:
    return {
        text.text or "": float(text.attrib["y"])
        for text in svg.iter("text")
        if text.attrib["class"].startswith("name")
    }


def test_logarithms_are_drawn_to_scale() -> None:
    points = [Point(4, 0.01, "a", 0), Point(8, 0.1, "b", 1), Point(16, 1.0, "c", 2)]
    (x0, y0), (x1, y1), (x2, y2) = centres(drawn(points, [], log=True))
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2
    assert (x2 - x1) / (x1 - x0) == pytest.approx(2, abs=0.01)
    ticks = [t.text for t in drawn(points, [], log=True).iter("text") if t.attrib["class"] == "tick"]
    assert {"0.01", "0.03", "0.1", "0.3", "1"} <= set(ticks)


def test_names_never_stand_on_each_other() -> None:
    points = [Point(4.2, 0.2 + 1e-4 * index, f"method {index}", index) for index in range(30)]
    svg = drawn(points, [Level(0.2, "noise floor")])
    heights = sorted(heights_of_names(svg).values())
    assert len(heights) == 31
    assert all(after - before >= 16.9 for before, after in pairwise(heights))
    bottom = float(svg.attrib["viewBox"].split()[-1])
    assert heights[0] > 0
    assert heights[-1] < bottom


def test_a_level_is_a_line_at_its_height() -> None:
    svg = drawn([Point(4, 1.0, "a", 0), Point(8, 3.0, "b", 1)], [Level(2.0, "floor")])
    (line,) = [line for line in svg.iter("line") if line.attrib["class"] == "level"]
    (_, upper), (_, lower) = sorted(centres(svg), key=lambda at: at[1])
    assert float(line.attrib["y1"]) == float(line.attrib["y2"]) == pytest.approx((upper + lower) / 2, abs=0.2)
    assert svg.attrib["aria-label"] == "a <picture>"


def test_errors_that_pass_zero_stay_inside_of_a_logarithmic_plot() -> None:
    svg = drawn([Point(4, 0.1, "a", 0, stderr=0.2), Point(5, 1.0, "b", 1, stderr=0.1)], [], log=True)
    height = float(svg.attrib["viewBox"].split()[-1])
    bars = [line for line in svg.iter("line") if line.attrib["class"].startswith("error")]
    ends = [float(bar.attrib[end]) for bar in bars for end in ("y1", "y2")]
    assert len(bars) == 2
    assert all(0 <= end <= height and math.isfinite(end) for end in ends)


@pytest.mark.parametrize("log", [True, False])
def test_one_value_alone_has_a_scale(log: bool) -> None:
    svg = drawn([Point(4, 2.0, "a", 0), Point(4, 2.0, "b", 1)], [], log=log)
    text = ElementTree.tostring(svg, encoding="unicode")
    assert not re.search(r"nan|inf", text)
    assert len([t for t in svg.iter("text") if t.attrib["class"] == "tick"]) >= 2
