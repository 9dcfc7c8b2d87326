"""Made-up runs for the tests of the run file: every value is a function of seed and step."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from trajrec.records import NO_IDS, BufferSpec, Conditions, Inputs, Keyframe, ParamSpec, RunSpec, StepRecord
from trajrec.runfile.format.geometry import Limits
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.sink import Sink, Summary

SMALL = Limits(segment_bytes=2**19, arena_bytes=2**20)


def spec(
    values: int = 1000, dtype: str = "float32", rng: int = 0, samples: int = 500, inputs: str = "digest"
) -> RunSpec:
    half = values // 2
    params = (
        ParamSpec("layer.weight", (half,), dtype, 0, 0, True),
        ParamSpec("layer.bias", (values - half,), dtype, half, 1, True),
    )
    return RunSpec(
        run_id="0f" * 16,
        created="2026-01-02T03:04:05+00:00",
        params=params,
        buffers=(BufferSpec("norm.mean", (3,), "float32"),),
        dtype=dtype,
        optimizer="SGD",
        optimizer_module="torch.optim.sgd",
        defaults={"lr": 0.1, "nesterov": False, "fused": None},
        hyperparameters=("lr", "momentum"),
        groups=2,
        samples=samples,
        inputs=inputs,
        rng=(("cpu", rng),) if rng else (),
        versions={"trajrec": "0.1.0"},
        command=("train.py", "--name", "r\u00fcn"),
    )


@lru_cache(4)
def _line(seed: int, values: int, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    start = np.random.default_rng(seed).random(values) - 0.5
    direction = (np.arange(values) * 7919 + seed) % 1009 / 1009  # exact arithmetic: alike on every machine
    return start.astype(dtype), direction.astype(dtype)


@dataclass(frozen=True)
class MadeUpRun:
    """Rows, records and keyframes of a run; what was made once is kept, for all that compare with it."""

    spec: RunSpec
    seed: int = 0
    batch: int = 7
    with_weights: bool = True
    with_parts: bool = False
    pixels: int = 20

    def _kept(self, make: Callable[..., Any], *which: object) -> Any:
        made = self.__dict__.setdefault("_made", {})
        key = make.__name__, *which
        if key not in made:
            made[key] = make(*which)
        return made[key]

    def row(self, t: int) -> np.ndarray:
        start, direction = _line(self.seed, self.spec.row_length, self.spec.dtype)
        return start + np.dtype(self.spec.dtype).type(1e-3 * t) * direction

    def record(self, t: int) -> StepRecord:
        return self._kept(self._record, t)

    def _record(self, t: int) -> StepRecord:
        crc = zlib.crc32(self.row(t).data)
        hyper = np.array([[0.1 / (t + 1), 0.9], [0.01, np.nan]])
        if self.with_parts and t >= 20:
            hyper = np.concatenate([hyper, [[0.5, np.nan]]])
        if t == 0:
            return StepRecord(0, 0, float("nan"), 1e9, crc, hyper, np.empty(0, np.int64))
        random = np.random.default_rng([self.seed, t])
        ids = random.integers(0, self.spec.samples, self.batch - (t % 5 == 0))
        weights = random.random(len(ids)) if self.with_weights and t % 3 == 0 else None
        size = sum(length for _, length in self.spec.rng)
        values = (t, t // 10, 1.0 / t, 1e9 + t, crc, hyper, ids, weights, random.bytes(size * (t % 2)))
        return StepRecord(*values, **self._rest(t, len(ids)) if self.with_parts else {})

    def _rest(self, t: int, count: int) -> dict:
        """Micro-batches at every other step, digests at most, a third group from step 20 on, changes now and then."""
        parts = np.array([2, count - 2]) if t % 2 else NO_IDS
        digests = np.arange(1 + t % 2) + 2**32 - 2 if t % 7 else NO_IDS
        changes = Conditions(("norm",), joined=(("late", 2),)).to_json() if t % 11 == 0 else b""
        return {"parts": parts, "digests": digests, "changes": changes}

    def keyframe(self, t: int, with_weights: bool = False) -> Keyframe:
        return self._kept(self._keyframe, t, with_weights)

    def _keyframe(self, t: int, with_weights: bool) -> Keyframe:
        random = np.random.default_rng([self.seed, t, 1])
        arrays = {
            "optimizer/momentum_buffer": random.random(self.spec.row_length).astype(self.spec.dtype),
            "optimizer/momentum_buffer.present": np.ones(len(self.spec.params), np.uint8),
            "optimizer/step.scalar": np.array([float(t), np.nan]),
            "optimizer/extra/0": random.random((2, 3, 4)),
            "buffers/norm.mean": random.random(3).astype(np.float32),
            "buffers/norm.count": np.array(t, np.int64),
            "rng/cpu": random.integers(0, 256, 5056).astype(np.uint8),
            "rng/empty": np.empty(0, np.float32),
        }
        return Keyframe(t, ({"weights": self.row(t)} if with_weights else {}) | arrays)

    def batches(self, t: int) -> list:
        """What the loader made for step t: one micro-batch, or two."""
        return self._kept(self._batches, t)

    def _batches(self, t: int) -> list:
        import torch

        random = torch.Generator().manual_seed(1000 * self.seed + t)
        sizes = (3, self.batch - 3) if t % 2 else (self.batch,)
        pairs = [[torch.randn(size, self.pixels, generator=random), torch.arange(size) + t] for size in sizes]
        return [(pair, {"scale": t / 7, "names": ["a"]}) for pair in pairs]

    def inputs(self, t: int) -> Inputs:
        from trajrec.inputs import arrays_of, contents_of  # and with it torch, which few of these need

        return Inputs(t, arrays_of([contents_of(batch) for batch in self.batches(t)]))

    def feed(self, sink: Sink, last: int, first: int = 0) -> None:
        """Commits steps first..last, with the keyframes that the sink asks for."""
        for t in range(first, last + 1):
            if self.spec.inputs == "store" and t:
                sink.inputs(self.inputs(t))
            row = sink.reserve()
            if row is not None:
                row[:] = self.row(t)
            sink.commit(self.record(t))
            if sink.wants_keyframe(t):
                sink.keyframe(self.keyframe(t, with_weights=row is None))

    def write(self, sink: Sink, last: int, complete: bool = True) -> Summary:
        sink.open(self.spec)
        self.feed(sink, last)
        return sink.close(complete)


def end_trainer(sink: RunFileSink, drains: bool = False) -> None:
    """What the death of the training process does; its writer is killed too, or seals what is in the ring."""
    if not drains:
        sink.writer.kill()
    sink.writer.close()
    sink.place.release()


def cut_off(path: Path, last: int, made: MadeUpRun, limits: Limits = SMALL, **options: object) -> None:
    """A recording whose trainer and writer were killed."""
    sink = RunFileSink(path, limits=limits, **options)
    sink.open(made.spec)
    made.feed(sink, last)
    end_trainer(sink)


def begin(path: Path, last: int, packed: bool, made: MadeUpRun, **options: object) -> None:
    """A recording of a training that did not come to its end, packed or not."""
    if packed:
        made.write(RunFileSink(path, limits=SMALL, **options), last, complete=False)
    else:
        cut_off(path, last, made, **options)


def go_on(path: Path, at: int, made: MadeUpRun, **options: object) -> RunFileSink:
    """What a recorder does when training begins with the weights of step `at`."""
    sink = RunFileSink(path, resume=True, limits=SMALL, **options)
    sink.open(made.spec)
    row = sink.reserve()
    if row is not None:
        row[:] = made.row(at)
    sink.commit(dataclasses.replace(made.record(0), crc32=made.record(at).crc32))
    return sink


def restart(path: Path, at: int, last: int, made: MadeUpRun, complete: bool = True, **options: object) -> None:
    """Training goes on with the weights of step `at`, to step `last`."""
    sink = go_on(path, at, made, **options)
    assert sink.resumed_at == at
    made.feed(sink, last, first=at + 1)
    sink.close(complete)


def assert_same_run(run: object, made: MadeUpRun, last: int) -> None:
    """Compares everything a Run tells with what was recorded, bit for bit."""
    assert run.steps == last
    assert run.spec == made.spec
    for t, row in run.walk(0, last):
        assert row.tobytes() == made.row(t).tobytes()
    for t in range(1, last + 1):
        assert_same_step(run, made.record(t))
    assert_same_inputs(run, made, range(1, last + 1))


def assert_same_inputs(run: object, made: MadeUpRun, steps: Iterable[int]) -> None:
    for t in steps:
        found = run.inputs(t)
        if made.spec.inputs == "digest":
            assert found is None
            return
        assert len(found) == len(made.batches(t))
        for a, b in zip(found, made.batches(t), strict=True):
            assert a[1] == b[1]
            assert all(x.equal(y) and x.dtype == y.dtype for x, y in zip(a[0], b[0], strict=True))


def assert_same_step(run: object, record: StepRecord) -> None:
    t, count = record.step, len(record.ids)
    assert np.array_equal(run.sample_ids(t), record.ids)
    expected = np.full(count, 1 / count) if record.weights is None else record.weights
    assert np.array_equal(run.sample_weights(t), expected)
    assert np.array_equal(run.hyper(t), record.hyper, equal_nan=True)
    found = (run.epoch(t), run.loss(t), run.time(t), run.crc32(t), run.rng(t))
    assert found == (record.epoch, record.loss, record.time, record.crc32, record.rng)
    assert np.array_equal(run.parts(t), record.parts if record.parts.size else [count])
    assert np.array_equal(run.digests(t), record.digests)
    assert bool(record.changes) == (t in run.changes)


def assert_same_keyframe(found: Keyframe, made: Keyframe) -> None:
    assert found.step == made.step
    assert found.arrays.keys() == made.arrays.keys()
    for name, value in made.arrays.items():
        assert found.arrays[name].dtype == value.dtype
        assert found.arrays[name].shape == value.shape
        assert found.arrays[name].tobytes() == value.tobytes()
