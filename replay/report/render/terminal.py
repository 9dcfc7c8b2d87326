"""A report on a terminal: 80 columns, readable without colour, data drawn as text.

Rich takes care of NO_COLOR, pipes and width. Labels and names come from data and are never read as markup; control
characters are shown as escapes (`draw`), so that no label can move the cursor or paint the screen.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.text import Text

from trajrec.errors import printable
from trajrec.replay.report.blocks import Block, Chapter, Chart, Fact, Facts, Grid, Heat, Kind, Note, Table
from trajrec.replay.report.render import draw
from trajrec.replay.report.report import Report

FOLDED = 20
WIDEST = 12
STYLES = {"helpful": "green", "harmful": "red", "good": "green", "bad": "bold red", "open": "yellow", "": ""}


def show(report: Report, console: Console | None = None) -> None:
    """Print a report, on standard output if no console is given."""
    console = console or standard_output()
    first = report.opening()
    console.print(draw.plain(first.title, "bold"))
    _blocks(first, console)
    for _, chapter in report.chapters:
        _blocks(chapter, console)
    for text in report.notes:
        draw.note(f"Not shown: {text}", console)


def standard_output() -> Console:
    """A console on standard output; what its encoding cannot write is shown as escapes instead of ending the report."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return Console()


def _blocks(chapter: Chapter, console: Console) -> None:
    shown = chapter.parts[: FOLDED if chapter.folded else None]
    for part in shown:
        for block in part.blocks:
            _print(block, console)
    if len(shown) < len(chapter.parts):
        left = len(chapter.parts) - len(shown)
        draw.note(f"... and {left:,} more tables: write them with --csv or --json", console)


def _print(block: Block, console: Console) -> None:
    if isinstance(block, Chart):
        for instead in block.instead:
            _print(instead, console)
        return
    if block.title:
        draw.heading(block.title, console)
    _PRINT[type(block)](block, console)


def _facts(facts: Facts, console: Console) -> None:
    for group in facts.groups:
        shown = [fact for fact in group if not fact.aside]
        console.print(draw.facts([(fact.label, draw.plain(_said(fact), STYLES[fact.tone])) for fact in shown]))


def _said(fact: Fact) -> str:
    """The text, after its verdict where all is not well."""
    verdict = {"bad": fact.verdict.upper(), "open": fact.verdict}.get(fact.tone)
    return f"{verdict}. {fact.text}" if verdict else fact.text


def _table(table: Table, console: Console) -> None:
    if table.rows.is_empty():
        draw.note(table.empty, console)
        return
    columns = []
    for name, kind in table.columns.items():
        values = table.rows[name].to_list()
        if kind is Kind.BAR and not table.of(Kind.NAME):  # names need the room
            columns.append(draw.Column(name, kind, draw.bars(values, STYLES[table.tone])))
        elif kind not in (Kind.BAR, Kind.CAPTION):
            cells = [draw.plain(kind.text(value), STYLES[kind.tone(value)]) for value in values]
            columns.append(draw.Column(name, kind, cells))
    console.print(draw.table(columns, console.width))
    if table.note:
        draw.note(table.note, console)


def _heat(heat: Heat, console: Console) -> None:
    """The first layer in full if it is small, in per cent of its largest entry."""
    _, grid = heat.layers[0]
    scale = max((abs(v) for row in grid for v in row if v is not None), default=0.0)
    if max(len(heat.rows), len(heat.columns)) > WIDEST or scale == 0:
        draw.note(f"{len(heat.rows)} x {len(heat.columns)} {heat.things}: see --html, --json", console)
        return
    room = max(4, (console.width - 20) // len(heat.columns) - 3)
    columns = [draw.Column("class", Kind.TEXT, [draw.plain(name)[:14] for name in heat.rows])]
    for j, name in enumerate(heat.columns):
        unique = _unique(printable(name, keep="")[:room], columns)
        columns.append(draw.Column(unique, Kind.FIGURE, _cells(grid, j, scale)))
    console.print(draw.table(columns, console.width))
    draw.note(f"in per cent of the largest entry, {scale:.3e}; {heat.note}", console)


def _unique(name: str, columns: list[draw.Column]) -> str:
    while any(name == column.name for column in columns):
        name += "'"
    return name


def _cells(grid: Grid, j: int, scale: float) -> list[Text]:
    values = [row[j] for row in grid]
    return [Text("") if v is None else Text(f"{100 * v / scale:+.0f}", "green" if v > 0 else "red") for v in values]


_PRINT: dict[type, Callable[[Any, Console], None]] = {
    Facts: _facts,
    Table: _table,
    Note: lambda block, console: draw.note(block.text, console),
    Heat: _heat,
}
