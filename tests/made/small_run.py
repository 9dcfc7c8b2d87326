"""A real training of some steps, recorded into a file, with a Task file beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec

TASK = '''"""A Task that describes tests.made.small_run.record's training, and counts how often it is imported."""

from pathlib import Path

from tests.made.small_run import task as made

task = made()
marker = Path(__file__).with_name("imported.txt")
marker.write_text(marker.read_text() + "x" if marker.exists() else "x")


def factory():
    return task
'''


def model() -> nn.Module:
    """Seven weights and a buffer, with dropout, so that generator states are recorded."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.Dropout(0.2), nn.Linear(2, 2, bias=False))


def other_model() -> nn.Module:
    """The same with other weights."""
    net = model()
    net.load_state_dict({name: value + 1 for name, value in net.state_dict().items()})
    return net


def data() -> TensorDataset:
    """Twelve samples of two classes."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(12, 2, generator=generator)
    return TensorDataset(x, (x[:, 0] > 0).long())


def task() -> trajrec.Task:
    """The Task of `record`'s training."""
    return trajrec.Task.supervised(model, data(), data())


def record(
    path: Path,
    epochs: int = 2,
    build: Callable[[], nn.Module] = model,
    at_end: Callable[[], None] = lambda: None,
    recorder: Callable[..., Any] = trajrec.record,
    **options: Any,
) -> None:
    """Trains, four samples a step, and records; `at_end` is called before the recording is finished."""
    net = build()
    steps = torch.optim.Adam(net.parameters(), lr=0.01)
    loader = DataLoader(data(), 4, shuffle=True)
    with recorder(path, model=net, optimizer=steps, loader=loader, **options):
        for _ in range(epochs):
            for x, y in loader:
                steps.zero_grad()
                nn.functional.cross_entropy(net(x), y).backward()
                steps.step()
        at_end()
