"""Raw keyframes: each is what it was when it was handed over, whatever becomes of training and writer."""

from __future__ import annotations

import random
from dataclasses import replace

import h5py
import numpy as np
import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_keyframe, cut_off, restart, spec
from trajrec.errors import DamagedRunError
from trajrec.records import LiveKeyframe, Parts
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.arrays import read_keyframe, write_arrays
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer.sink import RunFileSink

MADE = MadeUpRun(spec(300, rng=100))


@pytest.fixture(autouse=True)
def _simulated(simulation):
    pass


@pytest.fixture
def sink(tmp_path) -> RunFileSink:
    sink = RunFileSink(tmp_path / "run.h5", keep=10)
    sink.open(MADE.spec)
    return sink


def assert_all_there(path, last: int) -> None:
    with trajrec.open(path) as run:
        assert run.keyframe_steps == (*range(0, last + 1, 10),)
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), MADE.keyframe(t, with_weights=True))


def test_they_are_there_once_they_are_handed_over(sink):
    for t in range(51):
        MADE.feed(sink, t, first=t)
        assert [*sink.folder.keyframes()] == [*range(0, t + 1, 10)]
    assert_all_there(sink.output, 50)
    sink.close(complete=True)
    assert_all_there(sink.output, 50)


def test_what_training_does_with_the_memory_afterwards_changes_none(sink):
    made = MADE.keyframe(10, with_weights=True)
    arrays = {path: np.array(array) for path, array in made.arrays.items()}
    halves = np.split(arrays["weights"], [100])
    MADE.feed(sink, 9)
    sink.reserve()
    sink.commit(MADE.record(10))
    assert sink.wants_keyframe(10)
    sink.keyframe(LiveKeyframe(10, {**arrays, "weights": Parts(halves)}))
    for array in (*arrays.values(), *halves):
        array[...] = 77
    sink.close(complete=True)
    assert_all_there(sink.output, 10)


def test_one_that_comes_unasked_counts_and_not_the_one_of_the_same_step_before(sink):
    newer = replace(MADE.keyframe(7, with_weights=True), step=20)
    MADE.feed(sink, 20)
    sink.keyframe(newer)
    MADE.feed(sink, 30, first=21)
    sink.close(complete=True)
    with trajrec.open(sink.output) as run:
        assert_same_keyframe(run.keyframe(20), newer)
        assert_same_keyframe(run.keyframe(30), MADE.keyframe(30, with_weights=True))


def test_a_resumed_recording_does_not_meet_what_came_after(tmp_path):
    path = tmp_path / "run.h5"
    cut_off(path, 200, MADE, keep=10)
    write_arrays(Folder.of(path).keyframe(195), replace(MADE.keyframe(7), step=195))  # of another life
    restart(path, 100, 210, made=MADE, keep=10)
    assert_all_there(path, 210)


def test_a_byte_that_has_changed_or_is_missing_is_found(tmp_path):
    path, chance = tmp_path / "keyframe-0000000007.bin", random.Random(random.randrange(2**32))
    write_arrays(path, MADE.keyframe(7))
    data = path.read_bytes()
    for place in [*range(16), *(chance.randrange(len(data)) for _ in range(200))]:
        path.write_bytes(data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :])
        with pytest.raises(DamagedRunError):
            read_keyframe(path)
    for end in [0, 5, 16, *(chance.randrange(len(data)) for _ in range(50))]:
        path.write_bytes(data[:end])
        with pytest.raises(DamagedRunError):
            read_keyframe(path)


def test_an_array_that_stays_the_same_is_stored_once(sink):
    MADE.feed(sink, 20)
    sink.close(complete=True)
    with h5py.File(sink.output) as file:
        first, second = (file[f"keyframes/{t:010d}"] for t in (10, 20))
        assert first["optimizer/momentum_buffer.present"] == second["optimizer/momentum_buffer.present"]
        assert first["rng/cpu"] != second["rng/cpu"]
        assert first["optimizer/momentum_buffer"] != second["optimizer/momentum_buffer"]


@pytest.mark.parametrize("goes_on", [False, True])
def test_a_folder_in_which_an_older_version_left_some_on_their_way(tmp_path, goes_on):
    """They are lost, and recomputed from the one before; their file is not looked at, and goes with the folder."""
    path = tmp_path / "run.h5"
    cut_off(path, 25, MADE, keep=10)
    for name in ("staged.bin", "staged-0000000020.tmp"):
        (Folder.of(path).path / name).write_bytes(b"\1" * 9000)
    assert_all_there(path, 20)
    assert verify(path) == []
    restart(path, 25, 40, made=MADE, keep=10) if goes_on else pack(path)
    assert_all_there(path, 40 if goes_on else 20)
    assert [p.name for p in tmp_path.iterdir()] == ["run.h5"]
