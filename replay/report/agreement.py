"""How far two replays of the same samples agree: exact and Hessian-free, two runs, two dtypes.

Spearman      correlation of ranks; ties share their mean rank
Kendall       tau-b: (concordant - discordant) / sqrt((pairs untied in a) (pairs untied in b)), by scipy
sign error    fraction of samples whose sign differs (paper, figure 4)
overlap       fraction of the top k of one side that is in the top k of the other

n samples that both replays have
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl

from trajrec.errors import ReplayError
from trajrec.records import Array

Array = Array


@dataclass(frozen=True, slots=True)
class Agreement:
    """Agreement of two replays; a measure is NaN where it is not defined (a constant side).

    Attributes:
        samples: n, samples in both.
        spearman: in [-1, 1].
        kendall: tau-b, in [-1, 1].
        pearson: in [-1, 1].
        sign_error: in [0, 1].
        k: size of the top lists.
        overlap_helpful: in [0, 1].
        overlap_harmful: in [0, 1].
        slope: least-squares slope of b on a through the origin; 1 if both have the same scale.
    """

    samples: int
    spearman: float
    kendall: float
    pearson: float
    sign_error: float
    k: int
    overlap_helpful: float
    overlap_harmful: float
    slope: float


def joined(a: pl.LazyFrame, b: pl.LazyFrame) -> pl.LazyFrame:
    """Sample, a, b for the samples that both totals have, by id.

    Args:
        a: sample and contribution, one row a sample.
        b: the same of the other replay.
    """
    other = b.select("sample", pl.col("contribution").alias("b"))
    return a.select("sample", pl.col("contribution").alias("a")).join(other, on="sample").sort("sample")


def agree(a: Array, b: Array, k: int = 100) -> Agreement:
    """The agreement of two lists of contributions.

    Args:
        a: [n] contributions of one replay.
        b: [n] contributions of the same samples in the other.
        k: size of the top lists to compare; at most n.

    Raises:
        ReplayError: scipy is missing.
    """
    n = len(a)
    k = min(k, n)
    return Agreement(
        samples=n,
        spearman=spearman(a, b),
        kendall=kendall(a, b),
        pearson=correlation(a, b),
        sign_error=sign_error(a, b),
        k=k,
        overlap_helpful=overlap(-a, -b, k),
        overlap_harmful=overlap(a, b, k),
        slope=float(a @ b / (a @ a)) if n and (a @ a) > 0 else math.nan,
    )


def ranks(values: Array) -> Array:
    """[n] ranks from 1; equal values share their mean rank."""
    return pl.Series(values).rank("average").to_numpy()


def spearman(a: Array, b: Array) -> float:
    """The correlation of ranks, NaN where `correlation` is."""
    return correlation(ranks(a), ranks(b))


def correlation(a: Array, b: Array) -> float:
    """Pearson's correlation, NaN if a side is constant or there are fewer than two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


def kendall(a: Array, b: Array) -> float:
    """Kendall's tau-b, NaN if a side is constant or there are fewer than two values.

    Raises:
        ReplayError: scipy is missing.
    """
    try:
        from scipy.stats import kendalltau
    except ImportError:
        raise ReplayError(
            "Comparing two replays needs scipy, which is not installed: pip install 'trajrec[report]'."
        ) from None
    return float(kendalltau(a, b).statistic) if len(a) > 1 else math.nan


def sign_error(a: Array, b: Array) -> float:
    """Fraction of values whose sign differs, NaN if there are none."""
    return float(np.mean(np.sign(a) != np.sign(b))) if len(a) else math.nan


def overlap(a: Array, b: Array, k: int) -> float:
    """Fraction of the k smallest of a that are among the k smallest of b; NaN if k is 0."""
    if k == 0:
        return math.nan
    return len(np.intersect1d(_smallest(a, k), _smallest(b, k))) / k


def _smallest(values: Array, k: int) -> Array:
    return np.argsort(values, kind="stable")[:k]


def known_mean(values: Iterable[float]) -> float:
    """The mean of those that are not NaN, NaN if there are none."""
    mean = pl.Series(list(values), dtype=pl.Float64).drop_nans().mean()
    return mean if isinstance(mean, float) else math.nan
