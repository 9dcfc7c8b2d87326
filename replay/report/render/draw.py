"""Tables and text for the terminal: 80 columns, readable without colour, data drawn as text.

Labels and names come from data and are never read as markup; control characters are shown as escapes, so that no
label can move the cursor or paint the screen.
"""

from __future__ import annotations

from typing import Literal

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from trajrec.errors import printable

Column = tuple[str, list[Text]]
_LEFT = {"label", "name", "class", "", "known", "what"}


def table(columns: list[Column], width: int) -> Padding:
    """Columns of cells; numbers are never cut, labels and names share what room is left."""
    widths = {name: max(len(name), *(cell.cell_len for cell in cells)) for name, cells in columns}
    wide: list[str] = [name for name in ("label", "name") if name in widths]
    room = width - 4 - 3 * len(columns) - sum(widths[name] for name in widths if name not in wide)
    for name in wide:  # the label first: it is short as a rule
        widths[name] = max(6, min(widths[name], room if name == wide[-1] else room // 2))
        room -= widths[name]
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim")
    for name, cells in columns:
        justify: Literal["left", "right"] = "left" if name in _LEFT else "right"
        drawn.add_column(plain(name), justify=justify, no_wrap=True)
        for cell in cells:
            cell.plain = cell.plain.replace("\n", "\\n")
            _shorten(cell, widths[name], keep_end=name == "name")
    for row in zip(*(cells for _, cells in columns), strict=True):
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
