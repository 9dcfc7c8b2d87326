"""What is said of the progress of a replay: every step counted once, at any pace, without a division by zero."""

import subprocess
import sys

import numpy as np
import pytest

from tests.made import scenario
from tests.made.replays import solved
from tests.replay.methods.test_long_replay import Always
from trajrec.cli.progress import ReplayProgress
from trajrec.replay.session import Session


class Clock:
    """Seconds as a test sets them."""

    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def told(capsys):
    """A clock, a progress that goes by it, and the lines that it has printed."""
    clock = Clock()
    return clock, ReplayProgress(clock), lambda: capsys.readouterr().err.splitlines()


def test_a_slow_set_up_is_no_division_by_zero(told):
    clock, progress, lines = told
    with progress:
        progress.start("adjoint", 8)
        clock.now = 6.0
        progress.advance(0)
        clock.now = 12.0
        progress.advance(2)
    assert lines() == ["adjoint: 0 of 8 steps", "adjoint: 2 of 8 steps, 0.17 steps/s, 36 s left"]


def test_nothing_to_do_and_more_than_was_thought_are_said_as_they_are(told):
    clock, progress, lines = told
    progress.start("taylor check", 0)
    clock.now = 5.0
    progress.advance(0)
    clock.now = 10.0
    progress.advance(20)
    assert lines() == ["taylor check: 0 of 0 steps", "taylor check: 20 of 0 steps, 2 steps/s, 0 s left"]


def test_steps_of_an_earlier_replay_are_done_and_tell_nothing_of_the_pace(told):
    clock, progress, lines = told
    progress.start("tangent", 1_100, done=1_000)
    clock.now = 5.0
    progress.advance(50)
    assert lines() == ["tangent: 1,050 of 1,100 steps, 10 steps/s, 5 s left"]


class Counting:
    """Counts the steps that it is told of; stops the replay after so many."""

    def __init__(self, most=None):
        self.total = self.before = self.made = 0
        self.most = most

    def start(self, what, total, done=0):
        self.total, self.before = total, done

    def advance(self, count):
        self.made += count
        if self.made == self.most:
            raise KeyboardInterrupt


@pytest.mark.parametrize("options", [{"mode": "adjoint", "block": 2}, {"mode": "tangent", "block": 5}])
@pytest.mark.parametrize("window", [None, (3, 8)])
def test_every_step_of_several_blocks_is_counted_once(options, window):
    s = scenario.train()
    progress = Counting()
    solved(Session(s.run, s.task), "each", exact=True, steps=window, progress=progress, **options)
    assert progress.made == progress.total > s.run.steps
    assert progress.before == 0


@pytest.mark.parametrize("options", [{"mode": "adjoint", "block": 2}, {"mode": "tangent", "block": 5}])
@pytest.mark.parametrize("stopped", [3, 13])
def test_a_replay_that_goes_on_begins_at_what_was_done(tmp_path, options, stopped):
    s = scenario.train()
    file = Always(tmp_path, "question")
    first, second = Counting(stopped), Counting()
    with pytest.raises(KeyboardInterrupt):
        solved(Session(s.run, s.task), "each", samples=np.arange(10), exact=True, progress=first, file=file, **options)
    solved(Session(s.run, s.task), "each", samples=np.arange(10), exact=True, progress=second, file=file, **options)
    assert second.before == stopped - 1
    assert second.before + second.made == second.total == first.total


def test_the_package_runs_as_the_command():
    """`python -m trajrec` where the script is not on the path; usage lines can be typed as they stand."""
    command = [sys.executable, "-m", "trajrec"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("trajrec ")
    said = subprocess.run([*command, "replay", "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "python -m trajrec replay" in said.stdout
    wrong = subprocess.run([*command, "report", "no-such-run.h5"], capture_output=True, text=True, timeout=60)
    assert (wrong.returncode, "There is no run no-such-run.h5" in wrong.stderr) == (2, True)
