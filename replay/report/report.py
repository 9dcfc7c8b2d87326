"""A report: the answers of a replay folder, as frozen values by the name of their section.

`build` asks the sections one after the other (`trajrec.replay.report.sections`) and knows none of them by name. A
renderer takes the blocks of what was found, and computes no number.

The contributions to several targets are summed up as the contribution to their mean, so that a report of
targets=each begins with the same table as one of targets=mean.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.records import Json
from trajrec.replay.folder.format import CONTRIBUTIONS
from trajrec.replay.folder.read import Inputs, load, reading
from trajrec.replay.report import scores
from trajrec.replay.report.blocks import Chapter, Kind
from trajrec.replay.report.section import Ask, Material, Section
from trajrec.replay.report.sections import SECTIONS, head
from trajrec.replay.report.sections.common import sound_totals
from trajrec.replay.report.sections.head import Head

__all__ = ["Ask", "Report", "build", "load"]


@dataclass(frozen=True, slots=True)
class Picture:
    """What a sample looks like: PNG bytes or text; `set` is "train" or "test"."""

    set: str
    sample: int
    png: bytes | None
    text: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that may be shown of one replay; `report["matrix"]` is what that section found, if anything.

    Attributes:
        head: what it says first.
        found: what every section found, by its name; None or empty where it was not asked, or has no answer.
        chapters: those that have an answer, with their sections, in order.
        pictures: of the samples in it.
        notes: what could not be answered, and why.
    """

    head: Head
    found: Mapping[str, Any]
    chapters: tuple[tuple[Section[Any], Chapter], ...]
    pictures: tuple[Picture, ...] = ()
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Any:
        return self.found[name]

    def opening(self) -> Chapter:
        """The head, in blocks."""
        return head.chapter(self.head)

    def values(self) -> Json:
        """Everything but pictures, by the names that it has in JSON."""
        return {**head.values(self.head), **self.found, "pictures": (), "notes": self.notes}


def build(
    folder: str | Path, top: int = 10, ask: Ask | None = None, sections: Sequence[Section[Any]] = SECTIONS
) -> Report:
    """The report of a replay folder.

    Args:
        folder: what `trajrec replay` wrote.
        top: rows of each side of a table.
        ask: further questions.
        sections: that may answer.

    Raises:
        ReplayError: a folder is not a replay folder, or cannot answer what was asked for by name.
        SampleRangeError: a target or sample that was asked for is not in the replay.
        NonFiniteError: a contribution is NaN or infinite.
        DamagedRunError: a file cannot be read.
    """
    inputs, ask = load(folder), ask or Ask()
    other = load(ask.compare) if ask.compare else None
    with reading(inputs.folder / CONTRIBUTIONS):
        totals, targets = sound_totals(inputs), scores.target_ids(inputs.contributions)
        material = Material(inputs, ask, top, totals, targets, other)
        found = {section.name: section.answer(material) or section.nothing for section in sections}
        first = head.find(inputs, totals, len(targets))
        answered = [section for section in sections if found[section.name]]
        chapters = tuple((section, section.chapter(found[section.name])) for section in answered)
        report = Report(first, found, chapters, notes=tuple(material.notes))
        return replace(report, pictures=_pictures(report, inputs)) if ask.pictures else report


def _pictures(report: Report, inputs: Inputs) -> tuple[Picture, ...]:
    """The thumbnails of the samples that are shown, as far as the folder has them."""
    if inputs.thumbnails is None:
        return ()
    chapters = [chapter for _, chapter in report.chapters]
    tables = [table for chapter in chapters for table in chapter.tables()]
    train = {sample for table in tables if (name := table.of(Kind.SAMPLE)) for sample in table.rows[name]}
    test = {part.test for chapter in chapters for part in chapter.parts if part.test is not None}
    wanted = (pl.col("set") == "train") & pl.col("sample").is_in(sorted(train))
    wanted |= (pl.col("set") == "test") & pl.col("sample").is_in(sorted(test))
    return tuple(Picture(**row) for row in scores.collect(inputs.thumbnails.filter(wanted)).iter_rows(named=True))
