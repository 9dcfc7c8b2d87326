"""Tables, facts and bars for the terminal, as text.

Labels and names come from data and are never read as markup; control characters are shown as escapes, so that no
label can move the cursor or paint the screen.
"""

from __future__ import annotations

from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trajrec.errors import printable
from trajrec.replay.report.blocks import Kind


class Column(NamedTuple):
    """A heading, and cells of one kind."""

    name: str
    kind: Kind
    cells: list[Text]


def table(columns: list[Column], width: int) -> Padding:
    """Columns of cells; numbers are never cut, labels and names share what room is left."""
    widths = [max(len(column.name), *(cell.cell_len for cell in column.cells)) for column in columns]
    wide = [i for kind in (Kind.LABEL, Kind.NAME) for i, column in enumerate(columns) if column.kind is kind]
    room = width - 4 - 3 * len(columns) - sum(each for i, each in enumerate(widths) if i not in wide)
    for i in wide:  # the label first: it is short as a rule
        widths[i] = max(6, min(widths[i], room if i == wide[-1] else room // 2))
        room -= widths[i]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for (name, kind, cells), most in zip(columns, widths, strict=True):
        drawn.add_column(plain(name), justify="right" if kind.to_the_right else "left", no_wrap=True)
        for cell in cells:
            cell.plain = cell.plain.replace("\n", "\\n")
            _shorten(cell, most, keep_end=kind is Kind.NAME)
    for row in zip(*(column.cells for column in columns), strict=True):
        drawn.add_row(*row)
    return Padding(drawn, (0, 0, 0, 2))


def _shorten(cell: Text, width: int, keep_end: bool) -> None:
    """Cut a cell; of a name the end is kept, because names of files differ there."""
    if keep_end and cell.cell_len > width:
        cell.plain = "\N{HORIZONTAL ELLIPSIS}" + cell.plain[-(width - 1) :]
    cell.truncate(width, overflow="ellipsis")


def facts(rows: list[tuple[str, Text]]) -> Table:
    """Names and what there is to say of them, without lines; empty ones are left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    for name, value in rows:
        if value.plain:
            grid.add_row(Text(f"  {name}", "dim"), value)
    return grid


def heading(title: str, console: Console) -> None:
    """A blank line and a title."""
    console.print()
    console.print(plain(title, "bold"))


def note(text: str, console: Console) -> None:
    """A remark, indented."""
    console.print(Padding(plain(text, "dim"), (0, 0, 0, 2)))


def plain(text: str, style: str = "") -> Text:
    """Data as it is, control characters escaped."""
    return Text(printable(text), style)


def bars(sizes: list[float], style: str, width: int = 12) -> list[Text]:
    """A bar for every size, the longest `width` characters; none for zero."""
    longest = max(sizes, default=0)
    return [Text("#" * max(1, round(width * size / longest)) if size > 0 else "", style) for size in sizes]
