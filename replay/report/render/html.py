"""A report as one self-contained HTML page: no network, no second file, light and dark, for keyboard and print.

The template `page.html.j2`, its style sheet and its script lie beside this file and are put into the page. Jinja
escapes everything that comes from data; a content security policy in the page forbids every request, so even a label
that got through could load nothing. Long tables show their first rows and hold the rest for filtering.
"""

from __future__ import annotations

import base64
from pathlib import Path

from trajrec.records import Json
from trajrec.replay.report.blocks import Grid
from trajrec.replay.report.render import charts
from trajrec.replay.report.render.tables import save
from trajrec.replay.report.report import Picture, Report
from trajrec.replay.report.words import axis

PAGE = Path(__file__).parent
TEXT_SHOWN = 280


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


def model(report: Report) -> Json:
    """Everything the template names."""
    opening, chapters = report.opening(), report.chapters
    return {
        "report": report,
        "opening": opening,
        "chapters": [(section.anchor, section.name, chapter) for section, chapter in chapters],
        "tiles": [tile for chapter in (opening, *(chapter for _, chapter in chapters)) for tile in chapter.tiles],
        "pictures": {(picture.set, picture.sample): shown(picture) for picture in report.pictures},
        "kind": lambda block: type(block).__name__,
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


def cells(grid: Grid) -> list[list[tuple[str, int]]]:
    """The entries of a heat map: their texts, and their strengths from -100 to 100 per cent of the largest."""
    largest = max((abs(value) for row in grid for value in row if value is not None), default=0.0) or 1.0
    return [[("", 0) if v is None else (axis(v), round(100 * v / largest)) for v in row] for row in grid]
