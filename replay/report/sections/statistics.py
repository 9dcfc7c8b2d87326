"""How contributions are distributed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from trajrec.records import Json
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores, words
from trajrec.replay.report.blocks import Bar, Chapter, Chart, Fact, Facts, Kind, Part, Table
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import blocks_of, named

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
class Histogram:
    """Counts [bins] in equal bins from low to high; the first and last also count what lies outside."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Statistics:
    """Mean, deviation, concentration and outliers.

    Attributes:
        samples: spread of the samples' contributions to the mean target.
        pairs: spread of all S x M contributions, if M > 1.
        concentration: (fraction of the samples, how many that are, share of the sum of |C| they carry).
        histogram: of the samples.
        far: how many samples are outliers (3 standard deviations or more).
        outliers: the farthest of them: sample, label, name, contribution, z in standard deviations.
    """

    samples: Spread
    pairs: Spread | None
    concentration: tuple[tuple[float, int, float], ...]
    histogram: Histogram
    far: int
    outliers: pl.DataFrame


def find(material: Material) -> Statistics:
    """Mean, deviation, concentration, histogram and outliers."""
    inputs, totals, targets = material.inputs, material.totals, material.targets
    far = scores.collect(scores.outliers(totals.lazy()))
    shares = scores.collect(scores.concentration(totals.lazy())).rows()
    return Statistics(
        samples=_spread(totals.lazy()),
        pairs=_pair_spread(inputs, targets, totals.height) if len(targets) > 1 else None,
        concentration=tuple(shares),
        histogram=_histogram(totals),
        far=far.height,
        outliers=named(far.head(material.k), inputs.samples).select("sample", "label", "name", "contribution", "z"),
    )


def _spread(frame: pl.LazyFrame) -> Spread:
    row: Json = scores.collect(scores.statistics(frame)).row(0, named=True)
    return Spread(**row | {"std": math.nan if row["std"] is None else row["std"]})


def _pair_spread(inputs: Inputs, targets: list[int], samples: int) -> Spread:
    """Over all pairs: in one pass, or block by block where epochs have to be summed first."""
    if not inputs.by_epoch:
        return _spread(inputs.contributions)
    return merged([_spread(block) for block in blocks_of(inputs, targets, samples)])


def merged(parts: Sequence[Spread]) -> Spread:
    """The spread of everything from the spreads of its parts."""
    rows = pl.DataFrame(parts)
    sums = rows.select(pl.col("count", "positive", "negative", "zero").sum()).row(0, named=True)
    count, mean = sums["count"], rows.select(pl.col("mean").dot("count")).item() / sums["count"]
    apart = (pl.col("count") - 1) * pl.col("std").fill_nan(0) ** 2 + pl.col("count") * (pl.col("mean") - mean) ** 2
    std = math.sqrt(rows.select(apart.sum()).item() / (count - 1)) if count > 1 else math.nan
    return Spread(mean=mean, std=std, min=min(rows["min"]), max=max(rows["max"]), **sums)


def _histogram(totals: pl.DataFrame) -> Histogram:
    """Equal bins over the middle 99 %, so that a few outliers do not flatten the rest into one bin."""
    low, high = (float(x) for x in np.quantile(totals["contribution"].to_numpy(), [0.005, 0.995]))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = scores.collect(scores.histogram(totals.lazy(), low, high, BINS))["count"]
    return Histogram(low, high, tuple(counts.to_list()))


def chapter(found: Statistics) -> Chapter:
    """The histogram beside the spreads, then the outliers."""
    spreads = [_facts("samples", found.samples), *([_facts("pairs", found.pairs)] if found.pairs else [])]
    carried = tuple(Fact(_part(part), _carries(count, share)) for part, count, share in found.concentration)
    facts = Facts((*spreads, carried), "How the contributions are distributed", short="")
    outliers = (Part((_outliers(found),)),) if found.far else ()
    part, _, share = found.concentration[0]
    tiles = (
        (words.whole(found.samples.positive / found.samples.count), "of the training samples help"),
        (words.whole(share), f"of all influence lies in the {_part(part)}"),
    )
    title = "How contributions are distributed"
    intro = "A pair is a sample and a target. What samples carry is a share of the sum of |contribution|."
    parts = (Part((_chart(found.histogram), facts), beside=True), *outliers)
    return Chapter("Distribution", title, parts, intro, tiles)


def _facts(name: str, spread: Spread) -> tuple[Fact, ...]:
    signs = ((spread.positive, "help"), (spread.negative, "harm"), (spread.zero, "neither"))
    return (
        Fact(f"{spread.count:,} {name}", f"mean {words.number(spread.mean)}, standard deviation {spread.std:.3e}"),
        Fact("", f"from {words.number(spread.min)} to {words.number(spread.max)}"),
        Fact("sign", ", ".join(f"{words.percent(number / spread.count)} {word}" for number, word in signs)),
    )


def _part(fraction: float) -> str:
    return f"top {100 * fraction:g} %"


def _carries(count: int, share: float) -> str:
    return f"{words.counted(count, 'sample')} carr{'ies' if count == 1 else 'y'} {words.percent(share)}"


def _outliers(found: Statistics) -> Table:
    columns = {"sample": Kind.SAMPLE, "label": Kind.LABEL, "name": Kind.CAPTION}
    columns |= {"contribution": Kind.SIGNED, "z": Kind.DEVIATION}
    title = f"{found.far:,} outliers: 3 standard deviations or more from the mean"
    return Table(rows=found.outliers, columns=columns, title=title)


def _chart(found: Histogram) -> Chart:
    width = (found.high - found.low) / len(found.counts)
    bars = []
    for i, count in enumerate(found.counts):
        low, high = found.low + i * width, found.low + (i + 1) * width
        beyond = " and beyond" if i in (0, len(found.counts) - 1) else ""
        text = f"{count:,} samples from {words.number(low)} to {words.number(high)}{beyond}"
        bars.append(Bar(low, high, count, scores.HELPFUL if low + high > 0 else scores.HARMFUL, text))
    text = "Number of samples by contribution"
    return Chart(text, "contribution", "samples", (found.low, found.high), tuple(bars))


SECTION = Section("statistics", lambda ask: ask.statistics, find, chapter, "spread")
