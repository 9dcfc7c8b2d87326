"""kill -9 at random moments: of the trainer, of the writer, of both. No committed step may be lost.

The long test makes 50 trials of each kind; the default run a handful. The random moments are drawn afresh each time.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import trajrec
from tests.made.runfile_cases import MadeUpRun, assert_same_inputs, assert_same_keyframe, assert_same_step, spec
from tests.made.runfile_training import SAMPLES, train
from trajrec.runfile.folder import Folder
from trajrec.runfile.lock import holder
from trajrec.runfile.reader.verify import verify
from trajrec.runfile.recovery import pack
from trajrec.runfile.trainer.sink import RunFileSink

VALUES = 20_000
MOST = 400  # steps before a kill
ROOT = Path(__file__).parents[2]


class Trial:
    """A trainer process and its writer, recording."""

    def __init__(self, folder: Path, *options: str, module: str = "tests.made.runfile_trainer") -> None:
        self.run = folder / "run.h5"
        self.folder = Folder.of(self.run)
        self.progress = folder / "progress"
        self.progress.write_bytes(np.int64(-1).tobytes())
        command = [sys.executable, "-m", module, self.run, self.progress, *options]
        self.trainer = subprocess.Popen(command, cwd=ROOT)
        self._until(lambda: self.done >= 0)

    @property
    def done(self) -> int:
        return int(np.fromfile(self.progress, np.int64)[0])

    @property
    def writer(self) -> int:
        """Process id of the writer: the trainer's only child."""
        children = Path(f"/proc/{self.trainer.pid}/task/{self.trainer.pid}/children").read_text().split()
        return int(children[0])

    def kill(self, *pids: int) -> None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    def end(self) -> None:
        self.trainer.kill()
        self.trainer.wait()

    def wait_for_orphan(self) -> None:
        self._until(lambda: holder(self.folder.lock) is None)

    def get_on(self, most: int) -> None:
        """Waits until a random number of steps more is recorded, and for a part of one."""
        last = self.done + random.randrange(most)
        self._until(lambda: self.done >= last)
        time.sleep(random.uniform(0, 0.003))

    def _until(self, condition) -> None:
        """Waits as long as it takes, unless the trainer fails."""
        while not condition():
            assert self.trainer.poll() is None or self.trainer.returncode == -signal.SIGKILL
            time.sleep(0.001)


def assert_nothing_is_lost(path: Path, done: int, keep: str = "steps", inputs: str = "digest") -> int:
    made = MadeUpRun(spec(VALUES, rng=100, inputs=inputs))
    with trajrec.open(path) as run:
        assert done <= run.steps <= done + 1
        assert run.state in ("recovered", "recording")
        if keep == "steps":
            for t, row in run.walk(0, run.steps):
                assert row.tobytes() == made.row(t).tobytes()
        for t in range(1, run.steps + 1):
            assert_same_step(run, made.record(t))
        assert_same_inputs(run, made, range(1, run.steps + 1))
        for t in run.keyframe_steps:
            assert_same_keyframe(run.keyframe(t), made.keyframe(t, with_weights=keep != "steps"))
        return run.steps


def kill_trainer(folder: Path, keep: str = "steps", inputs: str = "digest") -> None:
    trial = Trial(folder, str(VALUES), keep, inputs)
    trial.get_on(MOST)
    trial.kill(trial.trainer.pid)
    trial.trainer.wait()
    if random.random() < 0.5:
        trial.wait_for_orphan()
    assert_nothing_is_lost(trial.run, trial.done, keep, inputs)
    trial.wait_for_orphan()
    steps = assert_nothing_is_lost(trial.run, trial.done, keep, inputs)
    assert verify(trial.run) == []
    assert pack(trial.run) == trial.run
    assert assert_nothing_is_lost(trial.run, trial.done, keep, inputs) == steps
    assert [p.name for p in folder.iterdir() if p.name.startswith("run")] == ["run.h5"]


def kill_both(folder: Path, keep: str = "steps", inputs: str = "digest") -> None:
    trial = Trial(folder, str(VALUES), keep, inputs)
    trial.get_on(MOST)
    pids = [trial.trainer.pid, trial.writer]
    random.shuffle(pids)
    trial.kill(*pids)
    trial.trainer.wait()
    trial.wait_for_orphan()
    steps = assert_nothing_is_lost(trial.run, trial.done, keep, inputs)
    assert verify(trial.run) == []
    pack(trial.run)
    assert assert_nothing_is_lost(trial.run, trial.done, keep, inputs) == steps
    assert verify(trial.run) == []


def kill_writer(folder: Path) -> None:
    made = MadeUpRun(spec(VALUES, rng=100))
    sink = RunFileSink(folder / "run.h5")
    sink.open(made.spec)
    last, t = 400, 0
    deaths = sorted(random.sample(range(last), 2))
    while t <= last:
        made.feed(sink, t, first=t)
        if t in deaths:
            time.sleep(random.uniform(0, 0.2))
            sink.writer.kill()
        t += 1
    summary = sink.close(complete=True)
    assert summary.steps == last
    with trajrec.open(folder / "run.h5") as run:
        assert run.state == "complete"
        assert run.steps == last
        assert all(row.tobytes() == made.row(t).tobytes() for t, row in run.walk(0, last))
    assert verify(folder / "run.h5") == []


def kill_training(folder: Path) -> None:
    """A training is killed, its writer too or not, and what is recorded are the weights of the same training."""
    trial = Trial(folder, module="tests.made.runfile_training")
    trial.get_on(MOST)
    trial.kill(*random.choice([[trial.trainer.pid], [trial.writer, trial.trainer.pid]]))
    trial.trainer.wait()
    trial.wait_for_orphan()
    with trajrec.open(trial.run) as run:
        assert trial.done <= run.steps <= trial.done + 1
        for (t, row), weights in zip(run.walk(0, run.steps), train(None), strict=False):
            assert row.tobytes() == weights.numpy().tobytes(), t
        batches = [run.sample_ids(t) for t in range(1, run.steps + 1)]
    samples = np.concatenate(batches)
    for start in range(0, len(samples) - SAMPLES + 1, SAMPLES):
        assert sorted(samples[start : start + SAMPLES]) == list(range(SAMPLES))
    assert verify(trial.run) == []


KINDS = {"trainer": kill_trainer, "both": kill_both, "writer": kill_writer, "training": kill_training}


@pytest.mark.parametrize("kind", KINDS)
def test_a_handful_of_kills(tmp_path, kind):
    KINDS[kind](tmp_path)


def test_kills_between_keyframes(tmp_path):
    kill_both(tmp_path, keep="10")


@pytest.mark.parametrize(("kill", "keep"), [(kill_trainer, "steps"), (kill_both, "10")])
def test_kills_while_inputs_are_stored(tmp_path, kill, keep):
    kill(tmp_path, keep, inputs="store")


@pytest.mark.long
@pytest.mark.parametrize("trial", range(50))
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_kills(tmp_path, kind, trial):
    KINDS[kind](tmp_path)
