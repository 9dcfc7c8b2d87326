"""The top samples of every target, or of every class of targets."""

from __future__ import annotations

import polars as pl

from trajrec.errors import ReplayError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.blocks import Chapter, Part
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import blocks_of, named, needs, order, parts_by
from trajrec.replay.report.sections.top import Top, both, target_rows, target_title, top

MOST_UNNAMED = 30


def find(material: Material) -> tuple[Top, ...]:
    """The top samples of the groups that were asked for; of the classes, if there are few, where none were.

    Raises:
        ReplayError: the labels of the targets are not known.
    """
    if material.ask.by == "target":
        return _by_target(material)
    groups = _by_class(material.inputs, material.k)
    return groups if material.ask.by or len(groups) <= MOST_UNNAMED else ()


def _by_target(material: Material) -> tuple[Top, ...]:
    inputs, targets = material.inputs, material.targets
    titles = {row["target"]: target_title(inputs, row) for row in target_rows(inputs, targets)}
    blocks = blocks_of(inputs, targets, material.totals.height)
    rows = [scores.collect(scores.top(block, material.k, by="target")) for block in blocks]
    labelled = named(pl.concat(rows), inputs.samples)
    return tuple(top(titles[target], target, part) for target, part in parts_by(labelled, "target"))


def _by_class(inputs: Inputs, k: int) -> tuple[Top, ...]:
    if inputs.settings.targets == "mean":
        raise ReplayError(needs("--by class", "more than the mean target", "--targets class"))
    totals = scores.totals_by_class(inputs.contributions, inputs.targets)
    labelled = named(scores.collect(scores.top(totals, k, by="class")), inputs.samples)
    if labelled.is_empty():
        raise ReplayError(needs("--by class", "labels of the test samples (targets.parquet)", "--targets class"))
    key = order(inputs.settings)
    parts = sorted(parts_by(labelled, "class"), key=lambda part: key(part[0]))
    return tuple(top(f"class {name}", scores.MEAN, part) for name, part in parts)


def chapter(groups: tuple[Top, ...]) -> Chapter:
    """Two tables for each."""
    kind = "class" if all(group.target == scores.MEAN for group in groups) else "target"
    parts = tuple(Part(both(top), top.title, beside=True) for top in groups)
    return Chapter(f"By {kind}", f"{kind.capitalize()} by {kind}", parts, folded=True)


SECTION = Section("groups", lambda ask: ask.by is not None, find, chapter, "groups", nothing=())
