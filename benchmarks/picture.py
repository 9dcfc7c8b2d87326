"""Log-log panels as one SVG, by hand: text that git can compare, and nothing to install."""

from html import escape
from itertools import pairwise
from math import ceil, floor, log10

WIDTH, HEIGHT, LEFT, TOP, GAP = 190, 130, 58, 34, 74
INK, LINE, MARK = "#333", "#ccc", "#2b6cb0"


def ticks(values):
    """Powers of ten around the values."""
    low, high = floor(log10(min(values))), ceil(log10(max(values)))
    return [10.0**k for k in range(low, max(high, low + 1) + 1)]


def scale(values, length):
    """From a value to a place on an axis."""
    edges = ticks(values)
    low, high = log10(edges[0]), log10(edges[-1])
    return lambda value: length * (log10(value) - low) / (high - low)


def text(x, y, words, anchor="middle", size=11, turn=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" {turn}>{escape(words)}</text>'


def short(value):
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def panel(title, across, upwards, points):
    """One panel of points [(x, y)], its corner at the origin."""
    xs, ys = zip(*points, strict=True)
    x_of, y_of = scale(xs, WIDTH), scale(ys, HEIGHT)
    parts = [text(WIDTH / 2, -10, title, size=12)]
    for value in ticks(xs):
        x = x_of(value)
        parts.append(f'<path d="M{x:.1f} 0V{HEIGHT}" stroke="{LINE}"/>' + text(x, HEIGHT + 15, short(value)))
    for value in ticks(ys):
        y = HEIGHT - y_of(value)
        parts.append(f'<path d="M0 {y:.1f}H{WIDTH}" stroke="{LINE}"/>' + text(-6, y + 4, short(value), "end"))
    at = [(x_of(x), HEIGHT - y_of(y)) for x, y in points]
    for (a, b), (c, d) in pairwise(at):
        parts.append(f'<path d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" stroke="{MARK}" stroke-width="2"/>')
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{MARK}"/>' for x, y in at]
    parts.append(text(WIDTH / 2, HEIGHT + 31, across))
    parts.append(text(-44, HEIGHT / 2, upwards, turn=f'transform="rotate(-90 -44 {HEIGHT / 2:.1f})"'))
    return "".join(parts)


def grid(rows):
    """An SVG of rows of panels (title, across, upwards, points)."""
    wide, high = WIDTH + GAP, HEIGHT + GAP
    width, height = LEFT + wide * max(map(len, rows)), TOP + high * len(rows)
    parts = [
        f'<g transform="translate({LEFT + wide * j} {TOP + high * i})">{panel(*one)}</g>'
        for i, row in enumerate(rows)
        for j, one in enumerate(row)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'fill="{INK}"><rect width="{width}" height="{height}" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )
