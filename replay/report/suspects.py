"""Suspected wrong labels, and how good the suspicion is where the truth is known.

Three suspicions of a training sample:

    harm              minus its total contribution: it raises the loss of the targets
    self-influence    its contribution to its own loss: only the sample itself teaches the model its label
    signs             within each class, two clusters of the vectors sign C(i, .) over up to 1,000 targets (paper,
                      table 4); the cluster of the lower mean contribution is the suspected one, if that mean is
                      negative

The paper names no clustering; here it is k-means on -1, 0 and 1 (scikit-learn). Two clusters are always found, also in
a class without a wrong label: hence the condition on the mean, which the Jaccard indices do not use, and at least 100
targets (with the ten class means of a real MNIST run, clusters held two fifths of the samples and meant nothing).

Where the truth is known: ROC-AUC of a score, the fraction of wrong labels found after inspecting the first 10 % and
20 %, and for clusters the Jaccard index |found and true| / |found or true|, mean over classes.

    n samples, F targets used as features
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from trajrec.errors import ReplayError
from trajrec.records import Array
from trajrec.replay.report import scores
from trajrec.replay.report.agreement import known_mean, ranks

Array = Array
FEATURES = 1000
FEWEST = 100


@dataclass(frozen=True, slots=True)
class Detection:
    """How well a score finds the known wrong labels.

    Attributes:
        samples: samples whose truth is known.
        wrong: wrong labels among them.
        auc: area under the ROC curve; .5 is chance, NaN if there is no wrong or no right label.
        found_10: fraction of the wrong labels among the 10 % most suspected.
        found_20: the same for 20 %.
    """

    samples: int
    wrong: int
    auc: float
    found_10: float
    found_20: float


@dataclass(frozen=True, slots=True)
class Jaccard:
    """Overlap of the clusters with the truth, mean over classes (paper, table 4)."""

    correct: float
    wrong: float


def harm(totals: pl.LazyFrame) -> pl.LazyFrame:
    """Sample and score, most suspected first: minus the total contribution."""
    return _ordered(totals.select("sample", score=-pl.col("contribution")))


def self_influence(frame: pl.LazyFrame) -> pl.LazyFrame:
    """Sample and score, most suspected first: the contribution to its own loss.

    Args:
        frame: contributions to training samples as targets, so that a target's id is a sample's id.
    """
    own = scores.pairs(frame.filter(pl.col("sample") == pl.col("target")))
    return _ordered(own.select("sample", score=pl.col("contribution")))


def _ordered(frame: pl.LazyFrame) -> pl.LazyFrame:
    return frame.sort(["score", "sample"], descending=[True, False])


def signs(frame: pl.LazyFrame, samples: pl.LazyFrame, totals: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Two clusters of sign vectors within each class.

    Args:
        frame: contributions to at least `FEWEST` targets, else the signs carry too little.
        samples: sample and label.
        totals: sample and contribution to the mean target.

    Returns:
        Of samples: sample, label, apart (in the cluster of the lower mean contribution) and suspected (and that mean
        is negative). Of classes: label, samples, apart (how many), mean_apart and mean_rest.

    Raises:
        ReplayError: scikit-learn is missing.
    """
    kmeans = _clusterer()
    features = _features(frame)
    labels = scores.collect(samples.select("sample", "label").drop_nulls())
    members = totals.join(labels, on="sample").sort("sample").with_columns(apart=False)
    parts = [members.clear()]
    for group in members.partition_by("label"):
        vectors = _sign_vectors(frame, group["sample"].to_list(), features)
        parts.append(group.with_columns(apart=_lower(group["contribution"].to_numpy(), vectors, kmeans)))
    value, apart = pl.col("contribution"), pl.col("apart")
    classes = pl.concat(parts).group_by("label", maintain_order=True)
    means = classes.agg(
        pl.len().cast(pl.Int64).alias("samples"),
        apart.sum().cast(pl.Int64).alias("apart"),
        value.filter(apart).mean().fill_null(math.nan).alias("mean_apart"),
        value.filter(~apart).mean().fill_null(math.nan).alias("mean_rest"),
    )
    harming = pl.col("label").is_in(means.filter(pl.col("mean_apart") < 0)["label"].to_list())
    return pl.concat(parts).select("sample", "label", "apart", suspected=apart & harming), means


def _features(frame: pl.LazyFrame) -> list[int]:
    targets = scores.target_ids(frame)
    if len(targets) <= FEATURES:
        return targets
    return sorted(np.random.default_rng(0).choice(targets, FEATURES, replace=False).tolist())


def _sign_vectors(frame: pl.LazyFrame, members: list[int], features: list[int]) -> Array:
    """[n, F] signs in -1, 0, 1; members and features ascending."""
    rows = scores.pairs(frame.filter(pl.col("sample").is_in(members), pl.col("target").is_in(features)))
    found = scores.collect(rows.select("sample", "target", sign=pl.col("contribution").sign().cast(pl.Int8)))
    vectors = np.zeros((len(members), len(features)), dtype=np.float32)
    place = np.searchsorted(members, found["sample"]), np.searchsorted(features, found["target"])
    vectors[place] = found["sign"]
    return vectors


def _clusterer() -> Any:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ReplayError(
            "Clustering by signs needs scikit-learn, which is not installed: pip install 'trajrec[report]'."
        ) from None
    return KMeans(n_clusters=2, n_init=5, random_state=0)


def _lower(values: Array, vectors: Array, kmeans: Any) -> Array:
    """[n] whether a sample is in the cluster of the lower mean; no sample is where all vectors are equal."""
    if len(np.unique(vectors, axis=0)) == 1:
        return np.zeros(len(values), dtype=bool)
    apart: Array = kmeans.fit_predict(vectors).astype(bool)
    return ~apart if values[apart].mean() > values[~apart].mean() else apart


def detect(score: Array, wrong: Array) -> Detection:
    """How well a score finds the wrong labels.

    Args:
        score: [n] suspicion, larger is more suspected.
        wrong: [n] whether the label is wrong.
    """
    wrong = np.asarray(wrong, dtype=bool)
    n, bad = len(wrong), int(wrong.sum())
    order = np.argsort(-score, kind="stable")
    found = [float(wrong[order[: math.ceil(part * n)]].sum() / bad) if bad else math.nan for part in (0.1, 0.2)]
    return Detection(n, bad, _auc(score, wrong), *found)


def _auc(score: Array, wrong: Array) -> float:
    """Mann-Whitney: the chance that a wrong label scores above a right one, ties counting half."""
    bad, good = int(wrong.sum()), int((~wrong).sum())
    if bad == 0 or good == 0:
        return math.nan
    return float((ranks(score)[wrong].sum() - bad * (bad + 1) / 2) / (bad * good))


def jaccard(clusters: pl.DataFrame, noisy: pl.DataFrame) -> Jaccard | None:
    """Overlap of the clusters with the truth; None if no sample's truth is known.

    Args:
        clusters: sample, label, apart.
        noisy: sample and noisy.
    """
    known = clusters.join(noisy.drop_nulls(), on="sample")
    if known.is_empty():
        return None
    both = [
        (_overlap(~group["apart"], ~group["noisy"]), _overlap(group["apart"], group["noisy"]))
        for _, group in known.group_by("label", maintain_order=True)
    ]
    return Jaccard(*(known_mean(pair[side] for pair in both) for side in (0, 1)))


def _overlap(found: pl.Series, true: pl.Series) -> float:
    union = int((found | true).sum())
    return int((found & true).sum()) / union if union else math.nan
