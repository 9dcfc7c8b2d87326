"""How far two replays of the same samples agree: exact and Hessian-free, two runs, two dtypes.

    Spearman      correlation of ranks; ties share their mean rank
    Kendall       tau-b: (concordant - discordant) / sqrt((pairs untied in a) (pairs untied in b))
    sign error    fraction of samples whose sign differs (paper, figure 4)
    overlap       fraction of the top k of one side that is in the top k of the other

Discordant pairs are inversions of b in the order of a. They are counted bit by bit: among numbers that agree in
all higher bits, an inversion at this bit is a one before a zero. O(n log n) in numpy, so that no statistics library
is needed for it.

    n samples that both replays have
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Array = npt.NDArray[Any]


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
    """
    n = len(a)
    k = min(k, n)
    return Agreement(
        samples=n,
        spearman=correlation(ranks(a), ranks(b)),
        kendall=kendall(a, b),
        pearson=correlation(a, b),
        sign_error=float(np.mean(np.sign(a) != np.sign(b))) if n else math.nan,
        k=k,
        overlap_helpful=overlap(-a, -b, k),
        overlap_harmful=overlap(a, b, k),
        slope=float(a @ b / (a @ a)) if n and (a @ a) > 0 else math.nan,
    )


def ranks(values: Array) -> Array:
    """[n] ranks from 1; equal values share their mean rank."""
    return pl.Series(values).rank("average").to_numpy()


def correlation(a: Array, b: Array) -> float:
    """Pearson's correlation, NaN if a side is constant or there are fewer than two values."""
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return math.nan
    return float(np.clip(np.corrcoef(a, b)[0, 1], -1, 1))


def kendall(a: Array, b: Array) -> float:
    """Kendall's tau-b, NaN if a side is constant or there are fewer than two values."""
    order = np.lexsort((b, a))
    a, b = dense(a)[order], dense(b)[order]
    both = a * (len(b) + 1) + b
    every = len(a) * (len(a) - 1) // 2
    tied_a, tied_b, tied = _tied(a), _tied(b), _tied(both)
    untied = (every - tied_a) * (every - tied_b)
    if untied <= 0:
        return math.nan
    return (every - tied_a - tied_b + tied - 2 * inversions(b)) / math.sqrt(untied)


def inversions(numbers: Array) -> int:
    """How many pairs stand in the wrong order.

    Args:
        numbers: [n] integers from 0.
    """
    total = 0
    for bit in reversed(range(int(numbers.max(initial=0)).bit_length())):
        numbers = numbers[np.argsort(numbers >> (bit + 1), kind="stable")]
        prefix, one = numbers >> (bit + 1), (numbers >> bit) & 1
        ones_before = np.cumsum(one) - one
        in_prefix = ones_before - ones_before[np.searchsorted(prefix, prefix)]
        total += int(in_prefix[one == 0].sum())
    return total


def dense(values: Array) -> Array:
    """[n] numbers from 0 in the order of the values; equal values share a number."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def overlap(a: Array, b: Array, k: int) -> float:
    """Fraction of the k smallest of a that are among the k smallest of b; NaN if k is 0."""
    if k == 0:
        return math.nan
    return len(set(_smallest(a, k)) & set(_smallest(b, k))) / k


def _smallest(values: Array, k: int) -> list[int]:
    return [int(index) for index in np.argsort(values, kind="stable")[:k]]


def _tied(values: Array) -> int:
    counts = np.unique(values, return_counts=True)[1].astype(np.int64)
    return int((counts * (counts - 1) // 2).sum())
