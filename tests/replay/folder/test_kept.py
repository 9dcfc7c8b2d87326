"""The work of a replay is kept, whatever the disk does: full, damaged, limited, somebody else's output in the way."""

import errno
import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from tests.made import scenario, user_project
from tests.made.command import call
from tests.made.replays import solved
from trajrec.cli.main import guarded
from trajrec.cli.replay import replay
from trajrec.replay.methods import resume
from trajrec.replay.methods.resume import ResumeFile
from trajrec.replay.session import Session


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    user_project.write(folder)
    done = call("record", "--out", "run.h5", "train.py", "--epochs", "2", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(project, monkeypatch):
    """Runs `trajrec replay run.h5` in this process; progress is written at every step."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("TRAJREC_PROGRESS_SECONDS", "0")
    monkeypatch.setenv("TRAJREC_FORM", "reverse")
    app = typer.Typer()
    app.command()(guarded(replay))

    def command(*options):
        done = CliRunner().invoke(app, ["run.h5", "--task", "task.py:task", *map(str, options)])
        return done.exit_code, " ".join(done.output.split()), done.exception

    return command


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def values(folder):
    return pl.read_parquet(folder / "contributions.parquet")["contribution"].to_list()


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_an_answer_that_does_not_fit_is_written_later_without_a_step(run, project, monkeypatch, mode):
    out, options = project / f"later-{mode}", ("--exact", "--targets", "each", "--mode", mode, "--taylor", 1)
    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_parquet", full)
        code, said, _ = run("--out", out, *options)
    assert code == 2
    assert "could not be written" in said
    assert "the disk is full" in said
    assert "What was computed is kept" in said
    assert "the same command then only writes the answer" in said
    assert [path.name for path in out.iterdir()] == ["progress.npz"]
    with monkeypatch.context() as patch:
        for name in ("trajrec.replay.methods.adjoint.Adjoint.go", "trajrec.replay.methods.tangent.Tangent.go"):
            patch.setattr(name, lambda *_: pytest.fail("a step was made again"))
        patch.setattr("trajrec.cli.replay._train_again", lambda *_: pytest.fail("it was trained again"))
        code, said, _ = run("--out", out, *options)
    assert code == 0, said
    assert "Going on from" in said
    assert run("--out", project / f"whole-{mode}", *options)[0] == 0
    assert values(out) == values(project / f"whole-{mode}")
    found, whole = (json.loads((f / "replay.json").read_text()) for f in (out, project / f"whole-{mode}"))
    for name in ("certificate", "growth", "taylor"):
        assert found[name] == whole[name]


def test_a_forced_replay_whose_answer_does_not_fit_leaves_the_old_one_and_its_work(run, project, monkeypatch):
    out = project / "forced"
    assert run("--out", out, "--hessian-free")[0] == 0
    old = values(out)
    with monkeypatch.context() as patch:
        patch.setattr(pl.DataFrame, "write_parquet", full)
        code, said, _ = run("--out", out, "--exact", "--force")
    assert (code, values(out)) == (2, old)
    assert "the same command, without --force, then only writes the answer" in said
    code, said, _ = run("--out", out, "--exact")
    assert code == 0, said
    assert "Going on from" in said
    assert values(out) != old


def test_progress_that_cannot_be_written_is_said_once_and_the_replay_goes_on(run, project, monkeypatch):
    monkeypatch.setattr(resume.np, "savez", full)
    code, said, _ = run("--out", project / "no-progress")
    assert code == 0, said
    assert said.count("The disk is full: the progress could not be written") == 1
    assert values(project / "no-progress")


def test_where_neither_answer_nor_progress_can_be_written_the_work_goes_elsewhere(tmp_path, monkeypatch):
    told = []
    file = ResumeFile(tmp_path / "out", "question", 1000, say=told.append)
    file.finish({"a": 1}, {"b": np.arange(3)})
    write = ResumeFile._write
    monkeypatch.setattr(
        ResumeFile, "_write", lambda self, path, *a: full() if path == file.path else write(self, path, *a)
    )
    monkeypatch.setattr(resume.tempfile, "gettempdir", lambda: str(tmp_path))
    said = file.keep()
    (kept,) = tmp_path.glob("trajrec-*progress.npz")
    assert f"kept in {kept}. Make room and move it to {file.path}" in said
    kept.rename(tmp_path / "progress.npz")
    assert ResumeFile(tmp_path, "question").load()[0] == {"a": 1}
    monkeypatch.setattr(ResumeFile, "_write", full)
    assert "None of the work could be kept. Make room" in file.keep()


DAMAGE = {
    "cut off": lambda data: data[: len(data) // 2],
    "a flipped byte": lambda data: data[:200] + bytes([data[200] ^ 1]) + data[201:],
    "empty": lambda data: b"",
    "something else": lambda data: b"not a zip file",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_progress_is_said_and_set_aside_and_the_replay_begins_anew(run, project, name):
    out = project / f"damaged {name}"
    s = ResumeFile(out, "question")
    s.save({}, {"sums": np.arange(100.0)})
    broken = DAMAGE[name](s.path.read_bytes())
    s.path.write_bytes(broken)
    code, said, _ = run("--out", out)
    assert code == 0, said
    assert "is damaged" in said
    assert "set aside as progress-damaged.npz" in said
    assert (out / "progress-damaged.npz").read_bytes() == broken
    assert values(out)
    assert run("--out", out, "--force")[0] == 0
    assert (out / "progress-damaged.npz").read_bytes() == broken


def test_damaged_progress_does_not_take_the_name_of_another(tmp_path):
    for content in (b"one", b"two", b"three"):
        (tmp_path / "progress.npz").write_bytes(content)
        assert ResumeFile(tmp_path, "question").load() is None
    kept = [path.read_bytes() for path in sorted(tmp_path.iterdir())]
    assert kept == [b"two", b"three", b"one"]


def test_what_a_killed_writer_left_is_no_hindrance(tmp_path):
    """Neither by a process id that comes again, nor by its room."""
    for name in (f".progress.npz.{os.getpid()}.tmp", ".progress-00ff.tmp"):
        (tmp_path / name).write_text("half")
    file = ResumeFile(tmp_path, "question")
    assert file.load() is None
    assert file.save({}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["progress.npz"]


def test_a_replay_that_is_killed_after_its_end_answers_without_a_step(tmp_path):
    s = scenario.train()
    for mode in ("adjoint", "tangent"):
        file = ResumeFile(tmp_path / mode, "question", 0)
        whole = solved(Session(s.run, s.task), "each", exact=True, mode=mode, file=file)
        again = solved(
            Session(s.run, s.task), "each", exact=True, mode=mode, file=ResumeFile(tmp_path / mode, "question")
        )
        assert (again.values == whole.values).all()
        assert again.certificate == whole.certificate
        assert again.certificate.steps_checked == s.run.steps


def test_another_output_that_came_meanwhile_is_left_and_said(run, project, monkeypatch):
    out = project / "both"
    write = pl.DataFrame.write_parquet

    def other_first(frame, *args, **options):
        (out / "replay.json").write_text("somebody else's")
        return write(frame, *args, **options)

    monkeypatch.setattr(pl.DataFrame, "write_parquet", other_first)
    code, said, _ = run("--out", out)
    assert code == 0, said
    assert "Something else has come into" in said
    assert [path.name for path in out.iterdir()] == ["replay.json"]
    assert values(project / "both-2")


def test_a_place_is_refused_before_the_task_is_imported(project, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    monkeypatch.setattr("trajrec.cli.replay.task_of", lambda *_: pytest.fail("the Task was loaded"))
    monkeypatch.chdir(project)
    app = typer.Typer()
    app.command()(guarded(replay))
    for out in (tmp_path / "mine", tmp_path / "mine" / "thesis.txt", tmp_path / "mine" / "thesis.txt" / "a", "."):
        done = CliRunner().invoke(app, ["run.h5", "--out", str(out), "--force"])
        assert done.exit_code == 2
        assert isinstance(done.exception, SystemExit)


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
from trajrec.cli.main import main
main()
"""


@pytest.mark.parametrize("size", [pytest.param(0, marks=pytest.mark.long), 2000])
def test_a_limit_of_the_size_of_files_is_a_clear_error(run, project, tmp_path, size):
    """Whatever fits: no traceback, and the same command answers when the limit is gone."""
    command = ["replay", "run.h5", "--task", "task.py:task", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "TRAJREC_PROGRESS_SECONDS": "0", "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(size), *command],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "a file would be too large" in " ".join(done.stderr.split())
    kept = (tmp_path / "out" / "progress.npz").exists()
    assert ("What was computed is kept" in " ".join(done.stderr.split())) == kept
    code, said, _ = run("--out", tmp_path / "out")
    assert code == 0, said
    assert ("Going on from" in said) == kept
