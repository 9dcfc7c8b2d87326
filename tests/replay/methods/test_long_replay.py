"""Long replays: killed and taken up again to the bit, cut into shards and merged, windows of steps, blocks, growth."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch

import trajrec
from tests.made import scenario, user_project
from tests.made.command import TRAJREC, call
from tests.made.replays import solved
from trajrec.errors import OutputExistsError, ReplayError
from trajrec.replay import contributions
from trajrec.replay.methods.resume import ResumeFile
from trajrec.replay.session import Session

SLOW_TASK = """
import time

import torch
import trajrec
from net import data, Net

def loss(model, batch):
    time.sleep(0.004)
    return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

task = trajrec.Task(Net, *data(), loss=loss)
"""


class StoppedError(Exception):
    """A replay is stopped at a step."""


class Stopping:
    """A progress that stops the replay after so many steps."""

    def __init__(self, after):
        self.left = after

    def start(self, what, total):
        pass

    def advance(self, count):
        self.left -= count
        if self.left <= 0:
            raise StoppedError


class Always(ResumeFile):
    """Is written at every step."""

    due = True


OPTIONS = {
    "exact": {"exact": True, "mode": "adjoint"},
    "blocks": {"exact": True, "mode": "adjoint", "block": 4},
    "free": {"exact": False, "mode": "adjoint", "certify": "sampled"},
    "epochs": {"exact": True, "by_epoch": True},
    "tangent": {"exact": True, "mode": "tangent", "block": 5},
}


@pytest.mark.parametrize("stopped", [1, 3, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_a_replay_that_was_stopped_goes_on_to_the_same_bits(tmp_path, name, stopped):
    s = scenario.train(groups=[{"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}])
    expected = solved(Session(s.run, s.task), "each", **OPTIONS[name])
    file = Always(tmp_path, "question")
    with pytest.raises(StoppedError):
        solved(Session(s.run, s.task), "each", file=file, progress=Stopping(stopped), **OPTIONS[name])
    found = solved(Session(s.run, s.task), "each", file=file, **OPTIONS[name])
    assert (found.values == expected.values).all()
    assert found.certificate == expected.certificate
    if expected.growth is not None:
        assert found.growth.tolist() == expected.growth.tolist()
    if expected.by_epoch is not None:
        assert (found.by_epoch == expected.by_epoch).all()


def test_progress_of_another_question_is_refused_and_nothing_is_unpickled(tmp_path):
    ResumeFile(tmp_path, "one").save({"a": 1}, {"b": np.arange(3)})
    values, arrays = ResumeFile(tmp_path, "one").load()
    assert (values, arrays["b"].tolist()) == ({"a": 1}, [0, 1, 2])
    with pytest.raises(OutputExistsError, match="progress of another question"):
        ResumeFile(tmp_path, "other").load()
    np.savez(tmp_path / "progress.npz", values=np.array([object()]))
    assert ResumeFile(tmp_path, "one").load() is None
    assert (tmp_path / "progress-damaged.npz").exists()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("long")
    user_project.write(folder)
    (folder / "slow.py").write_text(SLOW_TASK)
    done = call("record", "--out", "run.h5", "train.py", "--epochs", "16", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "NO_COLOR": "1",
    "TRAJREC_PROGRESS_SECONDS": "0",
    "TRAJREC_FORM": "forward",
}


def arguments(out, *options):
    return ["replay", "run.h5", "--task", "slow.py:task", "--targets", "each", "--out", out, *options]


def replay(folder, out, *options):
    return call(*arguments(out, *options), cwd=folder, env=ENVIRONMENT)


def table(folder):
    return pl.read_parquet(folder / "contributions.parquet")


@pytest.mark.parametrize(
    ("kill", "options"),
    [(signal.SIGKILL, ["--exact"]), pytest.param(signal.SIGINT, ["--mode", "tangent"], marks=pytest.mark.long)],
    ids=["kill", "int"],
)
def test_the_command_goes_on_after_kill_9_and_ctrl_c(project, kill, options):
    assert replay(project, f"whole-{kill.name}", *options).returncode == 0
    folder = project / f"cut-{kill.name}"
    command = [*TRAJREC, *arguments(folder.name, *options)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=project, env=ENVIRONMENT, **quiet)
    while not (folder / "progress.npz").exists():
        assert process.poll() is None, "the replay ended before it could be cut off"
        time.sleep(0.01)
    process.send_signal(kill)
    assert process.wait(30) == (-signal.SIGKILL if kill == signal.SIGKILL else 130)
    assert not (folder / "replay.json").exists()
    other = replay(project, folder.name, *options, "--top", "3", "--by-epoch")
    assert other.returncode == 2
    assert "another question" in other.stderr or "need mode" in other.stderr
    again = replay(project, folder.name, *options)
    assert again.returncode == 0, again.stderr
    assert "Going on from" in again.stderr
    assert table(folder).equals(table(project / f"whole-{kill.name}"))
    assert not (folder / "progress.npz").exists()
    certificates = [json.loads((project / f"{n}-{kill.name}" / "replay.json").read_text()) for n in ("cut", "whole")]
    assert certificates[0]["certificate"] == certificates[1]["certificate"]


def test_force_starts_anew(project):
    out = project / "anew"
    out.mkdir()
    ResumeFile(out, "other").save({}, {})
    assert replay(project, "anew", "--steps", "40:50").returncode == 2
    assert replay(project, "anew", "--steps", "40:50", "--force").returncode == 0


@pytest.mark.parametrize(
    "options", [["--exact"], ["--mode", "tangent", "--steps", "54:64"]], ids=["adjoint", "tangent"]
)
def test_shards_are_merged_into_the_whole(project, options):
    name = options[-1].replace(":", "-").strip("-")
    arguments = ["replay", "run.h5", "--targets", "each", *options]
    assert call(*arguments, "--out", f"{name}-all", cwd=project).returncode == 0
    for i in (1, 2, 3):
        done = call(*arguments, "--shard", f"{i}/3", "--out", f"{name}-{i}", cwd=project)
        assert done.returncode == 0, done.stderr
    done = call("merge", *(f"{name}-{i}" for i in (3, 1, 2)), "--out", f"{name}-merged", cwd=project)
    assert done.returncode == 0, done.stderr
    whole, merged = table(project / f"{name}-all"), table(project / f"{name}-merged")
    assert whole.select("sample", "target").equals(merged.select("sample", "target"))
    np.testing.assert_allclose(merged["contribution"], whole["contribution"], rtol=1e-4, atol=1e-9)
    assert call("report", f"{name}-merged", cwd=project).returncode == 0
    missing = call("merge", f"{name}-1", f"{name}-3", "--out", "m", cwd=project)
    assert missing.returncode == 2
    assert "Missing shard 2/3" in missing.stderr
    twice = call("merge", f"{name}-1", f"{name}-1", f"{name}-2", f"{name}-3", "--out", "m", cwd=project)
    assert twice.returncode == 2
    assert "Shard 1/3 is there more than once" in twice.stderr
    whole_one = call("merge", f"{name}-all", "--out", "m", cwd=project)
    assert whole_one.returncode == 2
    assert "not a shard" in whole_one.stderr


def test_shards_of_different_questions_are_not_merged(project):
    for i, steps in ((1, "1:30"), (2, "1:31")):
        options = ["--targets", "each", "--steps", steps, "--shard", f"{i}/2", "--out", f"q{i}"]
        assert call("replay", "run.h5", *options, cwd=project).returncode == 0
    done = call("merge", "q1", "q2", "--out", "q", cwd=project)
    assert done.returncode == 2
    assert "another question" in done.stderr


def test_options_that_make_no_sense_are_refused(project):
    for option, message in (
        (["--shard", "3/2"], "There is no shard 3/2"),
        (["--shard", "two"], "--shard takes I/N"),
        (["--shard", "1/2"], "Samples are cut with --mode tangent"),
        (["--steps", "0:5"], "are not steps of this run"),
        (["--steps", "5"], "--steps takes A:B"),
        (["--certify", "some"], 'certify must be "sampled" or "all"'),
    ):
        done = call("replay", "run.h5", "--out", "senseless", *option, cwd=project)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
@pytest.mark.parametrize("exact", [True, False])
def test_windows_of_steps_add_up_to_the_whole(mode, exact):
    s = scenario.train()
    whole = contributions(s.run, s.task, targets="each", exact=exact, mode=mode)
    parts = [
        contributions(s.run, s.task, targets="each", exact=exact, mode=mode, steps=w).values
        for w in ((1, 3), (4, 4), (5, 8))
    ]
    np.testing.assert_allclose(sum(parts), whole.values, rtol=1e-9, atol=1e-13)
    assert all(np.abs(part).max() > 1e-9 for part in parts)
    by_epoch = contributions(s.run, s.task, targets="each", exact=exact, by_epoch=True).by_epoch
    first = contributions(s.run, s.task, targets="each", exact=exact, mode=mode, steps=(1, 4)).values
    np.testing.assert_allclose(first, by_epoch[0], rtol=1e-9, atol=1e-13)
    with pytest.raises(ReplayError, match="Steps 3:99 are not steps"):
        contributions(s.run, s.task, steps=(3, 99))


def test_blocks_of_any_size_give_the_same():
    s = scenario.train(build=scenario.batch_norm)
    session = Session(s.run, s.task)
    for exact in (True, False):
        expected = s.reference(exact)
        for block in (1, 2, 5, 6):
            found = solved(session, "each", exact=exact, mode="adjoint", block=block).values
            assert abs(found - expected).max() < 1e-9 * abs(expected).max()


def test_growth_is_the_norm_of_the_adjoint():
    """Without momentum and Hessian the adjoint shrinks by the weight decay of each step, and by nothing else."""
    s = scenario.train(groups=[{"lr": 0.1, "weight_decay": 0.5}])
    c = contributions(s.run, s.task, exact=False, mode="adjoint")
    np.testing.assert_allclose(c.growth, 0.95 ** np.arange(1, s.run.steps + 1), rtol=1e-9)
    exact = contributions(s.run, s.task, exact=True).growth
    assert len(exact) == s.run.steps
    assert not np.allclose(exact, c.growth)


@pytest.mark.parametrize("epochs", [50, pytest.param(250, marks=pytest.mark.long)])
def test_a_long_run_in_single_precision_is_within_a_ten_thousandth_of_double(epochs):
    s = scenario.train(epochs=epochs, dtype=torch.float32, groups=[{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}])
    assert s.run.steps == 4 * epochs
    for exact in (True, False):
        single = contributions(s.run, s.task, targets="each", exact=exact).values
        double = contributions(s.run, s.task, targets="each", exact=exact, dtype="float64").values
        assert abs(single - double).max() < 1e-4 * abs(double).max()


def test_sampled_steps_are_those_that_were_checked():
    s = scenario.train(epochs=80)
    assert s.run.steps == 320
    sampled = contributions(s.run, s.task, exact=False, mode="adjoint")
    assert sampled.certificate.steps_checked == 1 + 320 // 10
    every = contributions(s.run, s.task, exact=False, mode="adjoint", certify="all")
    assert every.certificate.steps_checked == 320
    np.testing.assert_allclose(sampled.values, every.values, rtol=1e-10)
    nesterov = scenario.train(epochs=80, groups=[{"lr": 0.05, "momentum": 0.8, "nesterov": True}])
    found = contributions(nesterov.run, nesterov.task, exact=False, mode="adjoint")
    assert found.certificate.steps_checked >= 33


PEAK = """
import pathlib, sys, torch
import trajrec
from trajrec.replay import contributions
torch.set_num_threads(1)
sys.path.insert(0, ".")
from big import task
with trajrec.open(sys.argv[1]) as run:
    contributions(run, task, exact=True)
# Not getrusage: that would be the peak of the test run itself, which started this process.
print(next(line for line in pathlib.Path("/proc/self/status").open() if line.startswith("VmHWM")).split()[1])
"""

BIG = """
import torch, trajrec
from torch import nn

def net():
    return nn.Sequential(nn.Linear(64, 1000), nn.Tanh(), nn.Linear(1000, 64), nn.Tanh(), nn.Linear(64, 3))

torch.manual_seed(0)
train = torch.utils.data.TensorDataset(torch.randn(64, 64), torch.randint(0, 3, (64,)))
task = trajrec.Task.supervised(net, train, train)

def record(path, steps):
    torch.manual_seed(1)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = torch.utils.data.DataLoader(train, batch_size=16)
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader):
        for _ in range(steps // 4):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()

if __name__ == "__main__":
    record("short.h5", 120)
    record("long.h5", 480)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_peak_memory_does_not_grow_with_the_length_of_the_run(tmp_path):
    (tmp_path / "big.py").write_text(BIG)
    (tmp_path / "peak.py").write_text(PEAK)
    subprocess.run([sys.executable, "big.py"], cwd=tmp_path, check=True, timeout=120)
    assert (tmp_path / "long.h5").stat().st_size > 140e6  # more than any cache of the file
    peaks = []
    for name in ("short.h5", "long.h5"):
        command = [sys.executable, "peak.py", name]
        done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] < 1.1 * peaks[0]
    with trajrec.open(tmp_path / "long.h5") as run:
        assert run.steps == 480
