"""From contributions to answers, as queries that Polars runs over files larger than the memory.

Every function takes a LazyFrame of `contributions.parquet` (sample, target, contribution and perhaps epoch) and
returns a LazyFrame; nothing is computed before `collect`, which asks for the streaming engine. C(i, j) is the
contribution of training sample i to target j, positive = helpful: removing the sample would raise the target.

    total of a sample     sum over epochs of the mean over targets of C(i, j): its contribution to the mean target
    share of a sample     |C| / sum over all tracked samples of |C|, for the same target (or of the totals)
    inter-class matrix    mean of C(i, j) over all pairs of a training class and a test class (paper, equation 23)

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

_VALUE = pl.col("contribution")


def collect(frame: pl.LazyFrame) -> pl.DataFrame:
    """The rows of a query, by the streaming engine."""
    return frame.collect(engine="streaming")


def pairs(frame: pl.LazyFrame) -> pl.LazyFrame:
    """One row a pair of sample and target: epochs summed."""
    if "epoch" not in frame.collect_schema():
        return frame
    return frame.group_by("sample", "target").agg(_VALUE.sum())


def totals(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Sample and its contribution to the mean of all targets, [S] rows."""
    targets = frame.select(pl.col("target").n_unique().alias("targets"))
    sums = frame.group_by("sample").agg(_VALUE.sum())
    return sums.join(targets, how="cross").select("sample", _VALUE / pl.col("targets"))


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


def blocks(frame: pl.LazyFrame, targets: list[int], samples: int) -> Iterator[pl.LazyFrame]:
    """The pairs of some targets at a time, so that a grouped top stays within a bounded memory."""
    size = max(1, ROWS_AT_ONCE // max(1, samples))
    for start in range(0, len(targets), size):
        yield pairs(frame.filter(pl.col("target").is_in(targets[start : start + size])))
