"""Samples whose labels may be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores, suspects
from trajrec.replay.report.sections.common import mean_of, order, rows_with_facts
from trajrec.replay.report.suspects import ClassClusters, Detection, Jaccard


@dataclass(frozen=True, slots=True)
class Suspect:
    """A sample whose label may be wrong; a larger score is more suspected."""

    rank: int
    sample: int
    label: str | None
    name: str | None
    noisy: bool | None
    score: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """Samples by one suspicion.

    Attributes:
        title: what the score is.
        suspects: the k most suspected.
        detection: how well it finds known wrong labels, if any are known.
    """

    title: str
    suspects: tuple[Suspect, ...]
    detection: Detection | None


@dataclass(frozen=True, slots=True)
class Clusters:
    """The paper's clustering by signs.

    Attributes:
        classes: the two clusters of every class.
        suspected: how many samples are in clusters that harm.
        jaccard: overlap with the known wrong labels, if any are known.
    """

    classes: tuple[ClassClusters, ...]
    suspected: int
    jaccard: Jaccard | None


@dataclass(frozen=True, slots=True)
class Suspicions:
    """Everything that suggests wrong labels; clusters are None where there are few targets or no labels."""

    rankings: tuple[Ranking, ...]
    clusters: Clusters | None


def suspicions(inputs: Inputs, totals: pl.DataFrame, targets: int, k: int, cluster: bool = True) -> Suspicions:
    """Suspected wrong labels, by every means the folder allows.

    Raises:
        ReplayError: scikit-learn is missing and `cluster` is set.
    """
    noisy = scores.collect(inputs.samples.select("sample", "noisy").drop_nulls())
    found = [_ranking(inputs, title, scores.collect(frame), noisy, k) for title, frame in _score_frames(inputs, totals)]
    labelled = not scores.collect(inputs.samples.select("label").drop_nulls().head(1)).is_empty()
    clusters = _clusters(inputs, totals, noisy) if cluster and targets >= suspects.FEWEST and labelled else None
    return Suspicions(tuple(found), clusters)


def _score_frames(inputs: Inputs, totals: pl.DataFrame) -> Iterator[tuple[str, pl.LazyFrame]]:
    settings = inputs.settings
    yield f"harm to {mean_of(settings)}", suspects.harm(totals.lazy())
    own = inputs.samples.select("sample", score="self_influence").drop_nulls()
    if settings.target_set == "train" and settings.targets in ("each", "chosen"):
        yield "self-influence", suspects.self_influence(inputs.contributions)
    elif not scores.collect(own.head(1)).is_empty():
        yield "self-influence", own.sort(["score", "sample"], descending=[True, False])


def _ranking(inputs: Inputs, title: str, ranked: pl.DataFrame, noisy: pl.DataFrame, k: int) -> Ranking:
    first = rows_with_facts(ranked.head(k), inputs.samples, "noisy")
    known = ranked.join(noisy, on="sample", maintain_order="left")
    detection = suspects.detect(known["score"].to_numpy(), known["noisy"].to_numpy()) if known.height else None
    return Ranking(title, tuple(Suspect(rank=i, **row) for i, row in enumerate(first, 1)), detection)


def _clusters(inputs: Inputs, totals: pl.DataFrame, noisy: pl.DataFrame) -> Clusters:
    clusters, classes = suspects.signs(inputs.contributions, inputs.samples, totals)
    key = order(inputs.settings)
    ordered = tuple(sorted(classes, key=lambda found: key(found.label)))
    return Clusters(ordered, int(clusters["suspected"].sum()), suspects.jaccard(clusters, noisy))
