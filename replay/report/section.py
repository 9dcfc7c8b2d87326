"""What a section of a report is: a question that a replay folder may answer, in one file of `sections/`.

Such a file holds a frozen value (what was found), a query that makes it, a function that says it in blocks
(`trajrec.replay.report.blocks`), and one `Section` that names these three. With its line in `sections/__init__.py` it
is on the terminal, on the page and in the files: no renderer and no other section knows of it.

A section that the folder cannot answer raises ReplayError and says which replay would. What was asked for by name must
succeed; where everything that is possible was asked for, such a section is left out with a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import polars as pl

from trajrec.errors import ReplayError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report.blocks import Chapter

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ask:
    """Which questions a report answers besides the overall top.

    Attributes:
        by: top tables of every target, or of every class of targets.
        why: targets to explain.
        statistics: mean, deviation, concentration, outliers.
        matrix: inter-class contributions.
        suspects: suspected wrong labels.
        timeline: which epochs mattered.
        samples: training samples to follow through the epochs (implies `timeline`).
        compare: another replay folder.
        pictures: take thumbnails along.
        everything: also answer every other question that the folder can answer.
    """

    by: Literal["target", "class"] | None = None
    why: tuple[int, ...] = ()
    statistics: bool = False
    matrix: bool = False
    suspects: bool = False
    timeline: bool = False
    samples: tuple[int, ...] = ()
    compare: Path | None = None
    pictures: bool = False
    everything: bool = False


@dataclass(frozen=True, slots=True)
class Material:
    """What a section finds its answer in.

    Attributes:
        inputs: the replay folder.
        ask: the questions.
        k: rows of each side of a table.
        totals: sample and contribution to the mean target, [S] rows by id.
        targets: [M] ids of the targets, ascending.
        other: the folder to compare with.
        notes: what could not be answered, and why.
    """

    inputs: Inputs
    ask: Ask
    k: int
    totals: pl.DataFrame
    targets: list[int]
    other: Inputs | None = None
    notes: list[str] = field(default_factory=list)

    def unless_refused(self, must: bool, find: Callable[[], T]) -> T | None:
        """What is found; None where the folder cannot answer, with a note.

        Raises:
            ReplayError: it cannot, and it must.
        """
        try:
            return find()
        except ReplayError as error:
            if must:
                raise
            self.notes.append(str(error))
            return None


@dataclass(frozen=True, slots=True)
class Section(Generic[T]):
    """One section of a report.

    Attributes:
        name: in the report, and in JSON.
        wanted: whether it was asked for by name; else it is tried where everything was asked for.
        find: the answer; None or empty where there is nothing to say.
        chapter: the answer in blocks.
        anchor: its name in the address of a page.
        nothing: what stands in JSON where there is no answer.
    """

    name: str
    wanted: Callable[[Ask], bool]
    find: Callable[[Material], T | None]
    chapter: Callable[[T], Chapter]
    anchor: str
    nothing: Any = None

    def answer(self, material: Material) -> T | None:
        """What is found, if it was asked for."""
        must = self.wanted(material.ask)
        if not must and not material.ask.everything:
            return None
        return material.unless_refused(must, lambda: self.find(material))
