"""Where a recording goes: nothing but recordings is replaced, and a start that fails leaves nothing behind."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

import h5py
import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_run, cut_off, end_trainer, spec
from tests.made.runfile_simulation import Simulation
from trajrec.errors import DiskFullError, OutputExistsError, RecordingError
from trajrec.runfile import place
from trajrec.runfile.folder import Folder
from trajrec.runfile.lock import Lock, holder
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer import process
from trajrec.runfile.trainer.sink import RunFileSink

POPEN = process.subprocess.Popen
OLD, NEW = MadeUpRun(spec(200)), MadeUpRun(spec(200), seed=5)


@pytest.fixture
def path(tmp_path, monkeypatch) -> Path:
    """Of the run, whose writer is simulated."""
    Simulation(monkeypatch)
    return tmp_path / "run.h5"


def recorded(path: Path, made: MadeUpRun, last: int) -> None:
    with trajrec.open(path) as run:
        assert_same_run(run, made, last)


# ---- absolute


def test_a_relative_path_means_what_it_meant_when_it_was_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sink = RunFileSink("run.h5", budget="1GB")
    (tmp_path / "elsewhere").mkdir()
    sink.open(OLD.spec)
    monkeypatch.chdir(tmp_path / "elsewhere")
    OLD.feed(sink, 50)
    sink.writer.kill()  # and so does another writer
    OLD.feed(sink, 100, first=51)
    assert sink.close(complete=True).path == tmp_path / "run.h5"
    recorded(tmp_path / "run.h5", OLD, 100)
    assert os.listdir(tmp_path / "elsewhere") == []


def test_going_on_is_not_led_astray_either(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    OLD.write(RunFileSink("run.h5"), 20, complete=False)
    sink = RunFileSink("run.h5", resume=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    sink.open(OLD.spec)
    sink.reserve()[:] = OLD.row(20)
    sink.commit(OLD.record(20))
    OLD.feed(sink, 30, first=21)
    sink.close(complete=True)
    recorded(tmp_path / "run.h5", OLD, 30)


# ---- what may be replaced


@pytest.mark.parametrize("packed", [True, False])
def test_a_recording_is_replaced_by_force(path, packed):
    OLD.write(RunFileSink(path), 20) if packed else cut_off(path, 20, OLD)
    NEW.write(RunFileSink(path, force=True), 10)
    recorded(path, NEW, 10)
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_an_empty_file_is_no_obstacle(path):
    path.touch()
    NEW.write(RunFileSink(path), 10)
    recorded(path, NEW, 10)


def foreign_csv(path: Path) -> None:
    path.write_text("precious\n")


def foreign_hdf5(path: Path) -> None:
    with h5py.File(path, "w") as file:
        file["precious"] = 1


def foreign_link(path: Path) -> None:
    OLD.write(RunFileSink(path.with_name("other.h5")), 5)
    path.symlink_to("other.h5")


def foreign_folder(path: Path) -> None:
    path.mkdir()
    (path / "precious").touch()


FOREIGN = {
    "a file": (foreign_csv, "is no run of trajrec"),
    "an HDF5 file": (foreign_hdf5, "does not end as a run of trajrec does"),
    "a link": (foreign_link, "is a link"),
    "a folder": (foreign_folder, "is a folder"),
}


def all_of(folder: Path) -> dict[str, tuple[bool, bytes]]:
    files = [p for p in sorted(folder.rglob("*")) if not p.is_dir()]
    return {str(p.relative_to(folder)): (p.is_symlink(), p.read_bytes()) for p in files}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_trajrec_has_not_made_is_never_replaced(path, kind):
    make, why = FOREIGN[kind]
    make(path)
    before = all_of(path.parent)
    with pytest.raises(OutputExistsError, match=f"{why}.*replaces and continues only what it has made"):
        RunFileSink(path, force=True)
    assert all_of(path.parent) == before


@pytest.mark.parametrize("option", ["force", "resume"])
def test_it_is_looked_at_again_before_it_would_go(path, option):
    OLD.write(RunFileSink(path), 20)
    sink = RunFileSink(path, **{option: True})
    foreign_csv(path)
    with pytest.raises(OutputExistsError, match="is no run of trajrec"):
        sink.open(NEW.spec)
    assert all_of(path.parent) == {"run.h5": (False, b"precious\n")}


def test_a_recording_that_has_appeared_meanwhile_is_not_replaced(path):
    sink = RunFileSink(path)
    OLD.write(RunFileSink(path), 20)
    with pytest.raises(OutputExistsError, match="exists already"):
        sink.open(NEW.spec)
    recorded(path, OLD, 20)
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]


def test_a_file_that_appears_while_training_is_not_replaced(path, caplog):
    sink = RunFileSink(path)
    sink.open(OLD.spec)
    OLD.feed(sink, 20)
    foreign_csv(path)
    with caplog.at_level(logging.ERROR, "trajrec"):
        summary = sink.close(complete=True)
    assert path.read_text() == "precious\n"
    assert summary.path == path.with_name("run.h5.rec")
    assert "NOT PACKED" in caplog.text
    assert "Move it away" in caplog.text
    path.unlink()
    recorded(pack(summary.path), OLD, 20)


@pytest.mark.parametrize("name", ["notes.txt", "segment-0000000000-0000000009.h5.bak", "data", "manifest.json.tmp2"])
def test_a_folder_with_something_else_in_it_is_not_cleared(path, name):
    cut_off(path, 20, OLD)
    precious = Folder.of(path).path / name
    precious.mkdir() if name == "data" else precious.write_text("precious\n")
    before = all_of(path.parent)
    with pytest.raises(OutputExistsError, match=rf"a folder that holds {name}, which is no file of a recording"):
        RunFileSink(path, force=True)
    assert all_of(path.parent) == before


def test_clearing_up_leaves_what_is_not_ours(path):
    cut_off(path, 20, OLD)
    folder = Folder.of(path)
    names = ("notes.txt", "notes.tmp", "lock.old")
    for name in names:
        (folder.path / name).write_text("precious\n")
    folder.sweep()
    pack(path)
    recorded(path, OLD, 20)
    assert sorted(p.name for p in folder.path.iterdir()) == sorted(names)


def test_a_file_under_the_name_of_the_folder_is_refused(path):
    path.with_name("run.h5.rec").write_text("precious\n")
    with pytest.raises(OutputExistsError, match="is no folder"):
        RunFileSink(path, force=True)


@pytest.mark.parametrize("name", ["a" * 254 + ".h5", "file/run.h5"])
def test_names_that_cannot_be_are_refused_before_training(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(RecordingError, match="cannot be recorded to"):
        RunFileSink(tmp_path / name)


# ---- starts that fail


def no_ring(patch: pytest.MonkeyPatch) -> None:
    def create(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    patch.setattr(process, "create", create)


def no_process(patch: pytest.MonkeyPatch) -> None:
    def popen(*_: object, **__: object) -> None:
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    patch.setattr(process.subprocess, "Popen", popen)


def no_writer(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(process.subprocess, "Popen", POPEN)
    patch.setattr(process, "_command", lambda module, folder: ["sh", "-c", "echo no luck today >&2; exit 1"])


def no_lock(patch: pytest.MonkeyPatch) -> None:
    """The folder cannot be made anew for the recording that replaces another."""
    patch.setattr(place, "Lock", lambda path: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied")))


def no_second_lock(patch: pytest.MonkeyPatch) -> None:
    """The folder of the new recording cannot be locked, where an earlier one was set aside for it."""
    locks = iter([place.Lock])
    refuse = lambda path: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied"))  # noqa: E731
    patch.setattr(place, "Lock", lambda path: next(locks, refuse)(path))


FAILURES = {
    no_ring: "The disk is full: recording needs",
    no_process: "Recording cannot begin in .*Resource temporarily unavailable",
    no_writer: "cannot be started. Its last words: no luck today",
    no_lock: "cannot be made: Permission denied",
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_start_that_fails_leaves_nothing(path, failure):
    sink = RunFileSink(path)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecordingError, match=FAILURES[failure]):
        failure(patch)
        sink.open(NEW.spec)
    assert [p.name for p in path.parent.rglob("*")] in ([], ["run.h5.rec"])
    assert holder(Folder.of(path).lock) is None
    summary = sink.close(complete=False)
    assert (summary.path, summary.steps) == (None, 0)
    NEW.write(RunFileSink(path), 10)
    recorded(path, NEW, 10)


@pytest.mark.parametrize(
    ("failure", "packed"),
    [*((failure, packed) for failure in FAILURES for packed in (True, False)), (no_second_lock, False)],
)
def test_what_was_to_be_replaced_is_still_there(path, failure, packed):
    OLD.write(RunFileSink(path), 20) if packed else cut_off(path, 20, OLD)
    sink = RunFileSink(path, force=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RecordingError):
        failure(patch)
        sink.open(NEW.spec)
    recorded(path, OLD, 20)
    assert holder(Folder.of(path).lock) is None
    assert [p.name for p in path.parent.iterdir() if p.name not in ("run.h5", "run.h5.rec")] == []


def test_a_budget_that_is_too_small_leaves_nothing(path):
    sink = RunFileSink(path, budget="1MB")
    with pytest.raises(RecordingError, match="is too small for this model"):
        sink.open(NEW.spec)
    assert list(path.parent.iterdir()) == []


def test_what_a_killed_start_left_does_not_block_the_next_one(path):
    folder = Folder.of(path)
    folder.path.mkdir()
    for name in ("lock", "ring.bin", "writer.log", "manifest.json.tmp", "staged.bin", "keyframe-0000000000.part"):
        (folder.path / name).write_bytes(b"left")
    NEW.write(RunFileSink(path), 10)
    recorded(path, NEW, 10)


@pytest.mark.parametrize("drains", [True, False])
def test_nor_does_one_that_was_killed_before_its_first_step(path, drains):
    sink = RunFileSink(path)
    sink.open(OLD.spec)
    end_trainer(sink, drains)
    NEW.write(RunFileSink(path), 10)
    recorded(path, NEW, 10)


def test_a_failed_start_does_not_touch_that_of_another_process(path):
    sink, other = RunFileSink(path), Folder.of(path)
    other.path.mkdir()
    lock = Lock(other.lock)
    other.ring.write_bytes(b"just made")
    with pytest.raises(RecordingError, match="is being recorded by process"):
        sink.open(NEW.spec)
    assert other.ring.read_bytes() == b"just made"
    lock.release()


def test_a_sink_that_never_found_its_step_gives_the_place_back(path):
    OLD.write(RunFileSink(path), 20)
    sink = RunFileSink(path, resume=True)
    sink.open(OLD.spec)
    sink.close(complete=False)
    assert [p.name for p in path.parent.iterdir()] == ["run.h5"]
    recorded(path, OLD, 20)


def test_no_room_is_a_full_disk_and_says_how_much(path, monkeypatch):
    no_ring(monkeypatch)
    with pytest.raises(DiskFullError, match=r"needs \d+ MB in .* to begin with"):
        RunFileSink(path).open(NEW.spec)
