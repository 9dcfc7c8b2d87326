"""What was packed is read back before its source goes; damage is kept, and named."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import h5py
import pytest
from typer.testing import CliRunner

import trajrec
from tests.made.runfile_cases import SMALL, MadeUpRun, assert_same_run, begin, cut_off, spec
from trajrec.cli.main import app
from trajrec.errors import DamagedRunError, RecordingError
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.rowfile import HEAD_BYTES
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.runfile.writer import packing, rework
from trajrec.runfile.writer.loop import Writer

MADE = MadeUpRun(spec(3000, rng=16))
LAST = 230


@pytest.fixture(autouse=True)
def _simulated(simulation):
    pass


@pytest.fixture(scope="module", params=["zstd", "none"])
def unfinished(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("readback") / "run.h5"
    cut_off(path, LAST, MADE, compression=request.param)
    Writer(Folder.of(path)).seal_everything()
    return Folder.of(path).path


@pytest.fixture
def folder(unfinished, tmp_path) -> Folder:
    return Folder(Path(shutil.copytree(unfinished, tmp_path / "run.h5.rec")))


def damage_row(folder: Folder, step: int = 17) -> None:
    """Changes a row, and no checksum of HDF5's: as memory or a disk does that has let a bit flip before."""
    if folder.rows.exists():
        with folder.rows.open("r+b") as file:
            file.seek(HEAD_BYTES + step * 12_000 + 5)
            file.write(b"\x55")
        return
    segment = next(s for s in folder.segments() if s.first <= step < s.stop)
    with h5py.File(segment.path, "r+") as file:
        file["weights"][step - segment.first, 5] += 1


def all_of(folder: Folder) -> dict[str, bytes]:
    """All but what packing may write without changing anything."""
    changing = ("lock", "ring.bin", "writer.log")
    return {p.name: p.read_bytes() for p in folder.path.iterdir() if p.name not in changing}


def test_a_damaged_row_is_kept_and_named(folder):
    damage_row(folder)
    before, size = all_of(folder), sum(len(data) for data in all_of(folder).values())
    for _ in range(2):
        with pytest.raises(DamagedRunError, match=r"was kept as it is.*/weights, step 17: the row does not match"):
            pack(folder.path)
    assert all_of(folder).keys() == before.keys()
    assert sum(len(data) for data in all_of(folder).values()) >= size
    assert not folder.output.exists()
    assert [p.dataset for p in verify(folder.path) if p.first == 17] == ["/weights"]
    with trajrec.open(folder.path) as run:
        for t in (0, 16, 18, LAST):
            assert run.row(t).tobytes() == MADE.row(t).tobytes()
        with pytest.raises(DamagedRunError, match="step 17"):
            run.row(17)
    result = CliRunner().invoke(app, ["pack", str(folder.path)])
    assert result.exit_code == 4
    assert "/weights, step 17" in result.output


def test_what_is_mended_afterwards_is_packed(folder):
    good = Path(shutil.copytree(folder.path, folder.path.with_name("copy")))
    damage_row(folder)
    with pytest.raises(DamagedRunError):
        pack(folder.path)
    for name in ("rows.bin", folder.segments()[0].path.name):
        if (good / name).exists():
            shutil.copy(good / name, folder.path / name)
    with trajrec.open(pack(folder.path)) as run:
        assert_same_run(run, MADE, LAST)
    assert verify(folder.output) == []


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_damage_at_the_end_of_a_recording_is_said_loudly(tmp_path, caplog, compression):
    sink = RunFileSink(tmp_path / "run.h5", limits=SMALL, compression=compression)
    sink.open(MADE.spec)
    MADE.feed(sink, LAST)
    sink.writer.wake()
    damage_row(sink.folder)
    with caplog.at_level(logging.ERROR, "trajrec"):
        summary = sink.close(complete=True)
    assert (summary.path, summary.steps, summary.stopped) == (sink.folder.path, LAST, None)
    assert "was NOT PACKED" in caplog.text
    assert "/weights, step 17: the row does not match the checksum of its step" in caplog.text
    with trajrec.open(tmp_path / "run.h5") as run:
        assert run.row(18).tobytes() == MADE.row(18).tobytes()


def flip(path: Path, place: float) -> None:
    at = int(path.stat().st_size * place)
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 16]))


@pytest.mark.parametrize("place", [0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 0.999999])
def test_a_byte_that_changes_while_packing_is_found(folder, monkeypatch, place):
    """Wherever it is in the packed file: the folder stays, and the next attempt makes a good one."""
    check = packing.check_made

    def spoiled(made: Path, source: Path) -> None:
        flip(made, place)
        check(made, source)

    with monkeypatch.context() as patch, pytest.raises(DamagedRunError, match="was kept as it is"):
        patch.setattr(packing, "check_made", spoiled)
        packing.pack(folder, folder.read_manifest(), "recovered", ())
    assert not folder.output.exists()
    if not folder.rows.exists():  # else the row itself may be what has changed
        with trajrec.open(pack(folder.path)) as run:
            assert_same_run(run, MADE, LAST)


def test_going_on_with_a_packed_run_reads_back_what_was_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "run.h5"
    begin(path, LAST, packed=True, made=MADE)
    before, copy = path.read_bytes(), rework.copy_segment
    Folder.of(path).path.mkdir()

    def spoiled(folder: Folder, *rest: object) -> None:
        copy(folder, *rest)
        flip(folder.segments()[0].path, 0.5)

    monkeypatch.setattr(rework, "copy_segment", spoiled)
    with pytest.raises(DamagedRunError, match=rf"{path} was kept as it is"):
        rework.cut(Folder.of(path), 100)
    assert path.read_bytes() == before
    assert list(Folder.of(path).path.iterdir()) == []


def test_a_damaged_row_does_not_become_a_keyframe(folder):
    damage_row(folder, step=64)
    with pytest.raises(DamagedRunError, match="/weights, step 64: the row does not match its checksum"):
        rework.drop_rows(folder)
    assert os.path.lexists(folder.rows) or folder.segments()
    assert folder.read_manifest().keep == "steps"


def test_dropping_rows_again_where_it_was_cut_off(folder, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(rework, "copy_segment", full)
        rework.drop_rows(folder)
    assert rework.drop_rows(folder) == LAST
    assert verify(folder.path) in ([], [p for p in verify(folder.path) if p.file == folder.ring])
    with trajrec.open(folder.path) as run:
        assert run.keep == "keyframes"
        assert all(run.row(t).tobytes() == MADE.row(t).tobytes() for t in (0, 64, 192))


def test_a_run_cannot_go_on_over_damage(folder):
    damage_row(folder)
    sink = RunFileSink(folder.output, limits=SMALL, resume=True)
    sink.open(MADE.spec)
    assert isinstance(sink.reserve(), object)
    with pytest.raises(RecordingError, match="cannot be continued"):
        folder.manifest.write_text("{}")
        sink.commit(MADE.record(100))
