"""A report as one self-contained HTML page: no network, no second file, light and dark, for keyboard and print.

The template `page.html.j2`, its style sheet and its script lie beside this file and are put into the page. Jinja
escapes everything that comes from data; a content security policy in the page forbids every request, so even a label
that got through could load nothing. Long tables show their first rows and hold the rest for filtering.

A table becomes rows of cells here: a rank is called "#", a sample is followed by what it looks like (its picture and
its name), and bars lie under shares.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trajrec.replay.report.blocks import Block, Chapter, Column, Grid, Kind, Part, Table, facts
from trajrec.replay.report.render import charts
from trajrec.replay.report.render.tables import save
from trajrec.replay.report.report import Picture, Report
from trajrec.replay.report.words import axis

PAGE = Path(__file__).parent
FOLDED = 60
FOLDED_ROWS = 10
TEXT_SHOWN = 280
_EXACT = {Kind.SIGNED, Kind.NUMBER, Kind.SHARE, Kind.COUNT, Kind.DEVIATION}


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what is read.
        kind: its class: "n" for what stands to the right, "t" for text, "who" for what a sample looks like.
        tone: "helpful", "harmful" or nothing.
        value: what it is sorted by, if that is not the text.
        bar: length of the bar under it, in per cent of the longest; None: no bar.
        bar_tone: its colour.
        sample: whose picture is shown.
        wrong: the text is a warning.
    """

    text: str
    kind: str
    tone: str = ""
    value: Any = None
    bar: float | None = None
    bar_tone: str = ""
    sample: int | None = None
    wrong: bool = False


@dataclass(frozen=True, slots=True)
class Drawn:
    """A table as a template needs it: (heading, class) of every column, and the rows of cells."""

    heads: list[tuple[str, str]]
    rows: list[tuple[Cell, ...]]
    narrow: bool


@dataclass(frozen=True, slots=True)
class HeatCell:
    """An entry of a heat map: its text, and its strength from -100 to 100 per cent of the largest."""

    text: str
    strength: int


def write_html(report: Report, path: str | Path, force: bool = False) -> Path:
    """Write a report as one HTML file.

    Args:
        report: the report; pictures are embedded if it has them.
        path: the file to write.
        force: overwrite an existing file.

    Raises:
        OutputExistsError: the file exists and `force` is False.
    """
    return save(path, lambda file: file.write_text(html(report), encoding="utf-8"), force)


def html(report: Report) -> str:
    """The page."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    jinja = Environment(
        loader=FileSystemLoader(PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return jinja.get_template("page.html.j2").render(model(report))


def model(report: Report) -> dict[str, Any]:
    """Everything the template names."""
    first, chapters = report.opening(), report.chapters()
    pictures = {(picture.set, picture.sample): shown(picture) for picture in report.pictures}
    return {
        "report": report,
        "head": first,
        "facts": list(facts(first)),
        "chapters": [(section.anchor, section.name, _shorter(chapter)) for section, chapter in chapters],
        "left": {section.anchor: len(_folded(chapter)[FOLDED:]) for section, chapter in chapters},
        "tiles": [tile for chapter in (first, *(chapter for _, chapter in chapters)) for tile in chapter.tiles],
        "pictures": pictures,
        "kind": lambda block: type(block).__name__,
        "drawn": lambda table: drawn(table, {sample for which, sample in pictures if which == "train"}),
        "drawing": charts.drawing,
        "cells": cells,
        "css": (PAGE / "page.css").read_text(encoding="utf-8"),
        "js": (PAGE / "page.js").read_text(encoding="utf-8"),
    }


def shown(picture: Picture) -> dict[str, str | None]:
    """A picture as a data URI, or a text cut to a few lines."""
    uri = f"data:image/png;base64,{base64.b64encode(picture.png).decode('ascii')}" if picture.png else None
    text = picture.text
    if text and len(text) > TEXT_SHOWN:
        text = text[:TEXT_SHOWN] + "\N{HORIZONTAL ELLIPSIS}"
    return {"uri": uri, "text": text}


def _folded(chapter: Chapter) -> list[Part]:
    return [part for part in chapter.parts if part.folded]


def _shorter(chapter: Chapter) -> Chapter:
    """A chapter of at most so many folded parts, with so many rows in each of their tables."""
    whole = [part for part in chapter.parts if not part.folded]
    few = [replace(part, blocks=tuple(map(_few_rows, part.blocks))) for part in _folded(chapter)[:FOLDED]]
    return replace(chapter, parts=(*whole, *few))


def _few_rows(block: Block) -> Block:
    if not isinstance(block, Table):
        return block
    columns = (replace(column, values=column.values[:FOLDED_ROWS]) for column in block.columns)
    return replace(block, columns=tuple(columns))


def drawn(table: Table, pictured: set[int]) -> Drawn:
    """A table as rows of cells.

    Args:
        table: the table.
        pictured: training samples that there are pictures of.
    """
    columns: list[tuple[tuple[str, str], list[Cell]]] = []
    for column in table.columns:
        if column.kind is Kind.BAR:
            _underline(columns, column)
        elif column.kind is not Kind.NAME:
            columns.append((_heading(column), _cells(column)))
        if column.kind is Kind.SAMPLE:
            columns += _looks(column, table.column(Kind.NAME), pictured)
    rows = list(zip(*(column for _, column in columns), strict=True))
    return Drawn([heading for heading, _ in columns], rows, table.column(Kind.SAMPLE) is None)


def _heading(column: Column) -> tuple[str, str]:
    return "#" if column.name == "rank" else column.name, "n" if column.kind.to_the_right else "t"


def _cells(column: Column) -> list[Cell]:
    kind, exact = _heading(column)[1], column.kind in _EXACT
    wrong = column.kind is Kind.MARK
    return [
        Cell(text, kind, tone, value if exact else None, wrong=wrong and text.startswith("wrong"))
        for text, tone, value in zip(column.texts(), column.tones(), column.values, strict=True)
    ]


def _underline(columns: list[tuple[tuple[str, str], list[Cell]]], bars: Column) -> None:
    """Lays bars under the column of shares, if there is one."""
    cells = next((cells for (name, _), cells in columns if name == "share"), None)
    if cells is None:
        return
    longest = max(bars.values, default=0)
    for place, size in enumerate(bars.values):
        length = round(100 * size / longest, 1) if longest else 0
        cells[place] = replace(cells[place], bar=length, bar_tone=bars.tone)


def _looks(samples: Column, names: Column | None, pictured: set[int]) -> list[tuple[tuple[str, str], list[Cell]]]:
    """What samples look like and are called, where any of them is known to."""
    if not (names and any(names.values)) and not pictured.intersection(samples.values):
        return []
    words: Sequence[Any] = names.values if names else [None] * len(samples.values)
    pairs = zip(samples.values, words, strict=True)
    return [(("looks like", "who"), [Cell(name or "", "who", sample=sample) for sample, name in pairs])]


def cells(grid: Grid) -> list[list[HeatCell]]:
    """A grid as texts and strengths."""
    largest = max((abs(value) for row in grid for value in row if value is not None), default=0.0) or 1.0
    return [
        [HeatCell("" if v is None else axis(v), 0 if v is None else round(100 * v / largest)) for v in row]
        for row in grid
    ]
