"""A sink that keeps everything, like MemorySink, but in a ring, where the lane (trajrec.straight) can publish."""

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from trajrec.runfile.geometry import Geometry
from trajrec.runfile.ring import create
from trajrec.sink import MemorySink


class LaneSink(MemorySink):
    """Attributes: `straight_steps`, how many steps went through the lane."""

    def open(self, spec):
        super().open(spec)
        size = np.dtype(spec.dtype).itemsize
        geometry = Geometry(spec.row_length, size, 4, spec.row_length, 4, 2048, 16 << 20)
        with tempfile.TemporaryDirectory() as folder:  # mapped, it outlives its name
            self._ring = create(Path(folder) / "ring.bin", geometry, 0, spec.dtype)
        self._next = self._committed = 0

    def reserve(self):
        return self._ring.open_slot(self._next)

    def commit(self, record):
        assert record.step == self._next
        assert self._ring.publish(record)
        self._next += 1
        self._committed += 1

    def straight(self, step):
        assert step == self._next
        return self._ring.straight(step + -step % self.interval + 1)

    def went_straight(self, step, arena_head):
        self._ring.went_straight(arena_head)
        self._next = step + 1

    @property
    def straight_steps(self):
        return self._next - self._committed

    @property
    def records(self):
        found = [self._ring.intact(entry) for entry in range(getattr(self, "_next", 0))]
        return [replace(record, ids=record.ids.copy()) for record in found]

    @records.setter
    def records(self, _):
        pass

    @property
    def rows(self):
        return [self._ring.rows(entry, entry + 1)[0].copy() for entry in range(getattr(self, "_next", 0))]

    @rows.setter
    def rows(self, _):
        pass
