"""What taught the model a target: its top samples, and what every training class did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from trajrec.errors import SampleRangeError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.blocks import Chapter, Kind, Part, Table
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import named
from trajrec.replay.report.sections.top import Top, both, target_rows, target_title, top


@dataclass(frozen=True, slots=True)
class Why:
    """What taught the model one target: its top samples, and the sum of contributions of every training class.

    Attributes:
        target: the test sample.
        label: its true label, prediction: what the final model reads; None where unknown.
        by_label: (training label, samples, sum of contributions), largest sum first.
    """

    target: int
    label: str | None
    prediction: str | None
    name: str | None
    top: Top
    by_label: tuple[tuple[str, int, float], ...]


def find(material: Material) -> tuple[Why, ...]:
    """What taught the model the targets that were asked for.

    Raises:
        SampleRangeError: the replay has no such target.
    """
    return tuple(_why(material.inputs, target, material.k) for target in material.ask.why)


def _why(inputs: Inputs, target: int, k: int) -> Why:
    rows = scores.collect(scores.only(inputs.contributions, target))
    if rows.is_empty():
        raise SampleRangeError(
            f"{inputs.folder} has no target {target}; it was replayed for targets={inputs.settings.targets}. "
            "Replay with --targets each, or with a file of test ids."
        )
    facts = next(iter(target_rows(inputs, [target])))
    best = named(scores.collect(scores.top(rows.lazy(), k)), inputs.samples)
    sums = scores.collect(scores.by_label(rows.lazy(), inputs.samples)).rows()
    found = top(target_title(inputs, facts), target, best)
    return Why(target, facts["label"], facts["prediction"], facts["name"], found, tuple(sums))


def chapter(found: tuple[Why, ...]) -> Chapter:
    """Of each target its tables side by side, then its training classes."""
    parts = tuple(part for why in found for part in _parts(why))
    return Chapter("Why", "What taught the model this?", parts)


def _parts(why: Why) -> Iterator[Part]:
    intro = ""
    if why.label is not None and why.prediction is not None and why.label != why.prediction:
        intro = (
            f"The model reads this {why.label} as {why.prediction}: harmful samples are those that pull it away from "
            f"{why.label}."
        )
    yield Part(both(why.top), why.top.title, intro, why.target, why.name, beside=True)
    if why.by_label:
        yield Part((_by_label(why),))


def _by_label(why: Why) -> Table:
    rows = pl.DataFrame(why.by_label, schema=["class", "samples", "sum of contributions"], orient="row")
    return Table(
        rows=rows.with_columns(pl.col("sum of contributions").abs().alias("")),
        columns={"class": Kind.TEXT, "samples": Kind.COUNT, "sum of contributions": Kind.SIGNED, "": Kind.BAR},
        title=f"Which training classes taught {why.top.title}",
        short="Training classes that taught it",
    )


SECTION = Section("why", lambda ask: bool(ask.why), find, chapter, "why", nothing=())
