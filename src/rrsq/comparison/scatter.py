"""A scatter plot as SVG: it stands in a page, takes its colours, and needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Level", "Point", "scatter"]

_WIDTH, _HEIGHT = 860, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 270, 14, 48
_LABEL = 17
_COLOURS = 8


@dataclass(frozen=True)
class Axis:
    """What is drawn along one side."""

    title: str
    log: bool = False


@dataclass(frozen=True)
class Point:
    """One mark, named beside the plot.

    Attributes:
        x, y: in the units of the axes, finite.
        label: its name, behind which its height is written.
        group: points of one group have one colour.
        shape: ``circle``, ``square`` or ``triangle``.
        stderr: of ``y``, drawn as a bar; None for none.
    """

    x: float
    y: float
    label: str
    group: int
    shape: str = "circle"
    stderr: float | None = None


@dataclass(frozen=True)
class Level:
    """A dashed line across the plot at ``y``, named beside it."""

    y: float
    label: str


def scatter(points: Sequence[Point], levels: Sequence[Level], x: Axis, y: Axis, description: str) -> str:
    """The plot. On a logarithmic axis all values must be positive.

    Names stand in a column right of the plot, in the order of their heights and never on each other, each
    with a line to its mark.
    """
    height = max(_HEIGHT, _TOP + _BOTTOM + _LABEL * (len(points) + len(levels) + 1))
    right, bottom = _WIDTH - _RIGHT, height - _BOTTOM
    spread = [value for p in points for value in (p.y - (p.stderr or 0), p.y + (p.stderr or 0))]
    positive = [value for value in spread if value > 0 or not y.log]
    across = _Scale([p.x for p in points], x.log, _LEFT, right)
    up = _Scale([*positive, *(p.y for p in points), *(level.y for level in levels)], y.log, bottom, _TOP)
    parts = [
        f'<svg class="scatter" viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(description)}">'
    ]
    for tick in up.ticks:
        at = up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{_LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in across.ticks:
        at = across(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{bottom + 18}" text-anchor="middle">{_short(tick)}</text>'
        )
    middle = (_TOP + bottom) / 2
    parts.append(
        f'<text class="axis" x="{(_LEFT + right) / 2:.0f}" y="{height - 8}" text-anchor="middle">'
        f"{escape(x.title)}</text>"
    )
    parts.append(
        f'<text class="axis" transform="translate(16 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y.title)}</text>"
    )
    parts += [_level(level, up, right) for level in levels]
    parts += [_mark(point, across, up) for point in points]
    names = [_Name(f"{level.label}  {_short(level.y)}", "level", right, up(level.y)) for level in levels]
    names += [
        _Name(f"{p.label}  {_short(p.y)}", f"c{p.group % _COLOURS}", across(p.x) + 6, up(p.y)) for p in points
    ]
    for name, at in zip(names, _apart([name.y for name in names], _TOP + 8, bottom + 8), strict=True):
        lead = f"M{name.x:.1f} {name.y:.1f}L{right + 22} {at:.1f}"
        parts.append(f'<path class="lead {name.style}" d="{lead}"/>')
        parts.append(
            f'<text class="name {name.style}" x="{right + 26}" y="{at + 4:.1f}">{escape(name.text)}</text>'
        )
    return "\n".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Name:
    """What stands beside the plot, and where what it names ends."""

    text: str
    style: str
    x: float
    y: float


def _level(level: Level, up: _Scale, right: float) -> str:
    at = up(level.y)
    return f'<line class="level" x1="{_LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>'


def _mark(point: Point, across: _Scale, up: _Scale) -> str:
    x, y = across(point.x), up(point.y)
    colour = f"c{point.group % _COLOURS}"
    bar = ""
    if point.stderr:
        low, high = (up.clamped(point.y + sign * point.stderr) for sign in (-1, 1))
        bar = f'<line class="error {colour}" x1="{x:.1f}" x2="{x:.1f}" y1="{low:.1f}" y2="{high:.1f}"/>'
    shapes = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5"/>',
        "square": f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9"/>',
        "triangle": f'<path d="M{x:.1f} {y - 6:.1f}l5.5 10h-11z"/>',
    }
    title = f"<title>{escape(point.label)}: {_short(point.y)} at {_short(point.x)}</title>"
    return f'{bar}<g class="mark {colour}">{title}{shapes[point.shape]}</g>'


class _Scale:
    """From values to coordinates, with a margin around them."""

    def __init__(self, values: Sequence[float], log: bool, begin: float, end: float) -> None:
        self.log = log
        places = [self._place(value) for value in values]
        low, high = min(places), max(places)
        margin = 0.06 * (high - low) or (0.1 if log else max(abs(high), 1.0) * 0.1)
        self.low, self.high, self.begin, self.end = low - margin, high + margin, begin, end
        self.ticks = self._log_ticks() if log else _linear_ticks(self.low, self.high)

    def __call__(self, value: float) -> float:
        share = (self._place(value) - self.low) / (self.high - self.low)
        return self.begin + share * (self.end - self.begin)

    def clamped(self, value: float) -> float:
        """The same, of a value that may lie outside."""
        if self.log and value <= 0:
            return self.begin
        return min(max(self(value), min(self.begin, self.end)), max(self.begin, self.end))

    def _place(self, value: float) -> float:
        return math.log10(value) if self.log else value

    def _log_ticks(self) -> list[float]:
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [step * 10.0**decade for decade in decades for step in steps]
            inside = [tick for tick in ticks if self.low <= math.log10(tick) <= self.high]
            if len(inside) >= 4:
                return inside
        if len(inside) >= 2:
            return inside
        return [tick for tick in _linear_ticks(10**self.low, 10**self.high) if tick > 0]


def _linear_ticks(low: float, high: float) -> list[float]:
    """About five round numbers."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough)
    first = math.ceil(low / step)
    return [round(count * step, 12) for count in range(first, math.floor(high / step) + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _apart(wanted: Sequence[float], top: float, bottom: float) -> list[float]:
    """Heights in the order of ``wanted``, close to them, a line of text apart and within the bounds."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    at = top - _LABEL
    for index in order:
        at = placed[index] = max(wanted[index], at + _LABEL)
    at = bottom + _LABEL
    for index in reversed(order):
        at = placed[index] = min(placed[index], at - _LABEL)
    return placed
