"""What a recording holds, by option set, against stored digests: no change of the code may change a byte of it.

The training computes with dyadic numbers and a loss that is linear in the weights, so that every value of it is exact
and the same on every machine. Left out are times, and what names the machine, its versions and the run.

    python -m tests.runfile.test_recordings_kept        writes the digests anew, where a change of the format is meant
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import hdf5plugin  # noqa: F401  (registers the filter)
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec

STORED = Path(__file__).parents[1] / "golden" / "recordings.json"
VOLATILE = ("run_id", "created", "versions", "command", "threads", "folder")
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"compression": "none"},
    "zstd": {"compression": "zstd"},
    "keyframes": {"keep": 8},
    "every-4": {"compression": "none", "keyframe_every": 4},
    "stored-inputs": {"inputs": "store"},
    "budget": {"budget": "20MB"},
}


def exact(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Values of [-2, 2] in quarters."""
    return torch.from_numpy(np.random.default_rng(seed).integers(-8, 9, shape)).float() / 4


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 2, dtype=dtype), nn.Linear(4, 1, bias=False, dtype=dtype)
        self.frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.zeros(()))
        with torch.no_grad():
            for k, p in enumerate(self.parameters()):
                p.copy_(exact(tuple(p.shape), k))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.frozen.dtype)
        if self.training:
            self.seen += 1
        return self.inner(x).sum(1) + self.outer(x)[:, 0]


def seeded() -> None:
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def training(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer, DataLoader[Any]]:
    seeded()
    model = Net(dtype)
    groups = [{"params": model.inner.parameters()}, {"params": model.outer.parameters(), "lr": 0.25}]
    optimizer = torch.optim.SGD(groups, lr=0.125, momentum=0.5, dampening=0.25)
    loader = DataLoader(TensorDataset(exact((20, 4), 7), exact((20,), 8)), 4, shuffle=True)
    return model, optimizer, loader


def steps(loader: Any, epochs: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(epochs):
        yield from loader


def usual(path: Path, dtype: torch.dtype = torch.float32, epochs: int = 4, **options: Any) -> None:
    model, optimizer, loader = training(dtype)
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader, **options):
        for x, y in steps(loader, epochs):
            optimizer.zero_grad()
            (model(x) * y).mean().backward()
            optimizer.step()


def accumulating(path: Path) -> None:
    model, optimizer, loader = training()
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader):
        for k, (x, y) in enumerate(steps(loader, 4)):
            ((model(x) * y).mean() / 2).backward()
            if k % 2:
                optimizer.step()
                optimizer.zero_grad()


def by_hand(path: Path) -> None:
    model, optimizer, _ = training()
    x, y = exact((20, 4), 7), exact((20,), 8)
    with trajrec.record(path, model=model, optimizer=optimizer):
        for k in range(10):
            ids = [(3 * k + j) % 20 for j in range(4)]
            trajrec.set_batch(ids, weights=[0.5, 0.25, 0.125, 0.125])
            optimizer.zero_grad()
            (model(x[ids]) * y[ids] * torch.tensor([0.5, 0.25, 0.125, 0.125])).sum().backward()
            optimizer.step()


def two_optimizers(path: Path) -> None:
    model, _, loader = training()
    both = [torch.optim.SGD(model.inner.parameters(), lr=0.5), torch.optim.SGD(model.outer.parameters(), lr=0.25)]
    with trajrec.record(path, model=model, optimizer=both, loader=loader):
        for x, y in steps(loader, 3):
            model.zero_grad()
            (model(x) * y).mean().backward()
            for optimizer in both:
                optimizer.step()


def with_modes(path: Path) -> None:
    model, optimizer, loader = training()
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader):
        for k, (x, y) in enumerate(steps(loader, 3)):
            model.train(k != 4)
            optimizer.param_groups[0]["lr"] = 0.0 if k == 7 else 0.125
            model.outer.weight.requires_grad_(k < 9)
            optimizer.zero_grad()
            (model(x + torch.rand(()) * 0) * y).mean().backward()
            optimizer.step()


def resumed(path: Path) -> None:
    usual(path, epochs=2)
    model, optimizer, loader = training()
    for x, y in steps(loader, 2):
        optimizer.zero_grad()
        (model(x) * y).mean().backward()
        optimizer.step()
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader, resume=True):
        for x, y in steps(loader, 2):
            optimizer.zero_grad()
            (model(x) * y).mean().backward()
            optimizer.step()


RUNS: dict[str, Callable[[Path], None]] = {
    **{name: (lambda path, o=options: usual(path, **o)) for name, options in OPTIONS.items()},
    "float64": lambda path: usual(path, torch.float64),
    "accumulating": accumulating,
    "by-hand": by_hand,
    "two-optimizers": two_optimizers,
    "modes": with_modes,
    "resumed": resumed,
}


def digests(path: Path) -> dict[str, str]:
    """A digest of every dataset of a packed run, and of its spec."""
    found = {}
    with h5py.File(path) as file:
        for name, item in sorted(_items(file)):
            values = item[()]
            text = f"{item.dtype.str}{item.shape}".encode() + np.ascontiguousarray(values).tobytes()
            found[name] = hashlib.sha256(text).hexdigest()[:16]
        for name, value in file["spec"].attrs.items():
            if name not in VOLATILE:
                found[f"spec.{name}"] = hashlib.sha256(str(value).encode()).hexdigest()[:16]
    return found


def _items(file: h5py.File) -> list[tuple[str, h5py.Dataset]]:
    found: list[tuple[str, h5py.Dataset]] = []
    file.visititems(lambda name, item: found.append((name, item)) if isinstance(item, h5py.Dataset) else None)
    return [(name, item) for name, item in found if not name.endswith(("/time", "/record_crc32"))]


@pytest.mark.parametrize("name", RUNS)
def test_a_recording_holds_what_it_held(name, tmp_path, simulation):
    RUNS[name](tmp_path / "run.h5")
    assert digests(tmp_path / "run.h5") == json.loads(STORED.read_text())[name]


def main(folder: Path) -> None:
    found = {}
    for name, make in RUNS.items():
        make(folder / f"{name}.h5")
        found[name] = digests(folder / f"{name}.h5")
    STORED.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
