"""What a section of a report is made of: five kinds of blocks, which every renderer knows.

    Facts    labels and what there is to say of them
    Table    a data frame, with what its columns hold
    Note     a remark
    Chart    bars, lines or dots over two axes
    Heat     grids of signed numbers

    Part     blocks that belong together
    Chapter  all parts of a section

A section (`trajrec.replay.report.section`) says in blocks what it found; a renderer draws blocks and knows no section.
A terminal has no room: it prints the blocks one after the other, each under its own title. A page has the titles of
chapter and part over them, and takes `short` for the title of a block where that is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import polars as pl

from trajrec.replay.report import words

Grid = tuple[tuple[float | None, ...], ...]
Points = tuple[tuple[float, float], ...]


class Kind(Enum):
    """What a column holds: how a value is written, and whether it stands to the right."""

    RANK = "rank", str, True
    SAMPLE = "sample", str, True  # id of a training sample: a page shows what it looks like
    COUNT = "count", "{:,}".format, True
    SIGNED = "signed", words.number, True  # in the colour of its sign
    NUMBER = "number", words.number, True
    SHARE = "share", words.percent, True
    DEVIATION = "deviation", "{:+.1f}".format, True
    FIGURE = "figure", str, True  # a number in words
    TEXT = "text", str, False
    LABEL = "label", str, False
    NAME = "name", str, False
    CAPTION = "caption", str, False  # a name, for who shows what a sample looks like
    MARK = "mark", str, False  # a word of warning
    BAR = "bar", str, False  # drawn as long as it is

    def __init__(self, word: str, write: Callable[[Any], str], to_the_right: bool) -> None:
        self.word, self.write, self.to_the_right = word, write, to_the_right

    def text(self, value: Any) -> str:
        """A value in words; nothing for None."""
        return "" if value is None else self.write(value)

    def tone(self, value: Any) -> str:
        """Whether a signed value is "helpful" or "harmful"; nothing for others."""
        if self is not Kind.SIGNED or value is None:
            return ""
        return "helpful" if value > 0 else "harmful" if value < 0 else ""


@dataclass(frozen=True, slots=True)
class Fact:
    """A label and a text.

    Attributes:
        tone: "good", "bad", "open" or nothing.
        verdict: in a word or two, for a fact that nobody must miss.
        aside: only for who has room for it.
    """

    label: str
    text: str
    tone: str = ""
    verdict: str = ""
    aside: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """Groups of facts; those without a text are not shown."""

    groups: tuple[tuple[Fact, ...], ...]
    title: str = ""
    short: str | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """A remark."""

    text: str
    title: str = ""
    short: str | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Table:
    """Rows, of which some columns are shown under their names.

    Attributes:
        columns: what is shown, in order, and what it holds.
        tone: "helpful", "harmful" or nothing.
        note: what must be known to read it.
        empty: what is said where there are no rows.
        first: rows that a page shows before it is asked for more.
        files: columns that are written to CSV and Parquet; none: the table is not.
    """

    rows: pl.DataFrame
    columns: Mapping[str, Kind]
    title: str
    short: str | None = None
    tone: str = ""
    note: str = ""
    empty: str = ""
    first: int = 10
    files: tuple[str, ...] = ()

    def of(self, *kinds: Kind) -> str | None:
        """The first column of one of these kinds."""
        return next((name for name, kind in self.columns.items() if kind in kinds), None)


@dataclass(frozen=True, slots=True)
class Bar:
    """From zero to a value, between two places on the x axis; `text` says what it is."""

    low: float
    high: float
    value: float
    tone: str
    text: str


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars, lines, or dots with the line on which both axes say the same.

    Attributes:
        text: what is seen, in words.
        x: (lowest, highest) place on the x axis.
        lines: (name, points) each.
        ticks: (x, text) on the x axis; round numbers if there are none.
        instead: the same in blocks, for a terminal.
    """

    text: str
    x_name: str
    y_name: str
    x: tuple[float, float]
    bars: tuple[Bar, ...] = ()
    lines: tuple[tuple[str, Points], ...] = ()
    dots: Points = ()
    ticks: tuple[tuple[float, str], ...] = ()
    title: str = ""
    short: str | None = None
    instead: tuple[Table | Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Heat:
    """Grids [rows, columns] of numbers for things of a kind; None where there is none.

    Attributes:
        layers: (name, grid) each; where there is room for one, the first.
        note: what the first layer is.
    """

    things: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    layers: tuple[tuple[str, Grid], ...]
    title: str
    short: str | None = None
    note: str = ""


Block = Facts | Table | Note | Chart | Heat


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks that belong together.

    Attributes:
        title, intro: said first, where there is room.
        test: a test sample that it is about, whose picture a page shows; `name`: its name.
        beside: the blocks stand side by side.
    """

    blocks: tuple[Block, ...]
    title: str = ""
    intro: str = ""
    test: int | None = None
    name: str | None = None
    beside: bool = False


@dataclass(frozen=True, slots=True)
class Chapter:
    """A section in blocks.

    Attributes:
        link: its name in a list of contents.
        title, intro: said first, where there is room.
        tiles: (figure, what it is): what the head of a page should say of it.
        folded: there may be many parts; those that there is no room for are left out, or folded up.
    """

    link: str
    title: str
    parts: tuple[Part, ...]
    intro: str = ""
    tiles: tuple[tuple[str, str], ...] = ()
    folded: bool = False

    def tables(self) -> list[Table]:
        """All its tables."""
        return [block for part in self.parts for block in part.blocks if isinstance(block, Table)]
