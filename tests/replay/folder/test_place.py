"""Where an output folder may stand: what is replaced, what never is, and that nothing is lost on the way."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest

from trajrec.errors import OutputExistsError, TrajrecError
from trajrec.replay.folder import place, write
from trajrec.replay.folder.place import Place
from trajrec.replay.methods.resume import ResumeFile
from trajrec.replay.report import cleaning

FACTS = {"run_id": "1", "method": "exact", "sign": "positive = helpful", "certificate": {}}


def finished(folder, **facts):
    """A folder as a replay leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "replay.json").write_text(json.dumps(FACTS | facts))
    for name in ("contributions.parquet", "top.csv"):
        (folder / name).write_text("old")
    return folder


def of_replay(folder, force=True, spared=()):
    return Place(Path(folder), write.OUTPUT, force, spared)


def fill(where, text="new"):
    """Claims a place and fills it."""
    with where.claimed(), where.filling() as unfinished:
        (unfinished / "replay.json").write_text(json.dumps(FACTS))
        (unfinished / "contributions.parquet").write_text(text)
    return where


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


FOREIGN = {
    "file": lambda f: (f / "notes.txt").write_text("years"),
    "hidden file": lambda f: (f / ".git").write_text("years"),
    "temporary file": lambda f: (f / "thesis.tmp").write_text("years"),
    "folder": lambda f: (f / "chapters").mkdir(),
    "folder of a known name": lambda f: (f / "samples.parquet").mkdir(),
    "link": lambda f: (f / "link").symlink_to(f),
    "link of a known name": lambda f: (f / "targets.parquet").symlink_to(f / "top.csv"),
}


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("base", ["empty", "progress", "finished"])
@pytest.mark.parametrize("force", [True, False])
def test_a_folder_with_anything_foreign_stays_whatever_was_asked(here, name, base, force):
    folder = finished(here / "out") if base == "finished" else here / "out"
    folder.mkdir(exist_ok=True)
    if base == "progress":
        ResumeFile(folder, "question").save({}, {})
    if name == "link of a known name":
        (folder / "top.csv").touch()
    FOREIGN[name](folder)
    before = names(folder)
    with pytest.raises(OutputExistsError, match=r"exists already, and is not replaced: .* was not made by"):
        of_replay("out", force)
    assert names(folder) == before


@pytest.mark.parametrize(
    ("facts", "files"),
    [
        ('{"run_id": "1"}', ["contributions.parquet"]),
        ("[1]", ["contributions.parquet"]),
        ("{", ["contributions.parquet"]),
        ("[" * 100_000, ["contributions.parquet"]),
        (json.dumps(FACTS), []),
        (None, ["contributions.parquet", "top.csv"]),
    ],
)
def test_a_folder_that_only_looks_like_a_replay_stays(here, facts, files):
    (here / "out").mkdir()
    if facts is not None:
        (here / "out" / "replay.json").write_text(facts)
    for name in files:
        (here / "out" / name).write_text("x")
    with pytest.raises(OutputExistsError, match="it was not made by `trajrec replay`"):
        of_replay("out")


def test_progress_of_another_program_stays(here):
    (here / "out").mkdir()
    np.savez(here / "out" / "progress.npz", weights=np.arange(3))
    with pytest.raises(OutputExistsError, match=r"progress\.npz in it was not made by"):
        of_replay("out")


def test_outputs_of_one_command_are_not_replaced_by_another(here):
    finished(here / "out")
    with pytest.raises(OutputExistsError, match="was not made by `trajrec clean`"):
        Place(Path("out"), cleaning.OUTPUT, True)


def test_what_is_in_use_is_not_replaced(here, monkeypatch):
    folder = finished(here / "out")
    for what in (folder, folder / "top.csv", Path("out"), Path("other/../out/top.csv")):
        with pytest.raises(OutputExistsError, match="it holds the shard"):
            of_replay("out", spared=[("the shard", what)])
    monkeypatch.chdir(folder)
    with pytest.raises(OutputExistsError, match="it holds the current directory"):
        of_replay(folder)


@pytest.mark.parametrize("name", [".", "..", "", "/", "x/..", "../out/.."])
@pytest.mark.parametrize("force", [True, False])
def test_a_name_that_is_no_folder_of_its_own_is_refused(name, force):
    with pytest.raises(OutputExistsError, match="exists already"):
        of_replay(name, force)


@pytest.mark.parametrize("force", [True, False])
def test_links_and_files_are_refused(here, force):
    finished(here / "real")
    (here / "link").symlink_to(here / "real")
    (here / "nowhere").symlink_to(here / "missing")
    (here / "file").write_text("x")
    os.mkfifo(here / "pipe")
    for name, what in (
        ("link", "a link"),
        ("link/", "a link"),
        ("nowhere", "a link"),
        ("file", "a file"),
        ("pipe", "a file"),
    ):
        with pytest.raises(OutputExistsError, match=f"is {what}, and the output is a folder"):
            of_replay(name, force)


@pytest.mark.parametrize("name", ["file/out", "file/a/b", "loop/out", "n" * 256, "ü" * 200, "a\0b"])
def test_a_place_that_cannot_be_is_said_before_the_work(here, name):
    (here / "file").write_text("x")
    (here / "loop").symlink_to(here / "loop")
    before = names(here)
    with pytest.raises(TrajrecError, match="cannot be made"), of_replay(name).claimed():
        raise AssertionError("the work began")
    assert names(here) == before


def test_a_folder_that_cannot_be_written_is_said_before_the_work(here, monkeypatch):
    def refuse(self, *_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    finished(here / "there")
    monkeypatch.setattr(Path, "mkdir", refuse)
    for name in ("new", "there"):
        with pytest.raises(TrajrecError, match=r"cannot be made \(Read-only file system\)"), of_replay(name).claimed():
            raise AssertionError("the work began")


@pytest.mark.parametrize("name", ["answer.h5", "answer.h5.rec", "run.h5.rec/answer"])
def test_a_place_where_recordings_lie_is_refused(here, name):
    (here / "run.h5.rec").mkdir()
    (here / "run.h5.rec" / "manifest.json").touch()
    with pytest.raises(TrajrecError, match="recording"):
        of_replay(name)


@pytest.mark.parametrize("length", [120, 254, 255])
def test_long_names_serve(here, length):
    made = fill(fill(of_replay("n" * length)) and of_replay("n" * length), "again")
    assert made.final.name == "n" * length
    assert names(here) == [made.final.name]


def test_parents_are_made_and_gone_again_if_nothing_comes_of_it(here):
    with pytest.raises(KeyboardInterrupt), of_replay("a/b/c").claimed():
        assert (here / "a" / "b" / "c").is_dir()
        raise KeyboardInterrupt
    assert names(here) == []
    assert fill(of_replay("a/b/c")).final == here / "a" / "b" / "c"


def test_an_output_is_replaced_by_force_only(here):
    finished(here / "out")
    with pytest.raises(OutputExistsError, match="replace it with --force"):
        of_replay("out", force=False)
    assert (fill(of_replay("out")).final / "contributions.parquet").read_text() == "new"
    assert names(here / "out") == ["contributions.parquet", "replay.json"]
    assert names(here) == ["out"]


def test_what_a_replay_that_was_cut_off_left_is_taken_up_without_force(here):
    (here / "empty").mkdir()
    of_replay("empty", force=False)
    ResumeFile(here / "out", "question").save({}, {})
    (here / "out" / ".progress-00ff.tmp").touch()
    assert (fill(of_replay("out", force=False)).final / "replay.json").is_file()
    assert names(here / "out") == ["contributions.parquet", "replay.json"]


def test_a_forced_replay_that_was_cut_off_goes_on_without_force(here):
    folder = finished(here / "out")
    ResumeFile(folder, "question").save({}, {})
    with pytest.raises(OutputExistsError, match="replace it with --force"):
        of_replay("out", force=False)
    ResumeFile(folder, "question", forced=True).save({}, {})
    assert of_replay("out", force=False).force
    assert (fill(of_replay("out", force=False)).final / "contributions.parquet").read_text() == "new"


@pytest.mark.parametrize("force", [True, False])
def test_what_came_meanwhile_stays_and_the_output_stands_beside_it(here, force):
    if force:
        finished(here / "out", seconds=1)
    where = of_replay("out", force)
    (here / "out-2").mkdir()
    with where.claimed(), where.filling() as unfinished:
        (unfinished / "replay.json").write_text("{}")
        finished(here / "out", seconds=1234)
        ResumeFile(here / "out", "question").save({}, {})
    assert where.final == here / "out-3"
    assert where.shown == Path("out-3")
    assert "has come into out meanwhile" in where.said
    assert json.loads((here / "out" / "replay.json").read_text())["seconds"] == 1234
    assert names(here / "out-3") == ["replay.json"]


@pytest.mark.parametrize("what", ["a note", "a link", "a file", "nothing any more"])
def test_files_that_a_user_put_into_the_place_meanwhile_stay(here, what):
    where = of_replay("out")
    with where.claimed(), where.filling() as unfinished:
        (unfinished / "replay.json").write_text("{}")
        if what == "a note":
            (here / "out" / "notes.txt").write_text("years")
        else:
            (here / "out").rmdir()
        if what == "a link":
            (here / "out").symlink_to(here)
        if what == "a file":
            (here / "out").write_text("years")
    expected = ["out"] if what == "nothing any more" else ["out", "out-2"]
    assert names(here) == expected
    assert names(where.final) == ["replay.json"]


def test_at_no_moment_are_both_gone_and_a_failure_puts_the_old_back(here, monkeypatch):
    finished(here / "out")
    rename, seen = os.rename, []

    def watched(a, b):
        rename(a, b)
        seen.append(sorted(p.read_text() for p in here.glob("**/contributions.parquet")))

    monkeypatch.setattr(place.os, "rename", watched)
    fill(of_replay("out"))
    assert seen == [["new", "old"], ["new", "old"]]

    def fails(a, b):
        if len(calls) == 1:
            calls.append(b)
            raise KeyboardInterrupt
        calls.append(b)
        rename(a, b)

    calls = []
    monkeypatch.setattr(place.os, "rename", fails)
    with pytest.raises(KeyboardInterrupt):
        fill(of_replay("out"), "newer")
    assert (here / "out" / "contributions.parquet").read_text() == "new"
    assert names(here) == ["out"]


def test_an_old_one_that_cannot_be_moved_stays(here, monkeypatch):
    finished(here / "out")
    rename = os.rename

    def sticky(a, b):
        if Path(a).name == "out":
            raise PermissionError(errno.EPERM, "Operation not permitted")
        rename(a, b)

    monkeypatch.setattr(place.os, "rename", sticky)
    assert fill(of_replay("out")).final == here / "out-2"
    assert (here / "out" / "contributions.parquet").read_text() == "old"


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fails_is_an_error_with_what_becomes_of_the_work(here, code):
    where = of_replay("out")
    with pytest.raises(TrajrecError, match=r"could not be written into out: .* Kept elsewhere") as error:  # noqa: SIM117
        with where.claimed(), where.filling(lambda: "Kept elsewhere.") as unfinished:
            (unfinished / "half").write_text("x")
            raise OSError(code, os.strerror(code))
    assert ("the disk is full" in str(error.value)) == (code != errno.EIO)
    assert names(here) == []


def test_left_over_folders_are_no_runs_and_in_nobodys_way(here, monkeypatch):
    """A container repeats its process ids: names of a killed replay must not."""
    from trajrec.cli.runs import find_run

    (here / "runs").mkdir()
    (here / "runs" / "a.h5").touch()
    left = place._unique(here / "runs" / "b.h5-replay")
    left.mkdir()
    assert find_run(None) == Path("runs/a.h5")
    assert place._unique(here / "runs" / "b.h5-replay") != left
    (here / "runs" / f".b.h5-replay.{os.getpid()}.tmp").mkdir()
    assert fill(of_replay("runs/b.h5-replay")).final == here / "runs" / "b.h5-replay"
