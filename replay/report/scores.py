"""From contributions to answers, as queries that Polars runs over files larger than the memory.

Every function takes a LazyFrame of `contributions.parquet` (sample, target, contribution and perhaps epoch) and
returns a LazyFrame; nothing is computed before `collect`, which asks for the streaming engine. C(i, j) is the
contribution of training sample i to target j, positive = helpful: removing the sample would raise the target.

    total of a sample     sum over epochs of the mean over targets of C(i, j): its contribution to the mean target
    share of a sample     |C| / sum over all tracked samples of |C|, for the same target (or of the totals)
    inter-class matrix    mean of C(i, j) over all pairs of a training class and a test class (paper, equation 23)

    z of a sample         (C - mean) / standard deviation, over all tracked samples
    concentration         share carried by the 1 % of samples with the largest |C|

Shares are of the sum of absolute values, because contributions of both signs nearly cancel and a share of their
plain sum would exceed 1 many times over. Samples of equal contribution are ordered by id, so that reports repeat.

    S tracked samples, M targets, k rows of a table
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

HELPFUL, HARMFUL = "helpful", "harmful"
MEAN = -1
ROWS_AT_ONCE = 8_000_000
OPTIMIZATIONS = pl.QueryOptFlags(comm_subplan_elim=False)

_VALUE = pl.col("contribution")


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """The rows of a query, by the streaming engine.

    A scan that occurs twice is read twice: sharing it (common subplan elimination) would hold all its rows in memory.
    """
    return frame.collect(engine="streaming", optimizations=OPTIMIZATIONS)


def pairs(frame: pl.LazyFrame) -> pl.LazyFrame:
    """One row a pair of sample and target: epochs summed."""
    if "epoch" not in frame.collect_schema():
        return frame
    return frame.group_by("sample", "target").agg(_VALUE.sum())


def totals(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Sample and its contribution to the mean of all targets, [S] rows."""
    return _to_the_mean(frame, frame, "sample")


def _to_the_mean(frame: pl.LazyFrame, chosen: pl.LazyFrame, *keys: str) -> pl.LazyFrame:
    """Keys and the contribution of the chosen rows to the mean of all targets."""
    targets = frame.select(pl.col("target").n_unique().alias("targets"))
    sums = chosen.group_by(keys).agg(_VALUE.sum())
    return sums.join(targets, how="cross").select(*keys, _VALUE / pl.col("targets"))


def totals_by_class(frame: pl.LazyFrame, targets: pl.LazyFrame) -> pl.LazyFrame:
    """Sample, class and the sample's contribution to the mean of the targets of that class.

    Args:
        frame: contributions.
        targets: target and label; targets without a label are left out.
    """
    labels = targets.select("target", pl.col("label").alias("class")).drop_nulls()
    members = labels.join(frame.select("target").unique(), on="target", how="semi")
    sizes = members.group_by("class").agg(pl.len().alias("size"))
    sums = frame.join(labels, on="target").group_by("sample", "class").agg(_VALUE.sum())
    return sums.join(sizes, on="class").select("sample", "class", _VALUE / pl.col("size"))


def top(frame: pl.LazyFrame, k: int, by: str | None = None) -> pl.LazyFrame:
    """The k most helpful and k most harmful samples, with their ranks and shares.

    Args:
        frame: sample and contribution, one row a sample (of each group if `by` is given).
        k: rows of each side; a helpful sample has a positive contribution, a harmful one a negative.
        by: column of the groups, each with a table of its own.

    Returns:
        `by` (if given), side, rank (from 1), sample, contribution, share; helpful before harmful.
    """
    group = [by] if by else []
    one = pl.lit(0, pl.Int8).alias("_all")
    frame = frame.with_columns(one)
    keys = group or ["_all"]
    share = _VALUE.abs() / pl.col("_sum")
    sums = frame.group_by(keys).agg(_VALUE.abs().sum().alias("_sum"))
    sides = [_side(frame, k, keys, side) for side in (HELPFUL, HARMFUL)]
    rows = pl.concat(sides).join(sums, on=keys).with_columns(share=share)
    columns = [*group, "side", "rank", "sample", "contribution", "share"]
    return rows.sort([*group, "side", "rank"], descending=[False] * len(group) + [True, False]).select(columns)


def _side(frame: pl.LazyFrame, k: int, keys: list[str], side: str) -> pl.LazyFrame:
    helpful = side == HELPFUL
    order = ["contribution", "sample"]
    best = pl.col("sample", "contribution").top_k_by(order, k, reverse=[not helpful, True])
    rows = frame.filter(_VALUE > 0 if helpful else _VALUE < 0).group_by(keys).agg(best)
    rank = pl.int_range(1, pl.len() + 1, dtype=pl.Int64).over(keys).alias("rank")
    rows = rows.explode("sample", "contribution").sort(
        [*keys, *order], descending=[False] * len(keys) + [helpful, False]
    )
    return rows.with_columns(pl.lit(side).alias("side"), rank)


def only(frame: pl.LazyFrame, target: int) -> pl.LazyFrame:
    """Sample and contribution to one target, [S] rows."""
    return pairs(frame.filter(pl.col("target") == target)).select("sample", "contribution")


def target_ids(frame: pl.LazyFrame) -> list[int]:
    """The ids of all targets, ascending."""
    return collect(frame.select(pl.col("target").unique().sort()))["target"].to_list()


def statistics(frame: pl.LazyFrame) -> pl.LazyFrame:
    """One row: count, mean, std, min, max, and how many are positive, negative and zero."""
    return frame.select(
        count=pl.len(),
        mean=_VALUE.mean(),
        std=_VALUE.std(),
        min=_VALUE.min(),
        max=_VALUE.max(),
        positive=(_VALUE > 0).sum(),
        negative=(_VALUE < 0).sum(),
        zero=(_VALUE == 0).sum(),
    )


def outliers(frame: pl.LazyFrame, z: float = 3.0) -> pl.LazyFrame:
    """Samples at least z standard deviations from the mean, farthest first: sample, contribution, z."""
    score = (_VALUE - _VALUE.mean()) / _VALUE.std()
    far = frame.select("sample", "contribution", z=score).filter(pl.col("z").is_finite(), pl.col("z").abs() >= z)
    return far.sort([pl.col("z").abs(), "sample"], descending=[True, False])


def concentration(frame: pl.LazyFrame, fractions: tuple[float, ...] = (0.01, 0.05, 0.1, 0.5)) -> pl.LazyFrame:
    """Share of the sum of |C| that the largest fraction of samples carries: fraction, samples, share.

    Args:
        frame: sample and contribution, one row a sample.
        fractions: of the samples; at least one sample is taken.
    """
    size = _VALUE.abs().sort(descending=True)
    running = frame.select(mass=size.cum_sum() / _VALUE.abs().sum(), taken=pl.int_range(1, pl.len() + 1))
    wanted = frame.select(pl.len().cast(pl.Float64).alias("all")).join(
        pl.LazyFrame({"fraction": list(fractions)}), how="cross"
    )
    counts = wanted.select("fraction", taken=(pl.col("all") * pl.col("fraction")).ceil().clip(1).cast(pl.Int64))
    return counts.join(running, on="taken").select("fraction", samples="taken", share="mass").sort("fraction")


def histogram(frame: pl.LazyFrame, low: float, high: float, bins: int) -> pl.LazyFrame:
    """Counts of contributions in equal bins from low to high: bin, count; what lies outside is in the end bins."""
    width = (high - low) / bins
    place = ((_VALUE - low) / width).floor().clip(0, bins - 1).cast(pl.Int64)
    counts = frame.group_by(bin=place).agg(count=pl.len().cast(pl.Int64))
    return pl.LazyFrame({"bin": range(bins)}).join(counts, on="bin", how="left").fill_null(0).sort("bin")


def matrix(frame: pl.LazyFrame, samples: pl.LazyFrame, targets: pl.LazyFrame) -> pl.LazyFrame:
    """Mean contribution of every training class to every test class (paper, equation 23).

    Args:
        frame: contributions.
        samples: sample and label.
        targets: target and label.

    Returns:
        train, test, contribution: the mean over all pairs of the two classes.
    """
    train = samples.select("sample", train="label").drop_nulls()
    test = targets.select("target", test="label").drop_nulls()
    epochs = pl.col("epoch").n_unique() if "epoch" in frame.collect_schema() else pl.lit(1)
    cells = frame.join(train, on="sample").join(test, on="target").group_by("train", "test")
    return cells.agg(_VALUE.mean() * epochs).sort("train", "test")


def normalised(cells: pl.LazyFrame) -> pl.LazyFrame:
    """The matrix, every entry divided by sqrt(row sum x column sum); null where that product is not positive."""
    product = _VALUE.sum().over("train") * _VALUE.sum().over("test")
    return cells.with_columns(pl.when(product > 0).then(_VALUE / product.sqrt()))


def phases(frame: pl.LazyFrame) -> pl.LazyFrame:
    """What each epoch carried: epoch, and the sums over samples of what helped and of what harmed.

    Args:
        frame: epoch, sample and contribution to the mean target, one row a sample and epoch.
    """
    sums = frame.group_by("epoch").agg(helpful=_VALUE.filter(_VALUE > 0).sum(), harmful=_VALUE.filter(_VALUE < 0).sum())
    return sums.sort("epoch")


def totals_by_epoch(frame: pl.LazyFrame, epochs: list[int]) -> pl.LazyFrame:
    """Epoch, sample and contribution to the mean target in some epochs."""
    return _to_the_mean(frame, frame.filter(pl.col("epoch").is_in(epochs)), "epoch", "sample")


def tracks(frame: pl.LazyFrame, samples: list[int]) -> pl.LazyFrame:
    """The timeline of some samples: sample, epoch, contribution to the mean target."""
    rows = _to_the_mean(frame, frame.filter(pl.col("sample").is_in(samples)), "sample", "epoch")
    return rows.sort("sample", "epoch")


def by_label(frame: pl.LazyFrame, samples: pl.LazyFrame) -> pl.LazyFrame:
    """Sum of contributions by the samples' label, largest first: label, samples, contribution."""
    labels = samples.select("sample", "label").drop_nulls()
    sums = frame.join(labels, on="sample").group_by("label").agg(pl.len().alias("samples"), _VALUE.sum())
    return sums.sort(["contribution", "label"], descending=[True, False])


def blocks(frame: pl.LazyFrame, targets: list[int], samples: int) -> Iterator[pl.LazyFrame]:
    """The pairs of some targets at a time, so that a grouped top stays within a bounded memory."""
    size = max(1, ROWS_AT_ONCE // max(1, samples))
    for start in range(0, len(targets), size):
        yield pairs(frame.filter(pl.col("target").is_in(targets[start : start + size])))
