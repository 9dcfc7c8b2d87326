"""A section as somebody else would add one, in one file: bounds of a theorem beside the error of a replay."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from trajrec.replay.report.blocks import Bar, Chapter, Chart, Fact, Facts, Heat, Kind, Note, Part, Table
from trajrec.replay.report.section import Material, Section


@dataclass(frozen=True, slots=True)
class Bounds:
    """What was found: (sample, error, bound) of each."""

    rows: tuple[tuple[int, float, float], ...]


def find(material: Material) -> Bounds:
    """Made up: the bound of an error is twice as large."""
    values = material.totals.head(material.k).rows()
    return Bounds(tuple((sample, value, 2 * value) for sample, value in values))


def chapter(found: Bounds) -> Chapter:
    """One block of each kind."""
    columns = {"sample": Kind.SAMPLE, "error": Kind.SIGNED, "bound": Kind.NUMBER}
    rows = pl.DataFrame(found.rows, schema=list(columns), orient="row").with_columns(table=pl.lit("bounds"))
    errors = rows["error"].to_list()
    bars = tuple(Bar(i - 0.5, i + 0.5, value, "helpful", f"error {value}") for i, value in enumerate(errors))
    blocks = (
        Facts(((Fact("theorem", "1 of <4>"),),), title="Which theorem"),
        Table(rows=rows, columns=columns, title="Bounds beside errors", files=(*columns, "table")),
        Note("A bound that holds proves nothing.\x1b[2J"),
        Chart("Errors", "sample", "error", (-0.5, len(errors) - 0.5), bars),
        Heat("theorems", ("a",), ("b",), (("Ratio", ((2.0,),)),), title="Ratios", note="bound over error"),
    )
    return Chapter("Bounds", "How far the error may go", (Part(blocks),), tiles=(("2", "times the error"),))


SECTION = Section("bounds", lambda ask: False, find, chapter, "bounds")
