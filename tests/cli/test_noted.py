"""What was noted without being asked is shown, and used by the commands."""

import html
import json
import os

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from typer.testing import CliRunner

import trajrec
from trajrec.cli.main import app

TASK = """
import torch
from torch import nn
from torch.utils.data import TensorDataset
from trajrec import Task

x, y = torch.load("data.pt")
data = TensorDataset(x, y)
task = Task.supervised(lambda: nn.Linear(4, 3), data, data)
"""


def recorded(folder):
    torch.manual_seed(0)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    torch.save((x, y), folder / "data.pt")
    (folder / "task.py").write_text(TASK)
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    criterion = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]))
    with trajrec.record(folder / "run.h5", model=model, optimizer=optimizer):
        for batch, labels in DataLoader(TensorDataset(x, y), 4, shuffle=True):
            optimizer.zero_grad()
            criterion(model(batch), labels).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.25)
            optimizer.step()


def test_info_replay_and_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded(tmp_path)
    shown = CliRunner().invoke(app, ["info", "run.h5"]).output
    assert "weight=[1, 2, 0.5]" in shown
    assert "the norm to 0.25 (from step 1)" in shown
    assert str(tmp_path)[:20] in shown
    assert "TensorDataset of 12 samples, batches of 4" in " ".join(shown.split())

    done = CliRunner().invoke(app, ["replay", "run.h5", "--task", "task.py:task"])
    assert done.exit_code == 0, done.output
    notes = json.loads((tmp_path / "run-replay" / "replay.json").read_text())["notes"]
    assert any("clipped" in note for note in notes)
    assert any("seen to call, CrossEntropyLoss" in note for note in notes)
    shown = " ".join(done.output.split())
    assert "Gradients were clipped" in shown
    assert "seen to call" in shown
    code, _ = call("report", "run-replay", "--html", "run.html")
    page = (tmp_path / "run.html").read_text()
    assert code == 0
    assert all(html.escape(note) in page for note in notes)


LAZY = """
import torch
from torch import nn
from trajrec import Task

class Rows:
    classes = ["a", "b", "c"]

    def __len__(self):
        return 12

    def __getitem__(self, i):
        x, y = torch.load("data.pt")
        return x[i], y[i]

task = Task.supervised(lambda: nn.Linear(4, 3), Rows(), Rows())
"""


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run recorded in A, from where data.pt is seen, and the user in B."""
    for name in "AB":
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "A")
    recorded(tmp_path / "A")
    (tmp_path / "A" / "lazy.py").write_text(LAZY)
    monkeypatch.chdir(tmp_path / "B")
    return tmp_path / "B"


def call(*arguments):
    done = CliRunner().invoke(app, [*arguments])
    return done.exit_code, " ".join(done.output.split())


@pytest.mark.parametrize("task", ["task.py", "lazy.py"])
def test_relative_paths_of_the_task_are_seen_from_where_the_training_ran(task, moved):
    np.save(moved / "idx.npy", np.arange(3))
    options = ["--task", f"../A/{task}:task", "--samples", "idx.npy", "--targets", "idx.npy", "--out", "again"]
    code, said = call("replay", "../A/run.h5", *options)
    assert code == 0, said
    assert "where the training ran" in said
    assert "Written to again/" in said
    assert (moved / "again" / "replay.json").is_file()
    assert os.getcwd() == str(moved)
    code, said = call("verify", "../A/run.h5", "--task", f"../A/{task}:task")
    assert code == 0, said
    options = ["--task", f"../A/{task}:task", "--subsets", "2", "--out", "again"]
    code, said = call("validate", "../A/run.h5", *options)
    assert code == 0, said
    assert (moved / "again" / "validation.json").is_file()


def test_what_is_found_only_from_here_is_seen_from_here(moved):
    os.rename("../A/data.pt", "data.pt")
    code, said = call("replay", "../A/run.h5", "--task", "../A/task.py:task", "--out", "again")
    assert code == 0, said
    assert "where the training ran" not in said


def test_nobody_is_led_into_the_folder_that_a_strangers_run_names(moved, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(moved / "of-somebody-else"))
    code, said = call("replay", "../A/run.h5", "--task", "../A/task.py:task", "--out", "again")
    assert code != 0
    assert "The run was recorded in" in said
    assert "relative paths were seen from there" in said
