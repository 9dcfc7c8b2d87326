"""Samples whose labels may be wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import polars as pl

from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores, suspects, words
from trajrec.replay.report.blocks import Chapter, Kind, Part, Table
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import mean_of, named, order
from trajrec.replay.report.suspects import Detection, Jaccard


@dataclass(frozen=True, slots=True, eq=False)
class Ranking:
    """Samples by one suspicion.

    Attributes:
        title: what the score is.
        suspects: the k most suspected: rank, sample, label, name, noisy, score.
        detection: how well it finds known wrong labels, if any are known.
    """

    title: str
    suspects: pl.DataFrame
    detection: Detection | None


@dataclass(frozen=True, slots=True, eq=False)
class Clusters:
    """The paper's clustering by signs.

    Attributes:
        classes: the two clusters of every class (`suspects.signs`).
        suspected: how many samples are in clusters that harm.
        jaccard: overlap with the known wrong labels, if any are known.
    """

    classes: pl.DataFrame
    suspected: int
    jaccard: Jaccard | None


@dataclass(frozen=True, slots=True)
class Suspicions:
    """Everything that suggests wrong labels; clusters are None where there are few targets or no labels."""

    rankings: tuple[Ranking, ...]
    clusters: Clusters | None


def find(material: Material) -> Suspicions:
    """Suspected wrong labels, by every means the folder allows.

    Raises:
        ReplayError: scikit-learn is missing, and suspects were asked for by name.
    """
    inputs, totals, k = material.inputs, material.totals, material.k
    noisy = scores.collect(inputs.samples.select("sample", "noisy").drop_nulls())
    found = [_ranking(inputs, title, scores.collect(frame), noisy, k) for title, frame in _score_frames(inputs, totals)]
    labelled = not scores.collect(inputs.samples.select("label").drop_nulls().head(1)).is_empty()
    clusters = None
    if labelled and len(material.targets) >= suspects.FEWEST:
        clusters = material.unless_refused(material.ask.suspects, lambda: _clusters(inputs, totals, noisy))
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
    first = named(ranked.head(k), inputs.samples).with_row_index("rank", 1)
    known = ranked.join(noisy, on="sample", maintain_order="left")
    detection = suspects.detect(known["score"].to_numpy(), known["noisy"].to_numpy()) if known.height else None
    return Ranking(title, first.select("rank", "sample", "label", "name", "noisy", "score"), detection)


def _clusters(inputs: Inputs, totals: pl.DataFrame, noisy: pl.DataFrame) -> Clusters:
    clusters, classes = suspects.signs(inputs.contributions, inputs.samples, totals)
    labels, key = classes["label"].to_list(), order(inputs.settings)
    places = sorted(range(len(labels)), key=lambda place: key(labels[place]))
    return Clusters(classes[places], int(clusters["suspected"].sum()), suspects.jaccard(clusters, noisy))


def chapter(found: Suspicions) -> Chapter:
    """A table for each suspicion, and one of the clusters."""
    parts = [Part((_suspects(ranking),)) for ranking in found.rankings]
    parts += [Part((_classes(found.clusters),))] if found.clusters else []
    known, tiles = found.rankings[0].detection, []
    if known and known.wrong:
        tiles.append((words.whole(known.found_20), "of known wrong labels are in the most harmful 20 %"))
    return Chapter("Suspects", "Suspected wrong labels", tuple(parts), tiles=tuple(tiles))


def _suspects(ranking: Ranking) -> Table:
    known = pl.col("noisy").replace_strict([True, False], ["wrong", "right"], default=None, return_dtype=pl.String)
    columns = {"rank": Kind.RANK, "sample": Kind.SAMPLE, "label": Kind.LABEL, "name": Kind.CAPTION}
    columns |= {"score": Kind.NUMBER}
    columns |= {"known": Kind.MARK} if ranking.suspects["noisy"].count() else {}
    return Table(
        rows=ranking.suspects.with_columns(known=known),
        columns=columns,
        title=f"Suspected wrong labels, by {ranking.title}",
        short=f"By {ranking.title}",
        note=_detection(ranking.detection) if ranking.detection else "",
    )


def _detection(found: Detection) -> str:
    """How well a score finds the known wrong labels."""
    if not found.wrong:
        return f"no wrong label is known among {found.samples:,} samples"
    tenth, fifth = words.percent(found.found_10), words.percent(found.found_20)
    return (
        f"{found.wrong:,} of {found.samples:,} labels are known to be wrong: ROC-AUC {words.ratio(found.auc)}; "
        f"{tenth} of them found after inspecting 10 %, {fifth} after 20 %"
    )


def _classes(found: Clusters) -> Table:
    names = {"label": "class", "mean_apart": "mean apart", "mean_rest": "mean of the rest"}
    what = pl.when(pl.col("mean_apart") < 0).then(pl.lit("suspected"))
    columns = {"class": Kind.TEXT, "samples": Kind.COUNT, "apart": Kind.COUNT}
    columns |= {"mean apart": Kind.SIGNED, "mean of the rest": Kind.SIGNED, "what": Kind.TEXT}
    return Table(
        rows=found.classes.with_columns(what=what).rename(names),
        columns=columns,
        title="Two clusters of each class by the signs of contributions",
        note=_meaning(found),
    )


def _meaning(found: Clusters) -> str:
    """What the clusters suspect, and how far that is right."""
    text = (
        "Two clusters are always found, also where every label is right. "
        f"{found.suspected:,} samples are in clusters that harm on the whole: suspected"
    )
    if found.jaccard is None:
        return text
    right, wrong = words.percent(found.jaccard.correct), words.percent(found.jaccard.wrong)
    return f"{text}; Jaccard index with the known truth: right labels {right}, wrong labels {wrong}"


SECTION = Section("suspicions", lambda ask: ask.suspects, find, chapter, "suspects")
