"""Charts as geometry: bars, lines and dots in the pixels of a view box, which a template draws as SVG.

No colour and no font is chosen here; a mark names its class, and the page's style sheet does the rest, so that charts
follow light, dark and print.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trajrec.replay.report.render import words
from trajrec.replay.report.sections.comparison import Comparison
from trajrec.replay.report.sections.statistics import Histogram
from trajrec.replay.report.sections.timeline import Timeline

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 72, 12, 12, 44


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
            return [(self(self.low), short(self.low))]
        step = _round_step(span / count)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self(i * step), short(i * step)) for i in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Bar:
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
    name: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything a template needs to draw a chart; `text` says in words what is seen."""

    text: str
    x_name: str
    y_name: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    bars: tuple[Bar, ...] = ()
    strokes: tuple[Stroke, ...] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def histogram(found: Histogram) -> Chart:
    """How many samples have which contribution."""
    x, y = _x(found.low, found.high), _y(0, max(found.counts))
    step = (found.high - found.low) / len(found.counts)
    bars = []
    for i, count in enumerate(found.counts):
        low, high = found.low + i * step, found.low + (i + 1) * step
        kind = "helpful" if low + high > 0 else "harmful"
        span = f"{words.number(low)} to {words.number(high)}"
        text = f"{count:,} samples from {span}" + (" and beyond" if i in (0, len(found.counts) - 1) else "")
        bars.append(Bar(x(low), y(count), round(x(high) - x(low) - 0.5, 1), round(y(0) - y(count), 1), kind, text))
    zero = (Stroke(f"M{x(0)} {TOP}V{y(0)}", "zero", ""),) if found.low < 0 < found.high else ()
    return Chart(
        "Number of samples by contribution", "contribution", "samples", x.ticks(), y.ticks(), tuple(bars), zero
    )


def phases(found: Timeline) -> Chart:
    """Sums of helpful and harmful contributions by epoch."""
    y = _y(min(*found.harmful, 0.0), max(*found.helpful, 0.0))
    x = Scale(-0.6, len(found.epochs) - 0.4, LEFT, WIDTH - RIGHT)
    width = round(max(1.0, 0.8 * (x(1) - x(0))), 1)
    bars = []
    for kind, values in (("helpful", found.helpful), ("harmful", found.harmful)):
        for i, value in enumerate(values):
            text = f"epoch {found.epochs[i]}: {kind} {words.number(value)}"
            ends = y(max(value, 0)), y(min(value, 0))
            bars.append(Bar(x(i - 0.4), ends[0], width, round(ends[1] - ends[0], 1), kind, text))
    zero = (Stroke(f"M{LEFT} {y(0)}H{WIDTH - RIGHT}", "zero", ""),)
    return Chart(
        "Sums of helpful and harmful contributions by epoch",
        "epoch",
        "sum of contributions",
        _epoch_ticks(found.epochs, x),
        y.ticks(),
        tuple(bars),
        zero,
    )


def tracks(found: Timeline) -> Chart:
    """Contributions of single samples by epoch, as lines."""
    values = [value for track in found.tracks for value in track.values]
    y = _y(min([*values, 0.0]), max([*values, 0.0]))
    x = Scale(0, max(1, len(found.epochs) - 1), LEFT + 8, WIDTH - RIGHT - 8)
    strokes = [Stroke(f"M{LEFT} {y(0)}H{WIDTH - RIGHT}", "zero", "")]
    for i, track in enumerate(found.tracks):
        name = f"sample {track.sample}" + (f" ({track.label})" if track.label is not None else "")
        path = _line([(x(j), y(value)) for j, value in enumerate(track.values)])
        strokes.append(Stroke(path, f"line line{i % 6}", name))
    return Chart(
        "Contribution of single samples by epoch",
        "epoch",
        "contribution",
        _epoch_ticks(found.epochs, x),
        y.ticks(),
        strokes=tuple(strokes),
    )


def scatter(found: Comparison) -> Chart:
    """Each sample's contribution in one replay against that in the other; the diagonal is perfect agreement."""
    a, b = [p[1] for p in found.points], [p[2] for p in found.points]
    x, y = _x(*_wide(a)), _y(*_wide(b), bottom=400 - BOTTOM)
    low, high = max(x.low, y.low), min(x.high, y.high)
    diagonal = f"M{x(low)} {y(low)}L{x(high)} {y(high)}" if low < high else ""
    dots = "".join(f"M{x(p)} {y(q)}h0" for p, q in zip(a, b, strict=True))
    strokes = Stroke(diagonal, "zero", "equal"), Stroke(dots, "dots", "")
    return Chart(
        f"Contributions of {len(a):,} samples in both replays",
        found.this,
        found.other,
        x.ticks(),
        y.ticks(),
        strokes=strokes,
        height=400,
        bottom=400 - BOTTOM,
    )


def short(value: float) -> str:
    """A number for an axis."""
    if value == 0 or 0.01 <= abs(value) < 1e5:
        return f"{value:,.6g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def _x(low: float, high: float) -> Scale:
    return Scale(low, high, LEFT, WIDTH - RIGHT)


def _y(low: float, high: float, bottom: int = HEIGHT - BOTTOM) -> Scale:
    return Scale(low, high if high > low else low + 1, bottom, TOP)


def _wide(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = 0.04 * (high - low) or 1.0
    return low - margin, high + margin


def _line(points: Sequence[tuple[float, float]]) -> str:
    first = f"M{points[0][0]} {points[0][1]}" + ("h0" if len(points) == 1 else "")
    return first + "".join(f"L{x} {y}" for x, y in points[1:])


def _epoch_ticks(epochs: Sequence[int], x: Scale) -> list[tuple[float, str]]:
    every = max(1, -(-len(epochs) // 12))
    return [(x(i), str(epoch)) for i, epoch in enumerate(epochs) if i % every == 0]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return power * next(m for m in (1, 2, 2.5, 5, 10) if m * power >= step * (1 - 1e-9))
