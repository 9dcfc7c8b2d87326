"""The samples with the largest contributions to the mean target, and the tables of such samples for any target."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajrec.records import Json
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.blocks import Chapter, Kind, Part, Table
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import mean_of, named

FILES = ("rank", "side", "sample", "label", "target", "contribution", "share", "table")


@dataclass(frozen=True, slots=True, eq=False)
class Top:
    """The most helpful and the most harmful samples of one target, or of a mean of targets.

    The rows have rank (from 1), side, sample, label, name, noisy (the label is known to be wrong), target,
    contribution, and share, |C| as a fraction of the sum of |C| over all tracked samples; null where unknown.

    Attributes:
        title: what they help or harm, in words.
        target: its id, -1 for a mean.
        helpful: rows by descending contribution, all positive.
        harmful: rows by ascending contribution, all negative.
    """

    title: str
    target: int
    helpful: pl.DataFrame
    harmful: pl.DataFrame


def find(material: Material) -> Top:
    """The top samples for the mean target."""
    rows = scores.collect(scores.top(material.totals.lazy(), material.k))
    return top(mean_of(material.inputs.settings), scores.MEAN, named(rows, material.inputs.samples))


def top(title: str, target: int, rows: pl.DataFrame) -> Top:
    """A finding from the rows of `scores.top`, joined with names."""
    id_ = pl.lit(target, pl.Int64).alias("target")
    rows = rows.select("rank", "side", "sample", "label", "name", "noisy", id_, "contribution", "share")
    return Top(title, target, *(rows.filter(side=side) for side in (scores.HELPFUL, scores.HARMFUL)))


def target_rows(inputs: Inputs, targets: list[int]) -> list[Json]:
    """What is known of targets, in their order."""
    known = scores.collect(inputs.targets.filter(pl.col("target").is_in(targets))).unique("target")
    ids = pl.DataFrame({"target": targets}, schema={"target": pl.Int64})
    return ids.join(known, on="target", how="left", maintain_order="left").to_dicts()


def target_title(inputs: Inputs, row: Json) -> str:
    """A target in words."""
    if inputs.settings.targets == "mean":
        return mean_of(inputs.settings)
    if inputs.settings.targets in ("tokens", "contrasts"):
        return f"{inputs.settings.target_set} {row['name'] or row['target']}"
    if inputs.settings.targets == "class":
        return f"class {row['label'] or row['target']}"
    words = {"label": row["label"], "read as": row["prediction"]}
    known = ", ".join(f"{word} {value}" for word, value in words.items() if value is not None)
    return f"{inputs.settings.target_set} sample {row['target']}{f' ({known})' if known else ''}"


def both(found: Top, first: int = 10) -> tuple[Table, Table]:
    """The two tables of a top, of which a page shows so many rows first."""
    helpful = _table(found.title, scores.HELPFUL, found.helpful, "positive", first)
    return helpful, _table(found.title, scores.HARMFUL, found.harmful, "negative", first)


def _table(title: str, side: str, rows: pl.DataFrame, sign: str, first: int) -> Table:
    wrong = pl.when("noisy").then(pl.lit("wrong label"))
    rows = rows.with_columns(pl.col("share").alias(""), known=wrong, table=pl.lit(title))
    columns = {"rank": Kind.RANK, "sample": Kind.SAMPLE, "label": Kind.LABEL, "name": Kind.NAME}
    columns |= {"contribution": Kind.SIGNED, "share": Kind.SHARE, "known": Kind.MARK, "": Kind.BAR}
    unknown = [name for name in ("label", "name", "known") if rows[name].null_count() == rows.height]
    return Table(
        rows=rows,
        columns={name: kind for name, kind in columns.items() if name not in unknown},
        title=f"Most {side} for {title}",
        short=f"Most {side}",
        tone=side,
        empty=f"no sample has a {sign} contribution",
        first=first,
        files=FILES,
    )


def chapter(found: Top) -> Chapter:
    """The two tables side by side."""
    title = f"Samples that mattered most for {found.title}"
    return Chapter("Top samples", title, (Part(both(found, first=15), beside=True),))


SECTION = Section("overall", lambda ask: True, find, chapter, "top")
