"""Steps of a recording that keeps the weights of every step."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from trajrec.records import Row
from trajrec.replay.machine.prefetch import OwnStream, ahead
from trajrec.replay.step import RecordedRun, Step, make_step, vector_of
from trajrec.rules import FlatLayout


class StoredTrajectory:
    """The steps of a run whose recording holds the weights of every step.

    Args:
        run: an open recording.
        layout: the order of the trainable weights.
        dtype: floating type of the replay.
        device: where the tensors go.
    """

    def __init__(self, run: RecordedRun, layout: FlatLayout, dtype: torch.dtype, device: torch.device) -> None:
        self.run = run
        self.layout = layout
        self.dtype = dtype
        self.device = device

    def weights(self, t: int) -> Tensor:
        """w_t [P']."""
        return self._vector(self.run.row(t), t)

    def forwards(self, first: int = 1) -> Iterator[Step]:
        """Steps first, first + 1, ..., T."""
        before: Tensor | None = None
        for t, after in self._walk(first - 1, self.run.steps):
            if before is not None:
                yield self._step(t, before, after)
            before = after

    def backwards(self, first: int | None = None) -> Iterator[Step]:
        """Steps first, first - 1, ..., 1; from T by default."""
        after: Tensor | None = None
        for t, before in self._walk(self.run.steps if first is None else first, 0):
            if after is not None:
                yield self._step(t + 1, before, after)
            after = before

    def _walk(self, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """Every w_t [P'] on the way, with its t."""
        rows = self.run.walk(first, last)
        if self.device.type != "cuda":
            return ((t, self._vector(row, t)) for t, row in rows)
        return ahead(((t, vector_of(row, t, self.layout)) for t, row in rows), OwnStream(self.device, self.dtype))

    def _vector(self, row: Row, t: int) -> Tensor:
        return vector_of(row, t, self.layout).to(self.device, self.dtype)

    def _step(self, t: int, before: Tensor, after: Tensor) -> Step:
        return make_step(self.run, t, before, after)
