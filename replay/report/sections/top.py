"""The samples with the largest contributions to the mean target, and the tables of such samples for any target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.blocks import Chapter, Column, Kind, Part, Table
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import mean_of, named


@dataclass(frozen=True, slots=True)
class Entry:
    """One row of a table of samples.

    Attributes:
        rank: from 1, within its side.
        side: "helpful" or "harmful".
        sample: id of the training sample.
        label: its label, if known.
        name: its name, if the data set gives one.
        noisy: whether its label is known to be wrong, if that is known at all.
        target: id of the target, -1 for a mean.
        contribution: C(i, j), in the unit of the target.
        share: |C| as a fraction of the sum of |C| over all tracked samples.
    """

    rank: int
    side: str
    sample: int
    label: str | None
    name: str | None
    noisy: bool | None
    target: int
    contribution: float
    share: float


@dataclass(frozen=True, slots=True)
class Top:
    """The most helpful and the most harmful samples of one target, or of a mean of targets.

    Attributes:
        title: what they help or harm, in words.
        target: its id, -1 for a mean.
        helpful: rows by descending contribution, all positive.
        harmful: rows by ascending contribution, all negative.
    """

    title: str
    target: int
    helpful: tuple[Entry, ...]
    harmful: tuple[Entry, ...]


def find(material: Material) -> Top:
    """The top samples for the mean target."""
    rows = scores.collect(scores.top(material.totals.lazy(), material.k))
    return top(mean_of(material.inputs.settings), scores.MEAN, named(rows, material.inputs.samples))


def top(title: str, target: int, rows: pl.DataFrame) -> Top:
    """A finding from the rows of `scores.top`, joined with names."""
    names = ("rank", "side", "sample", "label", "name", "noisy", "contribution", "share")
    entries = [Entry(target=target, **{name: row[name] for name in names}) for row in rows.iter_rows(named=True)]
    sides = (tuple(e for e in entries if e.side == side) for side in (scores.HELPFUL, scores.HARMFUL))
    return Top(title, target, *sides)


def target_rows(inputs: Inputs, targets: list[int]) -> list[dict[str, Any]]:
    """What is known of targets, in their order."""
    known = scores.collect(inputs.targets.filter(pl.col("target").is_in(targets))).unique("target")
    ids = pl.DataFrame({"target": targets}, schema={"target": pl.Int64})
    return ids.join(known, on="target", how="left", maintain_order="left").to_dicts()


def target_title(inputs: Inputs, row: dict[str, Any]) -> str:
    """A target in words."""
    if row["target"] == scores.MEAN:
        return mean_of(inputs.settings)
    if inputs.settings.targets == "class":
        return f"class {row['label'] or row['target']}"
    words = {"label": row["label"], "read as": row["prediction"]}
    known = ", ".join(f"{word} {value}" for word, value in words.items() if value is not None)
    return f"{inputs.settings.target_set} sample {row['target']}{f' ({known})' if known else ''}"


def both(found: Top, first: int = 10) -> tuple[Table, Table]:
    """The two tables of a top, of which a page shows so many rows first."""
    helpful = _table(found, scores.HELPFUL, found.helpful, "no sample has a positive contribution", first)
    return helpful, _table(found, scores.HARMFUL, found.harmful, "no sample has a negative contribution", first)


def _table(found: Top, side: str, rows: tuple[Entry, ...], empty: str, first: int) -> Table:
    def column(name: str, kind: Kind, tone: str = "") -> Column:
        return Column(name, tuple(getattr(row, name) for row in rows), kind, tone)

    rank, sample, share = column("rank", Kind.RANK), column("sample", Kind.SAMPLE), column("share", Kind.SHARE)
    label, name = column("label", Kind.LABEL), column("name", Kind.NAME)
    contribution = column("contribution", Kind.SIGNED)
    wrong = Column("known", tuple("wrong label" if row.noisy else None for row in rows), Kind.MARK)
    known = [each for each in (label, name) if any(value is not None for value in each.values)]
    marks = [wrong] if any(wrong.values) else []
    bars = Column("", share.values, Kind.BAR, side)
    side_, target = column("side", Kind.TEXT), column("target", Kind.COUNT)
    title = Column("table", (found.title,) * len(rows), Kind.TEXT)
    return Table(
        (rank, sample, *known, contribution, share, *marks, bars),
        title=f"Most {side} for {found.title}",
        short=f"Most {side}",
        tone=side,
        empty=empty,
        first=first,
        files=(rank, side_, sample, label, target, contribution, share, title),
    )


def chapter(found: Top) -> Chapter:
    """The two tables side by side."""
    parts = (Part(both(found, 15), beside=True),)
    return Chapter("Top samples", f"Samples that mattered most for {found.title}", parts)


SECTION = Section("overall", lambda ask: True, find, chapter, "top")
