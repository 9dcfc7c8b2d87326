"""Keyframes that training leaves to the writer: none is wrong, and those that cannot be left are written at once."""

import os
import random
from dataclasses import replace

import h5py
import numpy as np
import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_keyframe, spec
from trajrec.runfile.folder import Folder
from trajrec.runfile.format import arrays
from trajrec.runfile.format.arrays import pieces_of, read_keyframe, write_arrays
from trajrec.runfile.format.geometry import PAGE
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer import staging
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.runfile.trainer.staging import Staging, save
from trajrec.runfile.writer.loop import Writer

MADE = MadeUpRun(spec(300, rng=100))


@pytest.fixture
def folder(tmp_path):
    found = Folder.of(tmp_path / "run.h5")
    found.path.mkdir()
    return found


def put(place, step):
    return place.put(MADE.keyframe(step))


def kept(folder):
    for step, path in folder.keyframes().items():
        assert_same_keyframe(read_keyframe(path), MADE.keyframe(step))
    return [*folder.keyframes()]


def test_some_are_taken_and_saved_and_then_some_more(folder):
    place = Staging(folder.staged, 20_000)
    for first in (10, 50, 90):
        assert [put(place, first + 10 * k) for k in range(5)] == [True, True, True, True, False]
        save(folder)
    assert kept(folder) == [*range(10, 130, 10)]
    save(folder)
    assert kept(folder) == [*range(10, 130, 10)]


def test_places_are_used_in_turn(folder):
    place = Staging(folder.staged, 20_000)
    assert put(place, 1)
    save(folder)
    assert all(put(place, step) for step in (2, 3, 4, 5))
    assert not put(place, 6)
    save(folder)
    assert kept(folder) == [1, 2, 3, 4, 5]


def test_one_that_is_too_large_is_not_taken(folder):
    place = Staging(folder.staged, PAGE)
    assert not put(place, 1)
    save(folder)
    assert kept(folder) == []


def test_one_that_is_not_whole_is_not_saved(folder):
    put(Staging(folder.staged, 20_000), 7)
    data = folder.staged.read_bytes()
    chance = random.Random(random.randrange(2**32))
    size = sum(map(len, pieces_of(MADE.keyframe(7))))
    for place in [*range(8), *(PAGE + chance.randrange(size) for _ in range(200))]:
        damaged = bytearray(data)
        damaged[place] ^= 1 << chance.randrange(8)
        folder.staged.write_bytes(damaged)
        save(folder)
        assert kept(folder) == []
    for end in [0, 5, 16, PAGE, *(chance.randrange(len(data)) for _ in range(50))]:
        folder.staged.write_bytes(data[:end])
        save(folder)
        assert set(kept(folder)) <= {7}  # the end of the file may be free


def test_a_step_that_is_not_the_one_inside_is_not_saved(folder):
    place = Staging(folder.staged, 20_000)
    put(place, 7)
    place._heads[0] = 9
    save(folder)
    assert kept(folder) == []


def test_what_is_summed_is_the_copy(folder, monkeypatch):
    original = arrays.copy_crc32

    def changing(place, source, crc):
        if changes := source.dtype.kind == "f" and source.size == 300:
            source[5] += 1
        summed = original(place, source, crc)
        if changes:
            source[5] -= 1
        return summed

    place = Staging(folder.staged, 20_000)
    keyframe = MADE.keyframe(7)
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "copy_crc32", changing)
        assert place.put(keyframe)
    save(folder)
    found = read_keyframe(folder.keyframe(7)).arrays["optimizer/momentum_buffer"]
    assert np.flatnonzero(found != keyframe.arrays["optimizer/momentum_buffer"]).tolist() == [5]


@pytest.mark.parametrize("links", [True, False])
def test_a_newer_one_of_the_same_step_stays(folder, monkeypatch, links):
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    place = Staging(folder.staged, 20_000)
    assert place.put(replace(MADE.keyframe(9), step=7))
    assert put(place, 8)
    write_arrays(folder.keyframe(7), MADE.keyframe(7))
    save(folder)
    assert kept(folder) == [7, 8]
    assert {path.name for path in folder.path.iterdir()} == {"staged.bin", *(f"keyframe-{t:010d}.bin" for t in (7, 8))}


def no_links(*_):
    raise PermissionError(1, "Operation not permitted")


def test_a_keyframe_that_comes_unasked_counts_and_not_the_one_of_the_same_step_before(tmp_path):
    sink = RunFileSink(tmp_path / "run.h5", keep=10)
    sink.open(MADE.spec)
    newer = replace(MADE.keyframe(7, with_weights=True), step=20)
    MADE.feed(sink, 20)
    sink.keyframe(newer)
    MADE.feed(sink, 30, first=21)
    sink.close(complete=True)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_keyframe(run.keyframe(20), newer)
        assert_same_keyframe(run.keyframe(30), MADE.keyframe(30, with_weights=True))


@pytest.mark.parametrize("number", [28, 5])
def test_a_full_disk_does_not_keep_steps_from_being_sealed(tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, "of the disk")

    sink = recorded(tmp_path, 100)
    kill_writer(sink)
    writer = Writer(sink.folder)
    monkeypatch.setattr("trajrec.runfile.writer.loop.save", fail)
    if number == 28:
        writer._save_staged()
    else:
        with pytest.raises(OSError, match="of the disk"):
            writer._save_staged()
    with pytest.raises(OSError, match="of the disk"):
        writer.seal_everything()
    assert writer.next == 101
    let_go(sink)


def kill_writer(sink):
    sink._writer._process.kill()
    sink._writer._process.wait()


def let_go(sink):
    """What the end of the training process does."""
    sink._writer.close()
    sink._lock.release()


def recorded(tmp_path, steps=400, **options):
    sink = RunFileSink(tmp_path / "run.h5", keep=10, **options)
    sink.open(MADE.spec)
    MADE.feed(sink, steps)
    return sink


def assert_all_there(path):
    with trajrec.open(path) as run:
        assert run.keyframe_steps == (*range(0, 401, 10),)
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), MADE.keyframe(t, with_weights=True))


def test_staged_or_not_all_keyframes_are_in_the_run(tmp_path, monkeypatch):
    taken = []
    original = Staging.put
    monkeypatch.setattr(Staging, "put", lambda *given: taken.append(original(*given)) or taken[-1])
    recorded(tmp_path).close(complete=True)
    assert len(taken) == 40
    assert True in taken
    assert False in taken
    assert_all_there(tmp_path / "run.h5")


def test_a_writer_that_is_killed_loses_none(tmp_path):
    sink = RunFileSink(tmp_path / "run.h5", keep=10)
    sink.open(MADE.spec)
    for first in range(0, 401, 100):
        MADE.feed(sink, min(first + 99, 400), first=first)
        kill_writer(sink)
        sink._writer.status()  # which starts another
    sink.close(complete=True)
    assert_all_there(tmp_path / "run.h5")


def test_packing_saves_what_was_staged_when_both_were_killed(tmp_path):
    sink = recorded(tmp_path, 390)
    kill_writer(sink)
    save(sink.folder)
    assert sink._staging.put(MADE.keyframe(400, with_weights=True))
    MADE.feed(sink, 395, first=391)
    for t in range(396, 401):
        sink.reserve()
        sink.commit(MADE.record(t))
    let_go(sink)
    assert 400 not in sink.folder.keyframes()
    pack(tmp_path / "run.h5")
    assert_all_there(tmp_path / "run.h5")


@pytest.mark.parametrize("case", ["budget", "large", "full"])
def test_where_none_is_staged_they_are_files_at_once(tmp_path, monkeypatch, case):
    def no_room(*_):
        raise OSError(28, "No space left on device")

    if case == "large":
        monkeypatch.setattr("trajrec.runfile.trainer.sink.LARGEST", 100)
    if case == "full":
        monkeypatch.setattr(staging, "allocate", no_room)
    sink = recorded(tmp_path, **({"budget": "1GB"} if case == "budget" else {}))
    assert sink._staging is None
    assert [*sink.folder.keyframes()] == [*range(0, 401, 10)]
    sink.close(complete=True)
    assert_all_there(tmp_path / "run.h5")


def test_a_resumed_recording_does_not_meet_what_came_after(tmp_path):
    sink = recorded(tmp_path, 200)
    kill_writer(sink)
    save(sink.folder)
    assert sink._staging.put(replace(MADE.keyframe(7), step=190))  # of another life
    let_go(sink)
    again = RunFileSink(tmp_path / "run.h5", keep=10, resume=True)
    again.open(MADE.spec)
    again.reserve()
    again.commit(MADE.record(100))
    assert again.resumed_at == 100
    MADE.feed(again, 400, first=101)
    again.close(complete=True)
    assert_all_there(tmp_path / "run.h5")


def test_a_place_keeps_its_size_on_the_disk(folder):
    Staging(folder.staged, 5000)
    assert folder.staged.stat().st_size == 9 * PAGE
    assert np.frombuffer(folder.staged.read_bytes(), np.uint8).sum() == 0


def test_an_array_that_stays_the_same_is_stored_once(tmp_path):
    recorded(tmp_path, 100).close(complete=True)
    with h5py.File(tmp_path / "run.h5") as file:
        first, second = (file[f"keyframes/{t:010d}"] for t in (10, 20))
        assert first["optimizer/momentum_buffer.present"] == second["optimizer/momentum_buffer.present"]
        assert first["rng/cpu"] != second["rng/cpu"]
        assert first["optimizer/momentum_buffer"] != second["optimizer/momentum_buffer"]
