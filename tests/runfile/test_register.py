"""Whose Task may be called: only of a run that this user recorded here, or one that is named or trusted by hand."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import trajrec
from tests.made import small_run
from tests.made.runfile_cases import MadeUpRun, cut_off, spec
from trajrec.errors import TaskError
from trajrec.runfile import register
from trajrec.runfile.recovery import pack
from trajrec.task.loading import load_task

NOTED = replace(spec(4), task="task.py:task", task_sha256="12" * 32)


@pytest.fixture
def state(tmp_path, monkeypatch, simulation):
    """A register with nothing in it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def reference(tmp_path):
    (tmp_path / "own.py").write_text(small_run.TASK)
    return f"{tmp_path / 'own.py'}:task"


def called(folder) -> bool:
    return (folder / "imported.txt").exists()


def command(*arguments, capsys):
    """Exit code and what was said of a command, in this process."""
    from trajrec.cli.main import app

    with pytest.raises(SystemExit) as stopped:
        app([*map(str, arguments)])
    return stopped.value.code, " ".join(capsys.readouterr().err.split())


def test_a_run_is_known_by_its_id_its_task_and_the_tasks_checksum(state):
    assert not register.has(NOTED)
    register.enter(NOTED)
    assert register.has(NOTED)
    assert not register.has(replace(NOTED, run_id="1f" * 16))
    assert not register.has(replace(NOTED, task="other.py:task"))
    assert not register.has(replace(NOTED, task_sha256="13" * 32))
    assert not register.has(replace(NOTED, task_sha256=None))


def test_the_folder_is_that_of_the_entry(state):
    ran = replace(spec(4), folder="/here")
    register.enter(ran)
    assert register.ran_in(ran, "/here")
    assert not register.ran_in(replace(ran, folder="/elsewhere"), "/elsewhere")
    assert not register.has(replace(ran, task="task.py:task", task_sha256="12" * 32))


def test_an_entry_of_an_earlier_version_has_no_folder(state):
    register.enter(NOTED)
    (entry,) = [path for path in state.rglob("*") if path.is_file()]
    entry.write_text(json.dumps({"task": NOTED.task, "sha256": NOTED.task_sha256}))
    assert register.has(NOTED)
    assert not register.ran_in(replace(NOTED, folder="/here"), "/here")


def test_a_run_without_a_task_and_a_folder_is_not_entered(state):
    register.enter(spec(4))
    assert not state.exists()


@pytest.mark.parametrize("run_id", ["", "../../../etc/passwd", "0f/0f", "/tmp/x", "0F" * 16, "0f" * 16 + "\n"])
def test_an_id_from_a_file_leads_nowhere_else(state, run_id):
    strange = replace(NOTED, run_id=run_id)
    register.enter(strange)
    assert not register.has(strange)
    assert not state.exists()


def test_a_register_that_cannot_be_written_disturbs_nothing(state):
    state.write_text("a file where the folder should be")
    register.enter(NOTED)
    assert not register.has(NOTED)


def test_a_damaged_entry_is_none(state):
    register.enter(NOTED)
    (entry,) = [path for path in state.rglob("*") if path.is_file()]
    for text in ("", "[" * 100_000, "null", '{"task": "task.py:task"}', "\xff"):
        entry.write_text(text, encoding="latin-1")
        assert not register.has(NOTED)


def test_several_processes_may_write_at_once(state):
    several = [replace(NOTED, run_id=f"{k % 7:032x}") for k in range(60)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda one: register.enter(one) or register.has(one), several))
    assert len([path for path in state.rglob("*") if path.is_file()]) == 7


@pytest.mark.parametrize("given", ["", "relative/folder"])
def test_without_a_folder_named_it_lies_in_the_home(given, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", given)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    assert tmp_path in register.state_folder().parents


def test_ones_own_run_is_replayed_without_naming_the_task(tmp_path, state, reference, capsys):
    small_run.record(tmp_path / "run.h5", task=reference)
    moved = (tmp_path / "elsewhere").with_suffix(".h5")
    os.rename(tmp_path / "run.h5", moved)
    code, said = command("replay", moved, capsys=capsys)
    assert (code, "noted in the run, unchanged" in said) == (0, True), said


@pytest.mark.parametrize("other", [False, True])
def test_second_parts_are_ones_own(tmp_path, state, reference, other):
    """A training that begins anew, or with other weights, is a second part."""
    path = tmp_path / "run.h5"
    small_run.record(path, task=reference)
    small_run.record(path, epochs=3, task=reference, resume=True, **({"build": small_run.other_model} if other else {}))
    with trajrec.open(tmp_path / "run-part2.h5") as run:
        assert run.steps == 9
        assert register.has(run.spec)


def test_a_run_that_was_cut_off_and_packed_is_ones_own(tmp_path, state):
    cut_off(tmp_path / "run.h5", 20, MadeUpRun(replace(spec(2000), task="a.py:task", task_sha256="00" * 32)))
    with trajrec.open(pack(tmp_path / "run.h5")) as run:
        assert register.has(run.spec)


def test_a_strangers_task_is_not_run(tmp_path, state, reference, capsys, monkeypatch):
    small_run.record(tmp_path / "run.h5", task=reference)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of-somebody-else"))
    code, said = command("replay", tmp_path / "run.h5", capsys=capsys)
    assert code == 2
    assert "This run was not recorded here by you" in said
    assert "--task FILE.py:ATTR" in said
    assert "--trust" in said
    assert not called(tmp_path)


@pytest.mark.parametrize("how", ["trust", "task"])
def test_a_strangers_run_is_replayed_with_a_task_named_or_trusted(tmp_path, state, reference, how, capsys, monkeypatch):
    small_run.record(tmp_path / "run.h5", task=reference)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "of-somebody-else"))
    chosen = ["--trust"] if how == "trust" else ["--task", reference]
    code, said = command("replay", tmp_path / "run.h5", *chosen, capsys=capsys)
    assert code == 0, said
    assert called(tmp_path)


def test_trust_does_not_extend_to_a_file_that_has_changed(tmp_path, state, reference, capsys):
    small_run.record(tmp_path / "run.h5", task=reference)
    (tmp_path / "own.py").write_text(small_run.TASK + "# changed\n")
    code, said = command("replay", tmp_path / "run.h5", "--trust", capsys=capsys)
    assert code == 2
    assert "has changed since the recording" in said
    assert not called(tmp_path)


@pytest.mark.parametrize("name", ["os:abort", "trajrec.task.task:Task", "tests.made.small_run:task"])
def test_nothing_but_a_task_is_ever_called(tmp_path, state, name, capsys):
    """Not even where the run is one's own, or the name was given by hand."""
    small_run.record(tmp_path / "run.h5", task=name)
    for given in ([], ["--trust"], ["--task", name]):
        code, said = command("replay", tmp_path / "run.h5", *given, capsys=capsys)
        assert code == 2
        assert f"{name} must be a trajrec.Task, but is" in said


def test_a_function_that_makes_a_task_is_refused_with_the_line_that_helps(reference):
    with pytest.raises(TaskError, match=r"write `task = factory\(\)` in the file"):
        load_task(reference.replace(":task", ":factory"))
