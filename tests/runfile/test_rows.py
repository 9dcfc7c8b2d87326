"""Uncompressed rows: written once, into a file that packing makes an HDF5 file around them."""

from __future__ import annotations

import errno
import os
import random
import shutil
import time
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

import trajrec
from tests.golden import make as golden
from tests.made.runfile_cases import (
    SMALL,
    MadeUpRun,
    assert_same_keyframe,
    assert_same_run,
    cut_off,
    restart,
    spec,
)
from tests.made.runfile_simulation import Simulation
from tests.runfile import test_kill as kill
from trajrec.errors import DamagedRunError
from trajrec.runfile import durable as durable_module
from trajrec.runfile.folder import Folder
from trajrec.runfile.format import rowfile
from trajrec.runfile.format.rowfile import HEAD_BYTES
from trajrec.runfile.lock import Lock
from trajrec.runfile.manifest import Manifest
from trajrec.runfile.reader.segments import Pieces
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.ring import Control, Finish, Ring
from trajrec.runfile.trainer import sink as trainer
from trajrec.runfile.trainer.process import WriterProcess
from trajrec.runfile.writer import packing, rework, sealing
from trajrec.runfile.writer.loop import Writer

MADE = MadeUpRun(spec(3000, rng=16))
ROW_BYTES = 12_000
LAST = 230
RunFileSink = partial(trainer.RunFileSink, limits=SMALL)


@pytest.fixture(autouse=True)
def _simulated(request, monkeypatch):
    if "real_processes" not in request.fixturenames:
        Simulation(monkeypatch)


@pytest.fixture
def folder(tmp_path) -> Folder:
    """A folder whose recorder and writer were killed."""
    with pytest.MonkeyPatch.context() as patch:
        Simulation(patch)
        cut_off(tmp_path / "run.h5", LAST, MADE, compression="none", keyframe_every=50)
    return Folder(tmp_path / "run.h5.rec")


@pytest.fixture
def sealed(folder) -> Folder:
    """The same with everything sealed, and nothing packed yet."""
    Writer(folder).seal_everything()
    return folder


def pack_here(folder: Folder) -> None:
    """Packs as the writer would, in this process."""
    packing.pack(folder, folder.read_manifest(), "recovered", ())
    folder.remove()


def assert_packed(path: Path, made: MadeUpRun = MADE, last: int = LAST) -> None:
    assert verify(path) == []
    with trajrec.open(path) as run:
        assert_same_run(run, made, last)
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), made.keyframe(t))
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_rows_lie_where_the_format_says(sealed):
    data = sealed.rows.read_bytes()
    assert len(data) == HEAD_BYTES + (LAST + 1) * ROW_BYTES
    assert all(
        data[HEAD_BYTES + t * ROW_BYTES :][:ROW_BYTES] == MADE.row(t).astype("<f4").tobytes() for t in range(LAST + 1)
    )
    with h5py.File(sealed.segments()[1].path) as file:
        assert file["weights"].shape == (0, 3000)
    with trajrec.open(sealed.path) as run:
        assert run.size > len(data)


def test_packing_moves_no_row(sealed):
    inode = sealed.rows.stat().st_ino
    pack_here(sealed)
    assert sealed.output.stat().st_ino == inode
    assert_packed(sealed.output)
    with h5py.File(sealed.output) as file:
        weights = file["weights"]
        assert (weights.chunks, weights.id.get_offset()) == (None, HEAD_BYTES)
        assert all(np.array_equal(weights[t], MADE.row(t)) for t in range(LAST + 1))


@pytest.mark.parametrize(("values", "last"), [(3, 2), (1, 1), (40, 0), (3000, 1)])
def test_few_rows_may_lie_elsewhere(tmp_path, values, last):
    made, path = MadeUpRun(spec(values)), tmp_path / "run.h5"
    made.write(RunFileSink(path, compression="none"), last)
    assert_packed(path, made, last)
    with h5py.File(path) as file:
        assert all(np.array_equal(file["weights"][t], made.row(t)) for t in range(last + 1))


def test_rows_are_copied_where_the_library_gives_them_another_place(sealed, monkeypatch):
    monkeypatch.setattr(packing, "HEAD_BYTES", 12345)
    pack_here(sealed)
    assert_packed(sealed.output)


# ---- cut off


def assert_still_a_folder(folder: Folder) -> None:
    """It is read as before, and packed by whoever tries next."""
    assert not folder.output.exists()
    assert verify(folder.path) == []
    with trajrec.open(folder.path) as run:
        assert_same_run(run, MADE, LAST)
    pack(folder.path)
    assert_packed(folder.output)


def test_killed_between_wrapping_and_renaming(sealed, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        pack_here(sealed)
    assert sealed.rows.read_bytes()[:4] == b"\x89HDF"
    assert_still_a_folder(sealed)


def test_killed_while_wrapping(sealed):
    with sealed.rows.open("r+b") as file:
        file.write(b"\x89HDF\r\n\x1a\nhalf a head")
        file.seek(0, 2)
        file.write(b"half of the rest")
    (sealed.path / "packed.h5.tmp").write_bytes(b"all but the rows")
    assert_still_a_folder(sealed)


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_the_writer_is_killed_again_and_again_while_it_packs(sealed, real_processes):
    for _ in range(4):
        lock, ring = Lock(sealed.lock), Ring(sealed.ring, writable=True)
        ring.set(Control.FINISH, Finish.RECOVERED)
        writer = WriterProcess(sealed, ring, lock)
        time.sleep(random.uniform(0.15, 0.4))
        writer.kill()
        writer.close()
        lock.release()
        if sealed.output.exists():
            break
        assert verify(sealed.path) == []
        with trajrec.open(sealed.path) as run:
            assert_same_run(run, MADE, LAST)
    pack(sealed.path)
    assert_packed(sealed.output)


@pytest.fixture
def uncompressed(monkeypatch, real_processes):
    """The kill tests record without compression."""
    monkeypatch.setenv("COMPRESSION", "none")
    monkeypatch.setattr(kill, "RunFileSink", partial(RunFileSink, compression="none"))


KINDS = [kill.kill_trainer, kill.kill_both, kill.kill_writer]


@pytest.mark.parametrize("kind", KINDS[1:])
def test_a_handful_of_kills(tmp_path, uncompressed, kind):
    kind(tmp_path)
    with h5py.File(tmp_path / "run.h5") as file:
        assert file["weights"].chunks is None


@pytest.mark.long
@pytest.mark.parametrize("trial", range(20))
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills(tmp_path, uncompressed, kind, trial):
    kind(tmp_path)


@pytest.mark.parametrize("call", [(rowfile.os, "fsync"), (rowfile.trailer, "trailer")])
def test_no_room_to_pack(sealed, monkeypatch, call):
    size = sealed.rows.stat().st_size
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(*call, full)
        pack_here(sealed)
    assert sealed.rows.stat().st_size == size
    assert not (sealed.path / "packed.h5.tmp").exists()
    assert_still_a_folder(sealed)


def test_no_room_to_seal(folder, monkeypatch):
    """What was appended is taken back, so that its room can be used for something else."""
    writer = Writer(folder)
    size, segments = folder.rows.stat().st_size, folder.segments()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(sealing.trailer, "append", full)
        writer.seal_everything()
    assert (folder.rows.stat().st_size, folder.segments()) == (size, segments)
    assert_still_a_folder(folder)


def test_rows_of_a_segment_that_has_appeared_stay(folder, monkeypatch):
    """Its name stands in the folder already when syncing the folder fails."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        sync = durable_module.sync
        patch.setattr(durable_module, "sync", lambda path: full() if path.is_dir() else sync(path))
        Writer(folder).seal_everything()
    assert_still_a_folder(folder)


def test_killed_while_rows_are_dropped(sealed, monkeypatch):
    """The manifest says so first: from then on nobody asks for rows, nor misses their file."""
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(rework, "copy_segment", full)
        rework.drop_rows(sealed)
    assert not sealed.rows.exists()
    assert verify(sealed.path) == []
    pack(sealed.path)
    assert verify(sealed.output) == []
    with trajrec.open(sealed.output) as run:
        assert (run.keep, run.steps) == ("keyframes", LAST)
        assert all(np.array_equal(run.row(t), MADE.row(t)) for t in (0, 50, 200))


def test_rows_behind_the_last_segment_mean_nothing(folder):
    with folder.rows.open("ab") as file:
        file.write(bytes(ROW_BYTES + 17))
    assert_still_a_folder(folder)


# ---- damage


def test_a_damaged_row_is_named_with_its_file_and_step(sealed):
    data = bytearray(sealed.rows.read_bytes())
    data[HEAD_BYTES + 17 * ROW_BYTES + 5] ^= 1
    sealed.rows.write_bytes(data)
    (problem,) = verify(sealed.path)
    assert str(problem) == f"{sealed.rows}: /weights, step 17: the row does not match the checksum of its step"
    with trajrec.open(sealed.path) as run:
        with pytest.raises(DamagedRunError, match="/weights, step 17: the row does not match its checksum"):
            run.row(17)
        assert np.array_equal(run.row(18), MADE.row(18))
    with pytest.raises(DamagedRunError, match="/weights, step 17: the row does not match the checksum of its step"):
        pack_here(sealed)
    (problem,) = verify(sealed.path)
    assert str(problem) == f"{sealed.rows}: /weights, step 17: the row does not match the checksum of its step"


@pytest.mark.parametrize("size", [0, HEAD_BYTES + 17 * ROW_BYTES + 5, None])
def test_missing_rows_are_named(sealed, size):
    sealed.rows.unlink() if size is None else os.truncate(sealed.rows, size)
    problems = [str(problem) for problem in verify(sealed.path)]
    assert problems[0].startswith(f"{sealed.rows}: /weights, steps 0 to ")
    with trajrec.open(sealed.path) as run, pytest.raises(DamagedRunError, match=r"rows\.bin|missing"):
        run.row(LAST)
    with pytest.raises(DamagedRunError, match=r"rows\.bin: rows before step \d+ are missing; the file was cut off"):
        pack_here(sealed)


@pytest.mark.parametrize("how", ["compact", "nowhere"])
def test_values_that_lie_nowhere_in_the_file_are_refused(tmp_path, how):
    path = tmp_path / "run.h5"
    MadeUpRun(spec(40)).write(RunFileSink(path, compression="none"), 40)
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT if how == "compact" else h5py.h5d.CONTIGUOUS)
    with h5py.File(path, "r+") as file:
        del file["weights"]
        space = h5py.h5s.create_simple((41, 40))
        h5py.h5d.create(file.id, b"weights", h5py.h5t.IEEE_F32LE, space, properties)
    with pytest.raises(DamagedRunError, match=r"/weights cannot be read: .*do not lie in one piece within the file"):
        trajrec.open(path)


def test_a_place_outside_the_file_is_refused(tmp_path):
    """The address of /weights in its object header, changed together with the header's checksum."""
    path = tmp_path / "run.h5"
    MadeUpRun(spec(3000)).write(RunFileSink(path, compression="none"), 40)
    data = path.read_bytes()
    size = (41 * 3000 * 4).to_bytes(8, "little")
    place = data.index(HEAD_BYTES.to_bytes(8, "little") + size)
    for address in (len(data), 2**62, 2**64 - 2):
        path.write_bytes(data[:place] + address.to_bytes(8, "little") + data[place + 8 :])
        with pytest.raises(DamagedRunError), trajrec.open(path) as run:
            run.row(3)


@pytest.mark.parametrize("first", [-1, 2**62])
def test_steps_beyond_all_numbers_are_refused(sealed, first):
    step, path = sealed.segments()[1].first, sealed.segments()[1].path
    with h5py.File(path, "r+") as file:
        file.attrs["first"] = first
        del file["steps/step"]
        file["steps/step"] = first + np.arange(len(file["steps/crc32"]))
    assert any(problem.file == path for problem in verify(sealed.path))
    with pytest.raises(DamagedRunError), trajrec.open(sealed.path) as run:
        run.row(step)


def test_a_segment_outside_its_folder_has_no_rows(sealed, tmp_path):
    """No file says where else values are to be read from."""
    alone = Path(shutil.copy(sealed.segments()[0].path, tmp_path / "alone.h5"))
    shutil.copy(sealed.rows, tmp_path / "rows.bin")
    with pytest.raises(DamagedRunError, match=r"/weights has 0 rows, /steps \d+; the file is damaged"):
        trajrec.open(alone)


# ---- recordings of before


def with_rows_inside(folder: Folder, index: int) -> None:
    """Makes a segment what it was when uncompressed rows lay in the segments, too."""
    segment, manifest = folder.segments()[index], folder.read_manifest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Manifest, "plain_rows", False)
        packing.copy_segment(folder, manifest, Pieces([segment], folder.rows), segment.first, segment.stop)
    with folder.rows.open("r+b") as file:
        file.seek(HEAD_BYTES + segment.first * ROW_BYTES)
        file.write(bytes((segment.stop - segment.first) * ROW_BYTES))


def test_a_folder_with_rows_in_segments_is_read_and_packed(sealed):
    with_rows_inside(sealed, 0)
    with_rows_inside(sealed, 2)
    with h5py.File(sealed.segments()[0].path) as file:
        assert file["weights"].chunks == (32, 3000)
    assert_still_a_folder(sealed)


@pytest.mark.parametrize("at", [10, 150])
def test_and_goes_on(sealed, at):
    for index in range(len(sealed.segments())):
        with_rows_inside(sealed, index)
    restart(sealed.output, at, 260, made=MADE, compression="none", keyframe_every=50)
    assert_packed(sealed.output, last=260)


def test_a_packed_run_in_chunks_goes_on_in_one_piece(tmp_path):
    path = Path(shutil.copy(Path(golden.__file__).with_name("run-1.0-none.h5"), tmp_path / "run.h5"))
    restart(path, golden.LAST, golden.LAST + 9, made=golden.MADE, keyframe_every=16)
    assert_packed(path, golden.MADE, golden.LAST + 9)
    with h5py.File(path) as file:
        assert file["weights"].chunks is None
