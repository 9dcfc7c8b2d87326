"""Charts as geometry: bars, lines and dots in the pixels of a view box, which a template draws as SVG.

No colour and no font is chosen here; a mark names its class, and the page's style sheet does the rest, so that charts
follow light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trajrec.records import Json
from trajrec.replay.report.blocks import Chart
from trajrec.replay.report.words import axis

WIDTH, HEIGHT, HIGHER = 640, 260, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 44
TICKS = 12


@dataclass(frozen=True, slots=True)
class Scale:
    """A linear map from values low..high to pixels start..end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value, to a tenth."""
        span = (self.high - self.low) or 1.0
        return round(self.start + (value - self.low) / span * (self.end - self.start), 1)

    def ticks(self, count: int = 5) -> list[tuple[float, str]]:
        """Round values within the range, about `count` of them: (pixel, text)."""
        span = self.high - self.low
        if span <= 0:
            return [(self(self.low), axis(self.low))]
        step = _round_step(span / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(i * step), axis(i * step)) for i in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Rectangle:
    """A rectangle with a class and a text that is shown when it is pointed at."""

    x: float
    y: float
    width: float
    height: float
    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Stroke:
    """An SVG path with a class and a name for the legend (empty: not in the legend)."""

    path: str
    kind: str
    name: str = ""


def drawing(chart: Chart) -> Json:
    """The geometry of a chart, by the names that a template draws it with; `text` says in words what is seen."""
    height = HIGHER if chart.dots else HEIGHT
    x, y = _scales(chart, height - BOTTOM)
    return {
        "text": chart.text,
        "x_name": chart.x_name,
        "y_name": chart.y_name,
        "x_ticks": _x_ticks(chart, x),
        "y_ticks": y.ticks(),
        "bars": list(_rectangles(chart, x, y)),
        "strokes": list(_strokes(chart, x, y)),
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "width": WIDTH,
        "height": height,
        "top": TOP,
        "bottom": height - BOTTOM,
    }


def _scales(chart: Chart, bottom: int) -> tuple[Scale, Scale]:
    """Axes that hold everything: zero too where bars or lines are drawn, and some air around dots and lines."""
    low, high = chart.x
    air = 8 if chart.lines else 0
    values = [0.0, *(bar.value for bar in chart.bars), *(y for _, points in chart.lines for _, y in points)]
    if chart.dots:
        (low, high), values = _wide(chart.x), [*_wide([y for _, y in chart.dots])]
    least, most = min(values), max(values)
    x = Scale(low, high, LEFT + air, WIDTH - RIGHT - air)
    return x, Scale(least, most if most > least else least + 1, bottom, TOP)


def _rectangles(chart: Chart, x: Scale, y: Scale) -> Iterator[Rectangle]:
    for bar in chart.bars:
        upper, lower = y(max(bar.value, 0)), y(min(bar.value, 0))
        width = max(1.0, x(bar.high) - x(bar.low) - 0.5)
        yield Rectangle(x(bar.low), upper, round(width, 1), round(lower - upper, 1), bar.tone, bar.text)


def _strokes(chart: Chart, x: Scale, y: Scale) -> Iterator[Stroke]:
    if chart.dots:
        low, high = max(x.low, y.low), min(x.high, y.high)
        yield Stroke(f"M{x(low)} {y(low)}L{x(high)} {y(high)}" if low < high else "", "zero", "equal")
        yield Stroke("".join(f"M{x(a)} {y(b)}h0" for a, b in chart.dots), "dots")
    elif chart.ticks:
        yield Stroke(f"M{LEFT} {y(0)}H{WIDTH - RIGHT}", "zero")
    elif x.low < 0 < x.high:
        yield Stroke(f"M{x(0)} {TOP}V{y(0)}", "zero")
    for i, (name, points) in enumerate(chart.lines):
        yield Stroke(_path([(x(a), y(b)) for a, b in points]), f"line line{i % 6}", name)


def _x_ticks(chart: Chart, x: Scale) -> list[tuple[float, str]]:
    every = max(1, -(-len(chart.ticks) // TICKS))
    return [(x(place), text) for place, text in chart.ticks[::every]] or x.ticks()


def _wide(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _path(points: Sequence[tuple[float, float]]) -> str:
    first = f"M{points[0][0]} {points[0][1]}" + ("h0" if len(points) == 1 else "")
    return first + "".join(f"L{x} {y}" for x, y in points[1:])


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))
