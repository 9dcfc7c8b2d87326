"""start() and stop(): a recording over the cells of a notebook, however the interpreter ends."""

import signal
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.errors import RecordingError

SCRIPT = """
import os, signal, torch, trajrec
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
model = nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=.1)
loader = DataLoader(TensorDataset(torch.randn(12, 2)), 4)
trajrec.start("run.h5", keep={keep!r})
for x, in loader:
    optimizer.zero_grad()
    model(x).mean().backward()
    optimizer.step()
{end}
"""


def train():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for (x,) in DataLoader(TensorDataset(torch.randn(12, 2)), 4):
        optimizer.zero_grad()
        model(x).mean().backward()
        optimizer.step()


def test_what_is_between_them_is_recorded(tmp_path):
    train()
    for name in ("a.h5", "b.h5"):
        recorder = trajrec.start(tmp_path / name)
        with pytest.raises(RecordingError, match=r"is on already: end it by trajrec.stop"):
            trajrec.start(tmp_path / "c.h5")
        train()
        summary = trajrec.stop()
        train()
        assert (summary.steps, summary.path, recorder.problem) == (3, tmp_path / name, None)
        with trajrec.open(tmp_path / name) as run:
            assert (run.steps, run.state) == (3, "complete")
    with pytest.raises(RecordingError, match="No recording is on"):
        trajrec.stop()
    assert not (tmp_path / "c.h5").exists()


def test_a_start_that_fails_is_none(tmp_path):
    (tmp_path / "run.h5").write_text("something else")
    with pytest.raises(trajrec.TrajrecError):
        trajrec.start(tmp_path / "run.h5")
    with pytest.raises(RecordingError, match="No recording is on"):
        trajrec.stop()


@pytest.mark.parametrize("keep", ["steps", 2])
@pytest.mark.parametrize(
    ("end", "code", "name", "state"),
    [
        ("pass", 0, "run.h5", "recovered"),
        ("raise SystemExit(3)", 3, "run.h5", "recovered"),
        ("1 / 0", 1, "run.h5", "recovered"),
        ("trajrec.stop()", 0, "run.h5", "complete"),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL, "run.h5.rec", "recording"),
    ],
)
def test_it_is_finished_when_the_interpreter_ends(end, code, name, state, keep, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT.format(end=end, keep=keep))
    done = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    assert ("ZeroDivisionError" if code == 1 else "") in done.stderr
    assert (tmp_path / name).exists()
    with trajrec.open(tmp_path / "run.h5") as run:
        assert (run.steps, run.state) == (3, state)
        assert [len(run.sample_ids(t)) for t in (1, 2, 3)] == [4, 4, 4]
