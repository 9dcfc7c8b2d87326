"""A report: everything a renderer may show, as plain frozen values.

`build` asks the questions of `scores` of a replay folder and joins the answers with labels and names; `render`
draws the result on a terminal, in tables or as a page. Nothing here knows how it will look, and no renderer
computes a number.

The contributions of several targets are summed up as the contribution to their mean, so that a report of
targets=each begins with the same table as one of targets=mean.

    S tracked samples, M targets, k rows of a table
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from trajrec.errors import NonFiniteError, ReplayError
from trajrec.replay import scores
from trajrec.replay.agreement import Agreement, agree, joined
from trajrec.replay.inputs import CONTRIBUTIONS, Certificate, Inputs, Settings, load, reading

__all__ = ["Comparison", "Entry", "Report", "Top", "build", "load"]


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
        target: id of the target, -1 for the mean of all.
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
class Comparison:
    """Agreement of this replay with another on the samples that both have.

    Attributes:
        this: what this replay is, in a few words.
        other: what the other is.
        points: (sample, this, other) of at most some thousand samples, for a scatter plot.
    """

    this: str
    other: str
    agreement: Agreement
    points: tuple[tuple[int, float, float], ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that may be shown of one replay; a section that was not asked for is None or empty.

    Attributes:
        folder: the replay folder.
        samples: S.
        targets: M.
        total: sum of the samples' contributions to the mean target.
        mass: sum of their absolute values: what shares are shares of.
        overall: top samples for the mean target.
        groups: top samples for each target or class that was asked for.
    """

    folder: Path
    settings: Settings
    certificate: Certificate | None
    samples: int
    targets: int
    total: float
    mass: float
    overall: Top
    groups: tuple[Top, ...] = ()
    comparison: Comparison | None = None


def build(folder: str | Path, top: int = 10, compare: str | Path | None = None) -> Report:
    """The report of a replay folder.

    Args:
        folder: what `trajrec replay` wrote.
        top: k.
        compare: another replay folder to measure agreement with.

    Raises:
        ReplayError: a folder is not a replay folder, or the two have no sample in common.
        NonFiniteError: a contribution is NaN or infinite.
        DamagedRunError: a file cannot be read.
    """
    inputs = load(folder)
    with reading(inputs.folder / CONTRIBUTIONS):
        totals = sound_totals(inputs)
        mass, total = _mass(totals)
        return Report(
            folder=inputs.folder,
            settings=inputs.settings,
            certificate=inputs.certificate,
            samples=totals.height,
            targets=len(scores.target_ids(inputs.contributions)),
            total=total,
            mass=mass,
            overall=_overall(inputs, totals, top),
            comparison=_comparison(inputs, totals, load(compare)) if compare else None,
        )


def sound_totals(inputs: Inputs) -> pl.DataFrame:
    """Sample and contribution to the mean target, [S] rows, every one finite.

    Raises:
        NonFiniteError: one is not.
        ReplayError: there are none.
    """
    totals = scores.collect(scores.totals(inputs.contributions)).sort("sample")
    if totals.is_empty():
        raise ReplayError(f"{inputs.folder / CONTRIBUTIONS} has no rows. Replay again with --force.")
    bad = totals.filter(pl.col("contribution").is_finite().not_())
    if bad.height:
        raise NonFiniteError(
            f"{bad.height:,} of {totals.height:,} samples have a contribution that is NaN or infinite, first sample "
            f"{bad['sample'][0]}, in {inputs.folder / CONTRIBUTIONS}. Replay again with --dtype float64."
        )
    return totals


def kind(settings: Settings) -> str:
    """What a replay is, in a few words: "exact", "Hessian-free"."""
    return {True: "exact", False: "Hessian-free", None: "replay"}[settings.exact]


def _mass(totals: pl.DataFrame) -> tuple[float, float]:
    values = totals["contribution"]
    return float(values.abs().sum()), float(values.sum())


def _overall(inputs: Inputs, totals: pl.DataFrame, k: int) -> Top:
    rows = scores.collect(scores.top(totals.lazy(), k))
    return _top(_overall_title(inputs.settings), scores.MEAN, named(rows, inputs.samples))


def _overall_title(settings: Settings) -> str:
    words = {
        "mean": f"the mean {settings.target_set} loss",
        "class": "the mean over the classes",
        "each": f"the mean over all {settings.target_set} samples",
    }
    return words.get(settings.targets, f"the mean over the chosen {settings.target_set} samples")


def named(rows: pl.DataFrame, people: pl.LazyFrame) -> pl.DataFrame:
    """Rows joined with label, name and noisy, in their order."""
    ids = rows["sample"].unique().to_list()
    known = scores.collect(people.filter(pl.col("sample").is_in(ids)).select("sample", "label", "name", "noisy"))
    return rows.join(known.unique("sample"), on="sample", how="left", maintain_order="left")


def _top(title: str, target: int, rows: pl.DataFrame) -> Top:
    entries = [_entry(row, target) for row in rows.iter_rows(named=True)]
    sides = (tuple(e for e in entries if e.side == side) for side in (scores.HELPFUL, scores.HARMFUL))
    return Top(title, target, *sides)


def _entry(row: dict[str, Any], target: int) -> Entry:
    names = ("rank", "side", "sample", "label", "name", "noisy", "contribution", "share")
    return Entry(target=target, **{name: row[name] for name in names})


def _comparison(inputs: Inputs, totals: pl.DataFrame, other: Inputs, limit: int = 2000) -> Comparison:
    with reading(other.folder / CONTRIBUTIONS):
        others = sound_totals(other)
    both = scores.collect(joined(totals.lazy(), others.lazy()))
    if both.is_empty():
        raise ReplayError(f"{inputs.folder} and {other.folder} have no sample in common: nothing to compare.")
    agreement = agree(both["a"].to_numpy(), both["b"].to_numpy())
    points = both if both.height <= limit else both.sample(limit, seed=0).sort("sample")
    return Comparison(_words(inputs), _words(other), agreement, tuple(points.iter_rows()))


def _words(inputs: Inputs) -> str:
    return f"{kind(inputs.settings)} ({inputs.folder.name})"
