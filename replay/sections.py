"""Each section of a report: from opened inputs to findings.

A section that the folder cannot answer raises ReplayError and says which replay would; `report.build` leaves such
sections out when everything that is possible was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import polars as pl

from trajrec.errors import NonFiniteError, ReplayError, SampleRangeError
from trajrec.replay import scores, suspects
from trajrec.replay.agreement import agree, joined
from trajrec.replay.findings import (
    Clusters,
    Comparison,
    Entry,
    Histogram,
    Matrix,
    Outlier,
    Picture,
    Ranking,
    Spread,
    Statistics,
    Suspect,
    Suspicions,
    Timeline,
    Top,
    Track,
    Why,
)
from trajrec.replay.inputs import CONTRIBUTIONS, Inputs, Settings, reading

BINS = 61
POINTS = 2000
COMPARED_TARGETS = 64


def sound_totals(inputs: Inputs) -> pl.DataFrame:
    """Sample and contribution to the mean target, [S] rows by id, every one finite.

    Raises:
        NonFiniteError: one is not.
        ReplayError: there are none.
    """
    path = inputs.folder / CONTRIBUTIONS
    totals = scores.collect(scores.totals(inputs.contributions)).sort("sample")
    if totals.is_empty():
        raise ReplayError(f"{path} has no rows. Replay again with --force.")
    bad = totals.filter(pl.col("contribution").is_finite().fill_null(False).not_())
    if bad.height:
        raise NonFiniteError(
            f"{bad.height:,} of {totals.height:,} samples have a contribution that is NaN or infinite, first sample "
            f"{bad['sample'][0]}, in {path}. Replay again with --dtype float64."
        )
    return totals


def overall(inputs: Inputs, totals: pl.DataFrame, k: int) -> Top:
    """The top samples for the mean target."""
    rows = scores.collect(scores.top(totals.lazy(), k))
    return top(_mean_of(inputs.settings), scores.MEAN, named(rows, inputs.samples))


def _mean_of(settings: Settings) -> str:
    words = {
        "mean": f"the mean {settings.target_set} loss",
        "class": "the mean over the classes",
        "each": f"the mean over all {settings.target_set} samples",
    }
    return words.get(settings.targets, f"the mean over the chosen {settings.target_set} samples")


def by_target(inputs: Inputs, targets: list[int], samples: int, k: int) -> tuple[Top, ...]:
    """The top samples for every target."""
    titles = {row["target"]: _target_title(inputs, row) for row in _target_rows(inputs, targets)}
    rows = [scores.collect(scores.top(block, k, by="target")) for block in _blocks(inputs, targets, samples)]
    labelled = named(pl.concat(rows), inputs.samples)
    return tuple(top(titles[target], target, part) for target, part in _parts(labelled, "target"))


def _blocks(inputs: Inputs, targets: list[int], samples: int) -> Iterator[pl.LazyFrame]:
    """The pairs of some targets at a time; every epoch is a row of its own until it is summed."""
    epochs = scores.collect(inputs.contributions.select(pl.col("epoch").n_unique())).item() if inputs.by_epoch else 1
    return scores.blocks(inputs.contributions, targets, samples * epochs)


def by_class(inputs: Inputs, k: int) -> tuple[Top, ...]:
    """The top samples for the mean loss of every class of targets.

    Raises:
        ReplayError: the labels of the targets are not known.
    """
    if inputs.settings.targets == "mean":
        raise ReplayError(_needs("--by class", "more than the mean target", "--targets class"))
    totals = scores.totals_by_class(inputs.contributions, inputs.targets)
    labelled = named(scores.collect(scores.top(totals, k, by="class")), inputs.samples)
    if labelled.is_empty():
        raise ReplayError(_needs("--by class", "labels of the test samples (targets.parquet)", "--targets class"))
    key = order(inputs.settings)
    parts = sorted(_parts(labelled, "class"), key=lambda part: key(part[0]))
    return tuple(top(f"class {name}", scores.MEAN, part) for name, part in parts)


def why(inputs: Inputs, target: int, k: int) -> Why:
    """What taught the model this target.

    Raises:
        SampleRangeError: the replay has no such target.
    """
    rows = scores.collect(scores.only(inputs.contributions, target))
    if rows.is_empty():
        raise SampleRangeError(
            f"{inputs.folder} has no target {target}; it was replayed for targets={inputs.settings.targets}. "
            "Replay with --targets each, or with a file of test ids."
        )
    facts = next(iter(_target_rows(inputs, [target])))
    best = named(scores.collect(scores.top(rows.lazy(), k)), inputs.samples)
    sums = scores.collect(scores.by_label(rows.lazy(), inputs.samples)).rows()
    found = top(_target_title(inputs, facts), target, best)
    return Why(target, facts["label"], facts["prediction"], facts["name"], found, tuple(sums))


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
        outliers=tuple(Outlier(**row) for row in _people(far.head(k), inputs.samples)),
    )


def _spread(frame: pl.LazyFrame) -> Spread:
    row: dict[str, Any] = scores.collect(scores.statistics(frame)).row(0, named=True)
    return Spread(**row | {"std": math.nan if row["std"] is None else row["std"]})


def _pair_spread(inputs: Inputs, targets: list[int], samples: int) -> Spread:
    """Over all pairs: in one pass, or block by block where epochs have to be summed first."""
    if not inputs.by_epoch:
        return _spread(inputs.contributions)
    return merged([_spread(block) for block in _blocks(inputs, targets, samples)])


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


def matrix(inputs: Inputs) -> Matrix:
    """Inter-class contributions.

    Raises:
        ReplayError: the replay has the mean target only, or labels are not known.
    """
    if inputs.settings.targets == "mean":
        raise ReplayError(_needs("the inter-class matrix", "a target of every class", "--targets class"))
    cells = scores.matrix(inputs.contributions, inputs.samples, inputs.targets)
    table = scores.collect(scores.normalised(cells).rename({"contribution": "normalised"}))
    plain = scores.collect(cells)
    if plain.is_empty():
        raise ReplayError(_needs("the inter-class matrix", "labels of training and test samples", "--targets class"))
    train, test = (
        tuple(sorted(plain[side].unique().to_list(), key=order(inputs.settings))) for side in ("train", "test")
    )
    means = {(a, b): value for a, b, value in plain.iter_rows()}
    ratios = {(a, b): value for a, b, value in table.iter_rows()}
    return Matrix(train, test, _grid(train, test, means), _grid(train, test, ratios))


def _grid(rows: Sequence[str], columns: Sequence[str], cells: dict[Any, float]) -> tuple[tuple[float | None, ...], ...]:
    return tuple(tuple(cells.get((row, column)) for column in columns) for row in rows)


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
    yield f"harm to {_mean_of(settings)}", suspects.harm(totals.lazy())
    own = inputs.samples.select("sample", score="self_influence").drop_nulls()
    if settings.target_set == "train" and settings.targets in ("each", "chosen"):
        yield "self-influence", suspects.self_influence(inputs.contributions)
    elif not scores.collect(own.head(1)).is_empty():
        yield "self-influence", own.sort(["score", "sample"], descending=[True, False])


def _ranking(inputs: Inputs, title: str, ranked: pl.DataFrame, noisy: pl.DataFrame, k: int) -> Ranking:
    first = _people(ranked.head(k), inputs.samples, "noisy")
    known = ranked.join(noisy, on="sample", maintain_order="left")
    detection = suspects.detect(known["score"].to_numpy(), known["noisy"].to_numpy()) if known.height else None
    return Ranking(title, tuple(Suspect(rank=i, **row) for i, row in enumerate(first, 1)), detection)


def _clusters(inputs: Inputs, totals: pl.DataFrame, noisy: pl.DataFrame) -> Clusters:
    clusters, classes = suspects.signs(inputs.contributions, inputs.samples, totals)
    key = order(inputs.settings)
    ordered = tuple(sorted(classes, key=lambda found: key(found.label)))
    return Clusters(ordered, int(clusters["suspected"].sum()), suspects.jaccard(clusters, noisy))


def timeline(inputs: Inputs, samples: Sequence[int], tracked: int) -> Timeline:
    """Which epochs mattered, and the timeline of some samples.

    Raises:
        ReplayError: the replay is not by epoch.
        SampleRangeError: a sample is not in the replay.
    """
    if not inputs.by_epoch:
        raise ReplayError(_needs("the timeline", "contributions by epoch", "--by-epoch"))
    frame = inputs.contributions
    epochs = scores.collect(frame.select(pl.col("epoch").unique().sort()))["epoch"].to_list()
    size = max(1, scores.ROWS_AT_ONCE // max(1, tracked))
    parts = [
        scores.collect(scores.phases(scores.totals_by_epoch(frame, epochs[start : start + size])))
        for start in range(0, len(epochs), size)
    ]
    phases = pl.concat(parts).sort("epoch")
    tracks = tuple(_tracks(inputs, list(dict.fromkeys(samples)), epochs))
    return Timeline(tuple(epochs), tuple(phases["helpful"]), tuple(phases["harmful"]), tracks)


def _tracks(inputs: Inputs, samples: list[int], epochs: list[int]) -> Iterator[Track]:
    rows = scores.collect(scores.tracks(inputs.contributions, samples))
    missing = sorted(set(samples) - set(rows["sample"].to_list()))
    if missing:
        raise SampleRangeError(f"{inputs.folder} has no training sample {missing[0]}.")
    values = {(sample, epoch): value for sample, epoch, value in rows.iter_rows()}
    for row in _people(pl.DataFrame({"sample": samples}, schema={"sample": pl.Int64}), inputs.samples):
        yield Track(**row, values=tuple(values.get((row["sample"], epoch), 0.0) for epoch in epochs))


def comparison(inputs: Inputs, totals: pl.DataFrame, other: Inputs) -> Comparison:
    """Agreement with another replay.

    Raises:
        ReplayError: they have no sample in common.
    """
    with reading(other.folder / CONTRIBUTIONS):
        others = sound_totals(other)
        both = scores.collect(joined(totals.lazy(), others.lazy()))
        if both.is_empty():
            raise ReplayError(f"{inputs.folder} and {other.folder} have no sample in common: nothing to compare.")
        agreement = agree(both["a"].to_numpy(), both["b"].to_numpy())
        points = both if both.height <= POINTS else both.sample(POINTS, seed=0).sort("sample")
        targets = _agreement_by_target(inputs, other, totals.height)
    return Comparison(_what(inputs), _what(other), agreement, targets, tuple(points.iter_rows()))


def _agreement_by_target(inputs: Inputs, other: Inputs, samples: int) -> tuple[int, float, float] | None:
    shared = sorted(set(scores.target_ids(inputs.contributions)) & set(scores.target_ids(other.contributions)))
    if len(shared) < 2:
        return None
    chosen = [shared[i] for i in sorted(set(np.linspace(0, len(shared) - 1, COMPARED_TARGETS).astype(int)))]
    found = []
    for block in _blocks(inputs, chosen, samples):
        wanted = scores.collect(block)
        ids = wanted["target"].unique().to_list()
        theirs = scores.pairs(other.contributions.filter(pl.col("target").is_in(ids)))
        both = wanted.join(scores.collect(theirs), on=["sample", "target"], suffix="_b")
        parts = both.select("target", "contribution", "contribution_b").partition_by("target")
        found += [agree(part["contribution"].to_numpy(), part["contribution_b"].to_numpy(), 1) for part in parts]
    return len(found), _average(x.spearman for x in found), _average(x.sign_error for x in found)


def _average(values: Iterable[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def _what(inputs: Inputs) -> str:
    form = {True: "exact", False: "Hessian-free", None: "replay"}[inputs.settings.exact]
    return f"{form} ({inputs.folder.name})"


def pictures(inputs: Inputs, train: set[int], test: set[int]) -> tuple[Picture, ...]:
    """The thumbnails of some samples, as far as the folder has them."""
    if inputs.thumbnails is None:
        return ()
    wanted = (pl.col("set") == "train") & pl.col("sample").is_in(sorted(train))
    wanted |= (pl.col("set") == "test") & pl.col("sample").is_in(sorted(test))
    return tuple(Picture(**row) for row in scores.collect(inputs.thumbnails.filter(wanted)).iter_rows(named=True))


def named(rows: pl.DataFrame, people: pl.LazyFrame) -> pl.DataFrame:
    """Rows joined with label, name and noisy, in their order."""
    ids = rows["sample"].unique().to_list()
    known = scores.collect(people.filter(pl.col("sample").is_in(ids)).select("sample", "label", "name", "noisy"))
    return rows.join(known.unique("sample"), on="sample", how="left", maintain_order="left")


def top(title: str, target: int, rows: pl.DataFrame) -> Top:
    """A finding from the rows of `scores.top`, joined with names."""
    names = ("rank", "side", "sample", "label", "name", "noisy", "contribution", "share")
    entries = [Entry(target=target, **{name: row[name] for name in names}) for row in rows.iter_rows(named=True)]
    sides = (tuple(e for e in entries if e.side == side) for side in (scores.HELPFUL, scores.HARMFUL))
    return Top(title, target, *sides)


def order(settings: Settings) -> Callable[[str], tuple[int, float, str]]:
    """Sort key of labels: the classes in their own order, then numbers, then words."""
    places = {name: place for place, name in enumerate(settings.classes)}

    def key(label: str) -> tuple[int, float, str]:
        if label in places:
            return 0, places[label], label
        try:
            return 1, float(label), label
        except ValueError:
            return 2, 0.0, label

    return key


def _people(rows: pl.DataFrame, people: pl.LazyFrame, *more: str) -> list[dict[str, Any]]:
    keep = [*rows.columns, "label", "name", *more]
    return named(rows, people).select(keep).to_dicts()


def _parts(rows: pl.DataFrame, column: str) -> Iterator[tuple[Any, pl.DataFrame]]:
    for (value,), part in rows.group_by(column, maintain_order=True):
        yield value, part


def _target_rows(inputs: Inputs, targets: list[int]) -> list[dict[str, Any]]:
    known = scores.collect(inputs.targets.filter(pl.col("target").is_in(targets))).unique("target")
    ids = pl.DataFrame({"target": targets}, schema={"target": pl.Int64})
    return ids.join(known, on="target", how="left", maintain_order="left").to_dicts()


def _target_title(inputs: Inputs, row: dict[str, Any]) -> str:
    if row["target"] == scores.MEAN:
        return _mean_of(inputs.settings)
    if inputs.settings.targets == "class":
        return f"class {row['label'] or row['target']}"
    words = {"label": row["label"], "read as": row["prediction"]}
    known = ", ".join(f"{word} {value}" for word, value in words.items() if value is not None)
    return f"{inputs.settings.target_set} sample {row['target']}{f' ({known})' if known else ''}"


def _needs(what: str, need: str, option: str) -> str:
    return f"This replay cannot answer {what}: it needs {need}. Replay the run again with {option}."
