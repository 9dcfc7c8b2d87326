"""A recording in memory, as replay sees one: the mathematics is tested without any file."""

import numpy as np

from trajrec.inputs import batches_of
from trajrec.records import Conditions
from trajrec.sink import MemorySink
from trajrec.stretches import NOTHING, completed, completed_keyframe, constants


class MemoryRun:
    """Reads a MemorySink like `trajrec.open` reads a file."""

    keep = "steps"

    def __init__(self, sink: MemorySink) -> None:
        self.sink = sink
        self.spec = sink.spec
        self.steps = len(sink.records) - 1
        self.epochs = np.array([r.epoch for r in sink.records[1:]], dtype=np.int64)
        self._keyframes = {k.step: k for k in sink.keyframes}
        self.keyframe_steps = tuple(sorted(self._keyframes))
        self._constant = constants(self.spec, self._keyframes[0]) if self.spec.stretches else NOTHING

    def keyframe(self, t):
        return completed_keyframe(self.spec, self._keyframes[t], self._constant)

    def row(self, t):
        return completed(self.spec, t, self.sink.rows[t][None], self._constant)[0]

    def stored(self, t):
        return True

    def crc32(self, t):
        return self.sink.records[t].crc32

    def walk(self, first, last):
        for t in range(first, last + 1) if first <= last else range(first, last - 1, -1):
            yield t, self.row(t)

    def sample_ids(self, t):
        return self.sink.records[t].ids

    @property
    def changes(self):
        return {r.step: Conditions.from_json(r.changes) for r in self.sink.records if r.changes}

    def parts(self, t):
        record = self.sink.records[t]
        return record.parts if record.parts.size else np.array([len(record.ids)])

    def digests(self, t):
        return self.sink.records[t].digests

    def recorded_weights(self, t):
        return self.sink.records[t].weights

    def hyper(self, t):
        return self.sink.records[t].hyper

    def loss(self, t):
        return self.sink.records[t].loss

    def rng(self, t):
        return self.sink.records[t].rng

    def inputs(self, t):
        return batches_of(self.sink.stored[t].arrays) if self.spec.inputs == "store" else None
