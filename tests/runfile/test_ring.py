"""The ring and the encoded records: what was published whole comes out whole, anything else does not come out."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_run, spec
from trajrec.errors import DamagedRunError, RecordingError
from trajrec.records import StepRecord
from trajrec.runfile.format.codec import decode, encode
from trajrec.runfile.format.geometry import Geometry, Limits, chunk_shape, geometry_for
from trajrec.runfile.format.table import table_of
from trajrec.runfile.ring import Control, Ring, create, overflow_path, ring_bytes
from trajrec.runfile.trainer import process
from trajrec.runfile.trainer.sink import RunFileSink

MADE = MadeUpRun(spec(10, rng=8))
SMALL = Geometry(10, 4, 2, 10, 4, 8, 4096)

finite = st.floats(allow_nan=False, width=64)
records = st.builds(
    StepRecord,
    step=st.integers(1, 2**62),
    epoch=st.integers(0, 2**31),
    loss=finite,
    time=finite,
    crc32=st.integers(0, 2**32 - 1),
    hyper=hnp.arrays("f8", st.tuples(st.integers(0, 3), st.integers(0, 4)), elements=finite),
    ids=hnp.arrays("i8", st.integers(0, 9)),
    weights=st.none(),
    rng=st.binary(max_size=40),
)


@given(records, st.booleans())
def test_a_record_survives_encoding(record, weighted):
    weights = np.linspace(0, 1, len(record.ids)) if weighted else None
    record = dataclasses.replace(record, weights=weights)
    found = decode(encode(record))
    for field in dataclasses.fields(StepRecord):
        a, b = getattr(record, field.name), getattr(found, field.name)
        assert np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


@given(records, st.data())
def test_a_record_cut_short_is_refused(record, data):
    whole = encode(record)
    with pytest.raises(ValueError, match=r"a step's record"):
        decode(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.integers(1, 3 * 10**8), st.sampled_from([4, 8]))
def test_chunks_cover_a_row_without_waste(values, itemsize):
    rows, columns = chunk_shape(values, itemsize)
    pieces = -(-values // columns)
    assert rows in (1, 2, 4, 8, 16, 32)
    assert rows == 1 or rows * values * itemsize <= 64 * 2**20
    assert rows * columns * itemsize <= 512 * 1024
    assert pieces * columns - values < pieces


@given(st.integers(1, 10**8), st.sampled_from([4, 8]), st.booleans())
def test_the_ring_is_bounded_as_documented(values, itemsize, keep_rows):
    sizes = geometry_for(values, itemsize, keep_rows)
    rows = sizes.slots * sizes.row_bytes
    assert sizes.segment_rows % sizes.chunk_rows == 0
    assert sizes.slots % sizes.segment_rows == 0
    assert rows <= max(128 * 2**20, 4 * values * itemsize)
    assert ring_bytes(sizes) - rows <= 17 * 2**20


@pytest.fixture
def ring(tmp_path) -> Ring:
    return create(tmp_path / "ring.bin", SMALL, 0, "float32")


def publish(ring: Ring, t: int) -> bool:
    ring.open_slot(t)[:] = MADE.row(t)
    return ring.publish(MADE.record(t))


def test_what_is_published_can_be_read_from_another_mapping(ring):
    for t in range(8):
        assert ring.has_slot(t)
        assert publish(ring, t)
    assert not ring.has_slot(8)
    other = Ring(ring.path)
    assert other.head(0) == 8
    for t in range(8):
        assert encode(other.intact(t)) == encode(MADE.record(t))
        assert np.array_equal(other.rows(t, t + 1)[0], MADE.row(t))


def test_slots_and_arena_are_used_in_circles(ring):
    for t in range(200):
        assert publish(ring, t)
        assert encode(ring.intact(t)) == encode(MADE.record(t))
        ring.set(Control.TAIL, t + 1)
    assert np.array_equal(ring.rows(195, 200), [MADE.row(t) for t in range(195, 200)])


def test_an_entry_of_an_earlier_lap_is_not_taken_for_a_later_one(ring):
    for t in range(8):
        publish(ring, t)
    ring.set(Control.TAIL, 8)
    assert ring.intact(8) is None
    ring._slots[0] = 9  # as if the sequence number had reached the disk and the record had not
    assert ring.published(8)
    assert ring.intact(8) is None


@pytest.mark.parametrize("what", ["opened", "row", "record"])
def test_a_half_made_entry_is_none(ring, what):
    publish(ring, 0)
    if what == "opened":
        ring.open_slot(0)
    elif what == "row":
        ring._rows[0, 3] += 1
    else:
        ring._map[ring._arena + 5 : ring._arena + 6] = b"\xff"
    assert ring.intact(0) is None


def test_a_full_arena_refuses_until_there_is_room(ring):
    big = dataclasses.replace(MADE.record(1), rng=bytes(1500))
    ring.open_slot(0)
    ring.publish(dataclasses.replace(big, step=0))
    ring.open_slot(1)
    ring.publish(big)
    ring.open_slot(2)
    assert not ring.publish(dataclasses.replace(big, step=2))
    ring.set(Control.TAIL, 1)
    assert ring.publish(dataclasses.replace(big, step=2))


def test_a_record_too_large_for_the_arena_has_a_file(ring):
    big = dataclasses.replace(MADE.record(0), rng=bytes(5000))
    ring.open_slot(0)[:] = MADE.row(0)
    assert ring.publish(big)
    assert overflow_path(ring.path.parent, 0).exists()
    assert ring.intact(0).rng == bytes(5000)


def test_a_damaged_header_is_refused(ring):
    data = bytearray(ring.path.read_bytes())
    data[20] ^= 1
    ring.path.write_bytes(data)
    with pytest.raises(DamagedRunError, match="the ring's header is damaged"):
        Ring(ring.path)


def test_a_table_knows_its_records():
    table = table_of([MADE.record(t) for t in range(20)])
    assert [encode(table.record(t)) for t in range(20)] == [encode(MADE.record(t)) for t in range(20)]
    assert table.damaged() is None
    table["loss"][7] += 1
    assert table.damaged() == 7


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arena=st.sampled_from([2**13, 2**16]), segment=st.sampled_from([2**12, 2**15]), last=st.integers(70, 300))
def test_any_pressure_on_the_ring_loses_nothing(tmp_path_factory, arena, segment, last):
    path = tmp_path_factory.mktemp("pressure") / "run.h5"
    made = MadeUpRun(spec(50, rng=700))
    made.write(RunFileSink(path, limits=Limits(segment_bytes=segment, arena_bytes=arena)), last)
    with trajrec.open(path) as run:
        assert_same_run(run, made, last)


def test_a_writer_that_cannot_work_is_given_up_with_its_last_words(tmp_path, monkeypatch):
    sink = RunFileSink(tmp_path / "run.h5")
    sink.open(MADE.spec)
    MADE.feed(sink, 20)
    with monkeypatch.context() as patch:
        patch.setattr(process, "_command", lambda module, folder: ["sh", "-c", "echo no luck today >&2; exit 1"])
        sink.writer.kill()
        with pytest.raises(RecordingError, match=r"stopped 5 times .* `trajrec pack` finishes it.*no luck today"):
            sink.close(complete=True)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.steps == 20
