"""Plain float64 trainings of batches of any form: what the loop makes of a batch and its samples' weights is given."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils.data import DataLoader

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.replay import contributions
from trajrec.sink import MemorySink

SAMPLES = (0, 5, 11)


class Listed(torch.utils.data.Dataset):
    """Items as they are in a list."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


@dataclass
class Told:
    """A training.

    Attributes:
        total: (model, batch, weights) -> the scalar of a batch, with weights [N] of samples by id.
        measure: (model, item) -> the test loss of one item, for `truth`.
    """

    build: Callable
    data: Listed
    test: Listed
    total: Callable
    measure: Callable
    loader: dict = field(default_factory=lambda: {"batch_size": 4, "shuffle": True})

    def fit(self, weights=None):
        """The trained model in eval mode; the recording where weights are left out."""
        torch.manual_seed(0)
        model = self.build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.8)
        loader, sink = DataLoader(self.data, **self.loader), MemorySink(interval=3)
        if weights is None:
            with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
                self._loop(model, optimizer, loader, torch.ones(len(self.data)).double())
            return MemoryRun(sink)
        self._loop(model, optimizer, loader, weights)
        return model.eval()

    def _loop(self, model, optimizer, loader, weights):
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                self.total(model, batch, weights).backward()
                optimizer.step()

    def losses(self, weights):
        """The test losses after a training, [M, ...]."""
        model = self.fit(weights)
        with torch.no_grad():
            return torch.stack([self.measure(model, item) for item in self.test.items])

    def truth(self, samples=SAMPLES, h=1e-5, of=lambda losses: losses):
        """[S, M] contributions of samples to what is made of the test losses, by retraining."""
        rows, n = [], len(self.data)
        for sample in samples:
            step = torch.zeros(n).double()
            step[sample] = n * h
            rows.append(-(of(self.losses(1 + step)) - of(self.losses(1 - step))) / (2 * h) / n)
        return torch.stack(rows).numpy()


def assert_equal(training, task, truth=None, targets="each", tolerance=1e-6, run=None):
    """Exact contributions are those of retraining, both ways; returns those backwards."""
    run, truth = run or training.fit(), training.truth() if truth is None else truth
    found = [contributions(run, task, targets=targets, samples=SAMPLES, mode=mode) for mode in ("tangent", "adjoint")]
    for c in found:
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert c.values.shape == truth.shape
        assert abs(c.values - truth).max() < tolerance * abs(truth).max()
    return found[-1]
