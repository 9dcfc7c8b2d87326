"""What a section of a report is made of: five kinds of blocks, which every renderer knows.

    Facts    labels and what there is to say of them
    Table    columns of equal length
    Note     a remark
    Chart    bars, lines or dots over two axes
    Heat     a grid of signed numbers

    Part     blocks that belong together, under a title
    Chapter  all parts of a section, with its words

A section (`trajrec.replay.report.section`) says in blocks what it found; a renderer draws blocks and knows no section.
A terminal has no room: it prints the blocks one after the other, each with its own title. A page has the titles of
chapter and part over them, and shows `short` instead of `title` where that is given.

    n rows of a table
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import polars as pl

from trajrec.replay.report import words

Grid = tuple[tuple[float | None, ...], ...]


class Kind(Enum):
    """What a column holds: how a value is written, whether to the right, and its type in a file."""

    RANK = "rank", str, True, pl.Int64
    SAMPLE = "sample", str, True, pl.Int64  # id of a training sample: a page shows what it looks like
    COUNT = "count", "{:,}".format, True, pl.Int64
    SIGNED = "signed", words.number, True, pl.Float64  # in the colour of its sign
    NUMBER = "number", words.number, True, pl.Float64
    SHARE = "share", words.percent, True, pl.Float64
    DEVIATION = "deviation", "{:+.1f}".format, True, pl.Float64
    FIGURE = "figure", str, True, pl.String  # a number in words
    TEXT = "text", str, False, pl.String
    LABEL = "label", str, False, pl.String
    NAME = "name", str, False, pl.String
    MARK = "mark", str, False, pl.String  # a word of warning
    BAR = "bar", str, False, pl.Float64  # drawn as long as it is

    def __init__(self, word: str, write: Callable[[Any], str], to_the_right: bool, dtype: Any) -> None:
        self.word, self.write, self.to_the_right, self.dtype = word, write, to_the_right, dtype


@dataclass(frozen=True, slots=True)
class Column:
    """Values [n] of one kind, None where there is none.

    Attributes:
        tone: a colour for all of them, "helpful" or "harmful"; nothing for their own.
        aside: only for who has room for it.
    """

    name: str
    values: tuple[Any, ...]
    kind: Kind
    tone: str = ""
    aside: bool = False

    def texts(self) -> Iterator[str]:
        """[n] values in words."""
        return ("" if value is None else self.kind.write(value) for value in self.values)

    def tones(self) -> Iterator[str]:
        """[n] "helpful", "harmful" or nothing."""
        signed = self.kind is Kind.SIGNED and not self.tone
        return (_sign(value) if signed and value is not None else self.tone for value in self.values)


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


@dataclass(frozen=True, slots=True)
class Table:
    """Columns of n values each.

    Attributes:
        tone: "helpful", "harmful" or nothing.
        note: what must be known to read it.
        empty: what is said where n is 0.
        first: rows that a page shows before it is asked for more.
        files: the columns [n] that are written to CSV and Parquet; none: the table is not.
    """

    columns: tuple[Column, ...]
    title: str = ""
    short: str | None = None
    tone: str = ""
    note: str = ""
    empty: str = ""
    first: int = 10
    files: tuple[Column, ...] = ()

    def __len__(self) -> int:
        return len(self.columns[0].values)

    def column(self, kind: Kind) -> Column | None:
        """The first column of a kind."""
        return next((column for column in self.columns if column.kind is kind), None)


@dataclass(frozen=True, slots=True)
class Bar:
    """From zero to a value, between two places on the x axis; `text` says what it is."""

    low: float
    high: float
    value: float
    tone: str
    text: str


@dataclass(frozen=True, slots=True)
class Line:
    """Points (x, y) with a name."""

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars, lines or dots.

    Attributes:
        text: what is seen, in words.
        x: (lowest, highest) place on the x axis.
        ticks: (x, text) on the x axis; round numbers if there are none.
        equal: draw dots, with the line on which both axes say the same.
        instead: the same in blocks, for a terminal.
    """

    text: str
    x_name: str
    y_name: str
    x: tuple[float, float]
    bars: tuple[Bar, ...] = ()
    lines: tuple[Line, ...] = ()
    dots: tuple[tuple[float, float], ...] = ()
    ticks: tuple[tuple[float, str], ...] = ()
    title: str = ""
    short: str | None = None
    instead: tuple[Table | Note, ...] = ()


@dataclass(frozen=True, slots=True)
class Heat:
    """Grids [rows, columns] of signed numbers, None where there is none.

    Attributes:
        layers: (name, grid) each; where there is room for one, the first.
        note: what the first layer is.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    layers: tuple[tuple[str, Grid], ...]
    title: str = ""
    short: str | None = None
    things: str = "classes"
    note: str = ""


Block = Facts | Table | Note | Chart | Heat


@dataclass(frozen=True, slots=True)
class Part:
    """Blocks that belong together.

    Attributes:
        title: over them, where there is room.
        intro: what is said of them first, where there is room.
        test: a test sample that it is about: a page shows its picture.
        name: of that sample.
        beside: the blocks stand side by side.
        folded: one of many parts of a kind, of which a page opens the first.
    """

    blocks: tuple[Block, ...]
    title: str = ""
    intro: str = ""
    test: int | None = None
    name: str | None = None
    beside: bool = False
    folded: bool = False


@dataclass(frozen=True, slots=True)
class Chapter:
    """A section in blocks.

    Attributes:
        link: its name in a list of contents.
        title: over all of it, where there is room.
        intro: what is said first, where there is room.
        tiles: (figure, what it is): what the head of a page should say of it.
    """

    link: str
    title: str
    parts: tuple[Part, ...]
    intro: str = ""
    tiles: tuple[tuple[str, str], ...] = ()


def facts(chapter: Chapter) -> Iterator[Fact]:
    """All facts of a chapter."""
    for part in chapter.parts:
        for block in part.blocks:
            if isinstance(block, Facts):
                yield from (fact for group in block.groups for fact in group)


def tables(parts: Sequence[Part]) -> Iterator[Table]:
    """All tables of some parts, also those that stand for charts."""
    for part in parts:
        for block in part.blocks:
            yield from (each for each in (block, *getattr(block, "instead", ())) if isinstance(each, Table))


def _sign(value: float) -> str:
    return "helpful" if value > 0 else "harmful" if value < 0 else ""
