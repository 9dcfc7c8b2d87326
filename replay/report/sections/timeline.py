"""When samples helped and harmed, by epoch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import polars as pl

from trajrec.errors import ReplayError, SampleRangeError
from trajrec.replay.folder.read import Inputs
from trajrec.replay.report import scores
from trajrec.replay.report.sections.common import needs, rows_with_facts


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


def timeline(inputs: Inputs, samples: Sequence[int], tracked: int) -> Timeline:
    """Which epochs mattered, and the timeline of some samples.

    Raises:
        ReplayError: the replay is not by epoch.
        SampleRangeError: a sample is not in the replay.
    """
    if not inputs.by_epoch:
        raise ReplayError(needs("the timeline", "contributions by epoch", "--by-epoch"))
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
    for row in rows_with_facts(pl.DataFrame({"sample": samples}, schema={"sample": pl.Int64}), inputs.samples):
        yield Track(**row, values=tuple(values.get((row["sample"], epoch), 0.0) for epoch in epochs))
