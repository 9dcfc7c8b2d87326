"""A real training for the kill tests: recorded until it is killed.

python -m tests.made.runfile_training RUN PROGRESS

PROGRESS: as in tests/made/runfile_trainer.py, the last step whose optimizer.step() returned.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec

SAMPLES = 96


def train(run: Path | None) -> Iterator[torch.Tensor]:
    """The weights [P] after step 0, 1, 2, ..., for ever; the same ones every time."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 500), nn.Dropout(0.1), nn.Tanh(), nn.Linear(500, 30))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(TensorDataset(torch.randn(SAMPLES, 8), torch.randint(30, (SAMPLES,))), 2, shuffle=True)
    watched = nullcontext() if run is None else trajrec.record(run, model=model, optimizer=optimizer, loader=loader)
    yield nn.utils.parameters_to_vector(model.parameters()).detach()
    with watched:
        while True:
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                yield nn.utils.parameters_to_vector(model.parameters()).detach()


def main(run: str, progress: str) -> None:
    with Path(progress).open("r+b") as file:
        done = np.frombuffer(mmap.mmap(file.fileno(), 8), np.int64)
    for t, _ in enumerate(train(Path(run))):
        done[0] = t if t else -1


if __name__ == "__main__":
    main(*sys.argv[1:])
