"""When samples helped and harmed, by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from trajrec.errors import ReplayError, SampleRangeError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores, words
from trajrec.replay.report.blocks import Bar, Chapter, Chart, Kind, Note, Part, Table
from trajrec.replay.report.section import Material, Section
from trajrec.replay.report.sections.common import named, needs

TRACKED = 3


@dataclass(frozen=True, slots=True)
class Track:
    """One sample through training: its contribution [epochs] in every epoch."""

    sample: int
    label: str | None
    name: str | None
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Which phase of training mattered.

    Attributes:
        epochs: [E] their numbers.
        helpful: [E] sum of the positive contributions of samples in that epoch, to the mean target.
        harmful: [E] sum of the negative ones.
        tracks: single samples.
    """

    epochs: tuple[int, ...]
    helpful: tuple[float, ...]
    harmful: tuple[float, ...]
    tracks: tuple[Track, ...]


def find(material: Material) -> Timeline:
    """Which epochs mattered, and the timeline of the samples that were asked for, or of the top ones.

    Raises:
        ReplayError: the replay is not by epoch.
        SampleRangeError: a sample is not in the replay.
    """
    inputs, frame = material.inputs, material.inputs.contributions
    if not inputs.by_epoch:
        raise ReplayError(needs("the timeline", "contributions by epoch", "--by-epoch"))
    epochs = scores.collect(frame.select(pl.col("epoch").unique().sort()))["epoch"].to_list()
    size = max(1, scores.ROWS_AT_ONCE // max(1, material.totals.height))
    parts = [
        scores.collect(scores.phases(scores.totals_by_epoch(frame, epochs[start : start + size])))
        for start in range(0, len(epochs), size)
    ]
    phases = pl.concat(parts).sort("epoch")
    samples = material.ask.samples or _best(material)
    tracks = tuple(_tracks(inputs, list(dict.fromkeys(samples)), epochs))
    return Timeline(tuple(epochs), tuple(phases["helpful"]), tuple(phases["harmful"]), tracks)


def _best(material: Material) -> list[int]:
    few = min(material.k, TRACKED)
    return scores.collect(scores.top(material.totals.lazy(), few))["sample"].to_list()


def _tracks(inputs: Inputs, samples: list[int], epochs: list[int]) -> Iterator[Track]:
    rows = scores.collect(scores.tracks(inputs.contributions, samples))
    missing = sorted(set(samples) - set(rows["sample"].to_list()))
    if missing:
        raise SampleRangeError(f"{inputs.folder} has no training sample {missing[0]}.")
    ids = pl.DataFrame({"sample": samples}, schema={"sample": pl.Int64})
    values = {(sample, epoch): value for sample, epoch, value in rows.iter_rows()}
    for sample, label, name in named(ids, inputs.samples).select("sample", "label", "name").rows():
        yield Track(sample, label, name, tuple(values.get((sample, epoch), 0.0) for epoch in epochs))


def chapter(found: Timeline) -> Chapter:
    """All samples, and single ones beside them."""
    charts = (_phases(found), _lines(found)) if found.tracks else (_phases(found),)
    return Chapter("Timeline", "When it mattered", (Part(charts, beside=True),))


def _phases(found: Timeline) -> Chart:
    ways = (scores.HELPFUL, found.helpful), (scores.HARMFUL, found.harmful)
    bars = [
        Bar(i - 0.4, i + 0.4, value, way, f"epoch {found.epochs[i]}: {way} {words.number(value)}")
        for way, values in ways
        for i, value in enumerate(values)
    ]
    columns = {"epoch": Kind.RANK, "helpful": Kind.SIGNED, "harmful": Kind.SIGNED, "": Kind.BAR}
    rows = pl.DataFrame({"epoch": found.epochs, "helpful": found.helpful, "harmful": found.harmful})
    rows = rows.with_columns((pl.col("helpful") - pl.col("harmful")).alias(""))
    return Chart(
        "Sums of helpful and harmful contributions by epoch",
        "epoch",
        "sum of contributions",
        (-0.6, len(found.epochs) - 0.4),
        bars=tuple(bars),
        ticks=_ticks(found),
        title="All samples",
        instead=(Table(rows=rows, columns=columns, title="Which epochs mattered (sums over samples)"),),
    )


def _lines(found: Timeline) -> Chart:
    lines = []
    for track in found.tracks:
        name = f"sample {track.sample}" + (f" ({track.label})" if track.label is not None else "")
        lines.append((name, tuple(enumerate(track.values))))
    return Chart(
        "Contribution of single samples by epoch",
        "epoch",
        "contribution",
        (0, max(1, len(found.epochs) - 1)),
        lines=tuple(lines),
        ticks=_ticks(found),
        title="Single samples",
        instead=tuple(Note(_in_words(track, found.epochs)) for track in found.tracks),
    )


def _ticks(found: Timeline) -> tuple[tuple[float, str], ...]:
    return tuple((i, str(epoch)) for i, epoch in enumerate(found.epochs))


def _in_words(track: Track, epochs: Sequence[int]) -> str:
    label = f" (label {track.label})" if track.label is not None else ""
    strongest = max(range(len(track.values)), key=lambda e: abs(track.values[e]))
    total, most = words.number(sum(track.values)), words.number(track.values[strongest])
    return f"sample {track.sample}{label}: {total} in all, most in epoch {epochs[strongest]} ({most})"


SECTION = Section("timeline", lambda ask: ask.timeline or bool(ask.samples), find, chapter, "timeline")
