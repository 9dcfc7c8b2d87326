"""How contributions are distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.sections.common import blocks_of, rows_with_facts

BINS = 61


@dataclass(frozen=True, slots=True)
class Spread:
    """How contributions are distributed.

    Attributes:
        count: how many.
        std: standard deviation (n - 1); NaN for a single one.
        positive: how many help; negative: how many harm; zero: how many do neither.
    """

    count: int
    mean: float
    std: float
    min: float
    max: float
    positive: int
    negative: int
    zero: int


@dataclass(frozen=True, slots=True)
class Outlier:
    """A sample far from the mean; z in standard deviations."""

    sample: int
    label: str | None
    name: str | None
    contribution: float
    z: float


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts [bins] in equal bins from low to high; the first and last also count what lies outside."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Mean, deviation, concentration and outliers.

    Attributes:
        samples: spread of the samples' contributions to the mean target.
        pairs: spread of all S x M contributions, if M > 1.
        concentration: (fraction of the samples, how many that are, share of the sum of |C| they carry).
        histogram: of the samples.
        far: how many samples are outliers (3 standard deviations or more).
        outliers: the farthest of them.
    """

    samples: Spread
    pairs: Spread | None
    concentration: tuple[tuple[float, int, float], ...]
    histogram: Histogram
    far: int
    outliers: tuple[Outlier, ...]


def statistics(inputs: Inputs, totals: pl.DataFrame, targets: list[int], k: int) -> Statistics:
    """Mean, deviation, concentration, histogram and outliers."""
    spread = _spread(totals.lazy())
    far = scores.collect(scores.outliers(totals.lazy()))
    shares = scores.collect(scores.concentration(totals.lazy())).rows()
    return Statistics(
        samples=spread,
        pairs=_pair_spread(inputs, targets, totals.height) if len(targets) > 1 else None,
        concentration=tuple(shares),
        histogram=_histogram(totals),
        far=far.height,
        outliers=tuple(Outlier(**row) for row in rows_with_facts(far.head(k), inputs.samples)),
    )


def _spread(frame: pl.LazyFrame) -> Spread:
    row: dict[str, Any] = scores.collect(scores.statistics(frame)).row(0, named=True)
    return Spread(**row | {"std": math.nan if row["std"] is None else row["std"]})


def _pair_spread(inputs: Inputs, targets: list[int], samples: int) -> Spread:
    """Over all pairs: in one pass, or block by block where epochs have to be summed first."""
    if not inputs.by_epoch:
        return _spread(inputs.contributions)
    return merged([_spread(block) for block in blocks_of(inputs, targets, samples)])


def merged(parts: Sequence[Spread]) -> Spread:
    """The spread of everything from the spreads of its parts."""
    count = sum(part.count for part in parts)
    mean = sum(part.count * part.mean for part in parts) / count
    within = sum((part.count - 1) * part.std**2 for part in parts if part.count > 1)
    squares = within + sum(part.count * (part.mean - mean) ** 2 for part in parts)
    return Spread(
        count=count,
        mean=mean,
        std=math.sqrt(squares / (count - 1)) if count > 1 else math.nan,
        min=min(part.min for part in parts),
        max=max(part.max for part in parts),
        positive=sum(part.positive for part in parts),
        negative=sum(part.negative for part in parts),
        zero=sum(part.zero for part in parts),
    )


def _histogram(totals: pl.DataFrame) -> Histogram:
    """Equal bins over the middle 99 %, so that a few outliers do not flatten the rest into one bin."""
    low, high = (float(x) for x in np.quantile(totals["contribution"].to_numpy(), [0.005, 0.995]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = scores.collect(scores.histogram(totals.lazy(), low, high, BINS))["count"]
    return Histogram(low, high, tuple(counts.to_list()))
