"""Where a recorder's records go: the Sink protocol, and a sink that keeps them in memory for tests.

A sink hands out the row that the next step's weights are to be copied into, so that the copy happens once:

    sink.open(spec)
    row = sink.reserve()       # [P], to be filled
    sink.commit(record)        # record.step = 0 first (weights before training), then 1, 2, ...
    sink.keyframe(keyframe)    # any time after the commit of that step
    summary = sink.close(complete=True)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trajrec.records import Keyframe, Row, RunSpec, StepRecord


@dataclass(frozen=True, slots=True)
class Summary:
    """What a sink has written: the path, steps, size in bytes, gaps (steps that were not recorded)."""

    path: Path | None
    steps: int
    size: int
    gaps: tuple[tuple[int, int], ...] = ()


class Sink(Protocol):
    """Takes the records of one run."""

    def open(self, spec: RunSpec) -> None:
        """Starts the run."""

    def reserve(self) -> Row:
        """The row [P] to fill before the next commit."""

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""

    def keyframe(self, keyframe: Keyframe) -> None:
        """Takes the state after a committed step."""

    def close(self, complete: bool) -> Summary:
        """Ends the run; `complete` is False when training was cut off."""


class MemorySink:
    """Keeps everything in lists."""

    def __init__(self) -> None:
        self.spec: RunSpec | None = None
        self.rows: list[Row] = []
        self.records: list[StepRecord] = []
        self.keyframes: list[Keyframe] = []
        self.complete: bool | None = None
        self._row: Row | None = None

    def open(self, spec: RunSpec) -> None:
        """Starts the run."""
        self.spec = spec

    def reserve(self) -> Row:
        """The row [P] to fill before the next commit."""
        assert self.spec is not None
        self._row = np.empty(self.spec.row_length, dtype=self.spec.dtype)
        return self._row

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""
        assert self._row is not None
        self.rows.append(self._row)
        self.records.append(record)

    def keyframe(self, keyframe: Keyframe) -> None:
        """Takes the state after a committed step."""
        self.keyframes.append(keyframe)

    def close(self, complete: bool) -> Summary:
        """Ends the run."""
        self.complete = complete
        return Summary(None, len(self.records) - 1, sum(row.nbytes for row in self.rows))
