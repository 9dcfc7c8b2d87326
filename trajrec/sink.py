"""Where a recorder's records go: the Sink protocol, and a sink that keeps them in memory for tests.

A sink hands out the row that the next step's weights are to be copied into, so that the copy happens once:

    sink.open(spec)
    row = sink.reserve()              # [P], to be filled; None: this sink keeps no row a step, only the checksum
    sink.commit(record)               # record.step = 0 first (weights before training)
    t = sink.resumed_at + 1           # 1, or later where an earlier recording of this run goes on
    ...
    sink.inputs(inputs)               # where spec.inputs is "store": those of step t, before its row is reserved
    if sink.wants_keyframe(t):        # after the commit of step t
        sink.keyframe(keyframe)       # with "weights" where reserve() gives None
    summary = sink.close(complete=True)

Where recording ends before the training does:

    sink.stop(why)                    from now on nothing is kept; what was recorded is
    sink.note_gap(t)                  or commit(record): step t went unrecorded
    sink.abandon()                    in a process that was forked: it has no part in the recording
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from trajrec.records import Inputs, Keyframe, LiveKeyframe, ParamSpec, Row, RunSpec, StepRecord


@dataclass(frozen=True, slots=True)
class Summary:
    """What a sink has written.

    Attributes:
        path: where it is; None if nothing was recorded, or not in a file.
        steps: how many.
        size: in bytes.
        gaps: first and last step of stretches that were not recorded.
        stopped: why recording ended before the training; None if it did not.
    """

    path: Path | None
    steps: int
    size: int
    gaps: tuple[tuple[int, int], ...] = ()
    stopped: str | None = None


class Sink(Protocol):
    """Takes the records of one run."""

    @property
    def resumed_at(self) -> int:
        """The step that the weights of record 0 were found at: 0, or t where a recording is resumed."""

    @property
    def resumed_epochs(self) -> int:
        """Epochs that had begun by then; 0 at step 0."""

    def open(self, spec: RunSpec) -> None:
        """Starts the run."""

    def reserve(self) -> Row | None:
        """The row [P] to fill before the next commit, or None if rows of single steps are not kept."""

    def commit(self, record: StepRecord) -> None:
        """Publishes the reserved row together with its record."""

    def widen(self, params: Sequence[ParamSpec]) -> None:
        """Takes in further parameters, which the rows of the coming steps have behind the others."""

    def wants_keyframe(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""

    def inputs(self, inputs: Inputs) -> None:
        """Takes the inputs of the step that is committed next, before its row is reserved."""

    def keyframe(self, keyframe: LiveKeyframe) -> None:
        """Takes the state after a committed step (also of steps it did not ask for).

        Arrays may be in `Parts`, and are good until it returns: training goes on in their memory.
        """

    def stop(self, reason: str) -> None:
        """Ends recording, and not the run: what comes now is noted as a gap. Never raises, whatever state it is in."""

    def note_gap(self, step: int) -> None:
        """Notes that a step goes unrecorded; recording has stopped then, if it had not. Never raises."""

    def abandon(self) -> None:
        """Gives up the copy of this sink in a process that was forked, for which every call does nothing from now on.

        The recording goes on in the process that it was forked from.
        """

    def close(self, complete: bool) -> Summary:
        """Ends the run; `complete` is False when training was cut off."""


class MemorySink:
    """Keeps everything in lists, with a keyframe every `interval` steps."""

    resumed_at = resumed_epochs = 0

    def __init__(self, interval: int = 64) -> None:
        self.interval = interval
        self.spec: RunSpec | None = None
        self.rows: list[Row] = []
        self.records: list[StepRecord] = []
        self.keyframes: list[Keyframe] = []
        self.stored: dict[int, Inputs] = {}
        self.complete: bool | None = None
        self.stopped: str | None = None
        self.gap: tuple[int, int] | None = None
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
        if self.stopped is not None:
            self.note_gap(record.step)
            return
        assert self._row is not None
        self.rows.append(self._row)
        self.records.append(record)

    def widen(self, params: Sequence[ParamSpec]) -> None:
        """Takes in further parameters."""
        if self.spec is not None and self.stopped is None:
            self.spec = self.spec.widened(len(self.records), params)

    def wants_keyframe(self, step: int) -> bool:
        """Whether the state after this step is to be kept."""
        return step % self.interval == 0 and self.stopped is None

    def inputs(self, inputs: Inputs) -> None:
        """Takes the inputs of the step that is committed next."""
        if self.stopped is None:
            self.stored[inputs.step] = inputs

    def keyframe(self, keyframe: LiveKeyframe) -> None:
        """Takes the state after a committed step."""
        if keyframe.step < len(self.records):
            self.keyframes.append(keyframe.copied())

    def stop(self, reason: str) -> None:
        """Ends recording; what comes now is a gap."""
        self.stopped = self.stopped or reason

    def note_gap(self, step: int) -> None:
        """Notes that a step goes unrecorded."""
        self.stop(f"Step {step} was not recorded.")
        if step >= max(1, len(self.records)):
            self.gap = (step, step) if self.gap is None else (self.gap[0], max(step, self.gap[1]))

    def abandon(self) -> None:
        """The memory of a process that was forked is its own."""

    def close(self, complete: bool) -> Summary:
        """Ends the run."""
        self.complete = complete
        steps, size = max(0, len(self.records) - 1), sum(row.nbytes for row in self.rows)
        return Summary(None, steps, size, () if self.gap is None else (self.gap,), self.stopped)
