"""How well predicted numbers go with those that happened; NaN where one side does not vary."""

from __future__ import annotations

import numpy as np

from trajrec.records import FloatArray, IntArray

_RESAMPLED = 2000


def pearson(a: FloatArray, b: FloatArray) -> float:
    """Pearson's correlation of two arrays of a shape."""
    a, b = a - a.mean(), b - b.mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.clip((a * b).sum() / np.sqrt(np.square(a).sum() * np.square(b).sum()), -1, 1))


def spearman(a: FloatArray, b: FloatArray) -> float:
    """Spearman's rank correlation of two arrays [n]; ties share their mean rank."""
    return pearson(_ranks(a), _ranks(b))


def _ranks(values: FloatArray) -> FloatArray:
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: FloatArray = (ends - (counts - 1) / 2)[places]
    return found


def bootstrap(a: FloatArray, b: FloatArray, seed: int, share: float = 0.95) -> tuple[float, float]:
    """Interval of the correlation of two arrays [K, M], rows and columns drawn again with replacement.

    Numbers of a row, and those of a column, go together: single pairs are not drawn (Owen 2007, "The pigeonhole
    bootstrap"). Of few rows or columns such intervals are too narrow rather than too wide.
    """
    rng = np.random.default_rng(seed)
    rows, columns = (_drawn(rng, size) for size in a.shape)
    pairs = ((rows[i][:, None], columns[i]) for i in range(_RESAMPLED))
    found = np.array([pearson(a[pair], b[pair]) for pair in pairs])
    found = found[np.isfinite(found)]
    if not len(found):
        return np.nan, np.nan
    low, high = np.quantile(found, [(1 - share) / 2, (1 + share) / 2])
    return float(low), float(high)


def _drawn(rng: np.random.Generator, size: int) -> IntArray:
    return rng.integers(0, size, (_RESAMPLED, size))
