"""The samples with the largest contributions: overall, by target, by class; and why a target is as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import polars as pl

from trajrec.errors import ReplayError, SampleRangeError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.sections.common import blocks_of, mean_of, named, needs, order, parts_by


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


def overall(inputs: Inputs, totals: pl.DataFrame, k: int) -> Top:
    """The top samples for the mean target."""
    rows = scores.collect(scores.top(totals.lazy(), k))
    return top(mean_of(inputs.settings), scores.MEAN, named(rows, inputs.samples))


def by_target(inputs: Inputs, targets: list[int], samples: int, k: int) -> tuple[Top, ...]:
    """The top samples for every target."""
    titles = {row["target"]: target_title(inputs, row) for row in target_rows(inputs, targets)}
    rows = [scores.collect(scores.top(block, k, by="target")) for block in blocks_of(inputs, targets, samples)]
    labelled = named(pl.concat(rows), inputs.samples)
    return tuple(top(titles[target], target, part) for target, part in parts_by(labelled, "target"))


def by_class(inputs: Inputs, k: int) -> tuple[Top, ...]:
    """The top samples for the mean loss of every class of targets.

    Raises:
        ReplayError: the labels of the targets are not known.
    """
    if inputs.settings.targets == "mean":
        raise ReplayError(needs("--by class", "more than the mean target", "--targets class"))
    totals = scores.totals_by_class(inputs.contributions, inputs.targets)
    labelled = named(scores.collect(scores.top(totals, k, by="class")), inputs.samples)
    if labelled.is_empty():
        raise ReplayError(needs("--by class", "labels of the test samples (targets.parquet)", "--targets class"))
    key = order(inputs.settings)
    parts = sorted(parts_by(labelled, "class"), key=lambda part: key(part[0]))
    return tuple(top(f"class {name}", scores.MEAN, part) for name, part in parts)


def why(inputs: Inputs, target: int, k: int) -> Why:
    """What taught the model this target.

    Raises:
        SampleRangeError: the replay has no such target.
    """
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
