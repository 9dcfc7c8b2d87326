"""The contract of a Sink, run by every implementation: whatever goes in is there afterwards, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_inputs, assert_same_keyframe, assert_same_run, spec
from trajrec.runfile.format.geometry import Limits
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.sink import MemorySink

LAST = 150


def memory(_: Path) -> MemorySink:
    return MemorySink()


def packed(path: Path) -> RunFileSink:
    return RunFileSink(path)


def raw(path: Path) -> RunFileSink:
    return RunFileSink(path, compression="none", keyframe_every=16)


@pytest.fixture(params=[memory, packed, raw])
def sink(request: pytest.FixtureRequest, tmp_path: Path):
    return request.param(tmp_path / "run.h5")


@pytest.mark.parametrize("complete", [True, False])
def test_close_tells_what_was_recorded(sink, complete):
    summary = MadeUpRun(spec()).write(sink, LAST, complete)
    assert (summary.steps, summary.gaps) == (LAST, ())
    assert summary.size > 0


def test_reserved_row_has_the_length_and_dtype_of_the_spec(sink):
    sink.open(spec(77, "float64"))
    row = sink.reserve()
    assert (row.shape, row.dtype) == ((77,), np.float64)
    row[:] = MadeUpRun(spec(77, "float64")).row(0)
    sink.commit(MadeUpRun(spec(77, "float64")).record(0))
    assert sink.resumed_at == 0
    sink.close(complete=False)


def test_rows_of_earlier_steps_are_not_touched_by_later_ones(sink):
    made = MadeUpRun(spec())
    sink.open(made.spec)
    made.feed(sink, 3)
    row = sink.reserve()
    row[:] = -1.0  # half a step: never committed
    sink.close(complete=False)


def test_a_keyframe_may_come_unasked(sink):
    made = MadeUpRun(spec())
    sink.open(made.spec)
    made.feed(sink, 5)
    assert not sink.wants_keyframe(5)
    sink.keyframe(made.keyframe(5))
    sink.close(complete=True)


@pytest.mark.parametrize("compression", ["zstd", "none"])
@pytest.mark.parametrize(
    ("values", "dtype", "rng", "last"),
    [(1, "float32", 0, 0), (3, "float64", 0, 1), (1000, "float32", 5056, 40), (61706, "float32", 0, 300)],
)
def test_round_trip_bit_for_bit(tmp_path, simulation, compression, values, dtype, rng, last):
    made = MadeUpRun(spec(values, dtype, rng))
    made.write(RunFileSink(tmp_path / "run.h5", compression=compression), last)
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_run(run, made, last)
        assert run.state == "complete"
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), made.keyframe(t))


@pytest.mark.parametrize("keep", ["steps", 10])
@pytest.mark.parametrize("pixels", [5, 5000])
def test_inputs_come_back_bit_for_bit(tmp_path, simulation, keep, pixels):
    made = MadeUpRun(spec(inputs="store"), pixels=pixels)
    made.write(RunFileSink(tmp_path / "run.h5", keep=keep), 40)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_inputs(run, made, range(1, 41))


def test_large_inputs_are_taken_into_segments_before_these_are_full(tmp_path, simulation):
    made = MadeUpRun(spec(inputs="store"), pixels=5000)
    sink = RunFileSink(tmp_path / "run.h5", keep=25, limits=Limits(input_bytes=2**19))
    sink.open(made.spec)
    for t in range(60):
        made.feed(sink, t, first=t)
        assert sum(path.stat().st_size for path in sink.folder.raw_inputs().values()) < 1.5 * 2**19
    assert_same_inputs(trajrec.open(tmp_path / "run.h5"), made, range(1, 60))
    sink.close(complete=True)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_inputs(run, made, range(1, 60))


@pytest.mark.parametrize("keep", [1, 10])
def test_keyframes_only_keeps_every_checksum_and_no_rows(tmp_path, simulation, keep):
    made = MadeUpRun(spec(rng=64))
    made.write(RunFileSink(tmp_path / "run.h5", keep=keep), 95)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.keyframe_steps == tuple(range(0, 96, keep))
        assert [run.crc32(t) for t in range(96)] == [made.record(t).crc32 for t in range(96)]
        assert run.row(90).tobytes() == made.row(90).tobytes()
        assert_same_keyframe(run.keyframe(40), made.keyframe(40, with_weights=True))
        if keep == 10:
            assert not run.stored(91)
            with pytest.raises(trajrec.TrajrecError, match=r"step 91 are not stored.*0, 10, 20, 30, ... 90"):
                run.row(91)
