"""What was noted without being asked is shown, and used by the commands."""

import json

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

    done = CliRunner().invoke(app, ["replay", "run.h5", "--task", "task.py:task"])
    assert done.exit_code == 0, done.output
    notes = json.loads((tmp_path / "run-replay" / "replay.json").read_text())["notes"]
    assert any("clipped" in note for note in notes)
    assert any("seen to call, CrossEntropyLoss" in note for note in notes)

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    failed = CliRunner().invoke(app, ["replay", "../run.h5", "--task", "../task.py:task", "--out", "again"])
    assert failed.exit_code != 0
    said = " ".join(failed.output.split())
    assert "The run was recorded in" in said
    assert "relative paths were seen from there" in said
