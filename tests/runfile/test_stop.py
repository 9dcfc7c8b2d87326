"""Recording that ends before training does: by `stop`, by a gap, or in a process that was forked."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_run, cut_off, end_trainer, spec
from trajrec.runfile.folder import Folder
from trajrec.runfile.lock import holder
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.sink import MemorySink

ROOT = Path(__file__).parents[2]
MADE = MadeUpRun(spec(200, rng=16))


@pytest.fixture(params=["memory", "zstd", "none", "keyframes"])
def sink(request, tmp_path, simulation):
    if request.param == "memory":
        return MemorySink()
    if request.param == "keyframes":
        return RunFileSink(tmp_path / "run.h5", keep=10)
    return RunFileSink(tmp_path / "run.h5", compression=request.param)


def test_what_comes_after_a_stop_is_a_gap(sink):
    sink.open(MADE.spec)
    MADE.feed(sink, 50)
    sink.stop("I was told to.")
    MADE.feed(sink, 80, first=51)
    summary = sink.close(complete=True)
    assert (summary.steps, summary.gaps, summary.stopped) == (50, ((51, 80),), "I was told to.")


def test_a_step_that_is_said_to_be_missing_ends_recording(sink):
    sink.open(MADE.spec)
    MADE.feed(sink, 50)
    sink.note_gap(51)
    MADE.feed(sink, 51, first=51)  # which may be another step than the recorder takes it for
    sink.note_gap(70)
    sink.note_gap(60)
    summary = sink.close(complete=True)
    assert (summary.steps, summary.gaps, summary.stopped) == (50, ((51, 70),), "Step 51 was not recorded.")


def test_a_run_that_did_not_stop_says_so(sink):
    assert MADE.write(sink, 20).stopped is None


def test_the_first_reason_counts_and_no_keyframe_comes_after_it(sink):
    sink.open(MADE.spec)
    MADE.feed(sink, 50)
    sink.stop("first")
    sink.stop("second")
    assert not sink.wants_keyframe(64)
    sink.keyframe(MADE.keyframe(64))
    assert sink.close(complete=True).stopped == "first"


@pytest.mark.parametrize("compression", ["zstd", "none"])
def test_a_stopped_recording_is_packed_with_its_state_and_gap(tmp_path, simulation, compression):
    sink = RunFileSink(tmp_path / "run.h5", compression=compression)
    sink.open(MADE.spec)
    MADE.feed(sink, 50)
    sink.stop("enough")
    sink.note_gap(51)
    sink.keyframe(MADE.keyframe(50))  # of now, and not of step 50
    MADE.feed(sink, 60, first=52)
    sink.close(complete=True)
    assert verify(tmp_path / "run.h5") == []
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_run(run, MADE, 50)
        assert (run.state, run.gaps, run.keyframe_steps) == ("complete", ((51, 60),), (0,))


def test_a_noted_gap_survives_a_kill(tmp_path, simulation):
    sink = RunFileSink(tmp_path / "run.h5")
    sink.open(MADE.spec)
    MADE.feed(sink, 50)
    sink.note_gap(51)
    end_trainer(sink)
    with trajrec.open(pack(tmp_path / "run.h5")) as run:
        assert (run.steps, run.gaps) == (50, ((51, 51),))


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("opened", [False, True])
def test_stopping_never_raises_and_leaves_nothing_where_nothing_was_recorded(tmp_path, simulation, resume, opened):
    path = tmp_path / "run.h5"
    if resume:
        MADE.write(RunFileSink(path), 20)
    sink = RunFileSink(path, resume=resume)
    if opened and resume:
        sink.open(MADE.spec)
    sink.stop("too early")
    sink.note_gap(1)
    sink.open(MADE.spec) if not (opened and resume) else None
    MADE.feed(sink, 5)
    sink.keyframe(MADE.keyframe(5))
    sink.inputs(MADE.inputs(6))
    summary = sink.close(complete=True)
    assert (summary.path, summary.steps, summary.stopped) == (None, 0, "too early")
    assert [p.name for p in tmp_path.iterdir()] == (["run.h5"] if resume else [])
    assert holder(Folder.of(path).lock) is None
    sink.stop("again")
    sink.note_gap(9)


def test_an_earlier_recording_is_as_it_was_after_a_stop(tmp_path, simulation):
    cut_off(tmp_path / "run.h5", 20, MADE)
    sink = RunFileSink(tmp_path / "run.h5", resume=True)
    sink.open(MADE.spec)
    sink.stop("no")
    sink.reserve()
    sink.commit(MADE.record(0))
    sink.close(complete=True)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert_same_run(run, MADE, 20)


# ---- forks

SCRIPT = """
import gc, os, sys
from tests.made.runfile_cases import MadeUpRun, spec
from trajrec.runfile.trainer.sink import RunFileSink

made = MadeUpRun(spec(200, rng=16, inputs="store"))
sink = RunFileSink(sys.argv[1])
sink.open(made.spec)
made.feed(sink, 40)


def calls_on():
    other = MadeUpRun(made.spec, seed=9)
    other.feed(sink, 60, first=41)
    sink.keyframe(other.keyframe(41))
    sink.stop("in the child")
    sink.note_gap(160)
    sink.abandon()
    sink.open(made.spec)
    summary = sink.close(complete=True)
    assert (summary.path, summary.steps) == (None, 0), summary


def is_collected():
    global sink
    del sink
    gc.collect()


def lives_on():
    os.read(waits, 1)  # until the parent has ended


waits, ends = os.pipe()
last = 40
for what in (calls_on, is_collected, lives_on, lambda: None):
    child = os.fork()
    if child == 0:
        os.close(ends)
        sink.abandon()
        what()
        sys.exit(3)
    if what is lives_on:
        print(child, flush=True)
    else:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    made.feed(sink, last + 10, first=last + 1)
    last += 10
made.feed(sink, 90, first=last + 1)
summary = sink.close(complete=True)
assert (summary.steps, summary.gaps) == (90, ()), summary
made.write(RunFileSink(sys.argv[1] + "-second"), 10)
print("closed", flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_a_forked_child_has_no_part_in_the_recording(tmp_path):
    path = tmp_path / "run.h5"
    command = [sys.executable, "-W", "error", "-c", SCRIPT, path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
    child = int(process.stdout.readline())
    assert process.stdout.readline() == "closed\n"
    os.kill(child, 0)  # it lives
    assert holder(Folder.of(path).lock) is None
    assert process.communicate() == ("", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.h5", "run.h5-second"]
    assert verify(path) == []
    with trajrec.open(path) as run:
        assert_same_run(run, MadeUpRun(spec(200, rng=16, inputs="store")), 90)


KILLED = """
import os, sys, time
from tests.made.runfile_cases import MadeUpRun, spec
from trajrec.runfile.trainer.sink import RunFileSink

made = MadeUpRun(spec(200))
sink = RunFileSink(sys.argv[1])
sink.open(made.spec)
made.feed(sink, 100)
if os.fork() == 0:
    sink.abandon()
    print(os.getpid(), flush=True)
    time.sleep(600)
sys.stdin.read()
"""


def test_the_lock_is_free_when_the_parent_was_killed_though_its_child_lives(tmp_path):
    path = tmp_path / "run.h5"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    while holder(Folder.of(path).lock) is not None:  # until the writer, for which the pipe has ended, has sealed
        time.sleep(0.01)
    os.kill(child, 9)
    process.communicate()
    with trajrec.open(pack(path)) as run:
        assert run.steps == 100
