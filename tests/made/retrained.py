"""Plain float64 trainings that can be recorded, and repeated with the weights of samples moved."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.replay import contributions
from trajrec.sink import MemorySink
from trajrec.task.task import Task

N, LR, MOMENTUM = 12, 0.1, 0.8


class Items(torch.utils.data.Dataset):
    """Items (x, y, number); x may be a list of tensors of several shapes."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.y[i], i


def vectors(n, seed):
    g = torch.Generator().manual_seed(seed)
    return Items(torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g))


def words(n, seed):
    g = torch.Generator().manual_seed(seed)
    return Items(torch.randint(0, 7, (n, 4), generator=g), torch.randint(0, 3, (n,), generator=g))


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)


@dataclass
class Training:
    """A plain loop that can be recorded, and repeated with the weights of samples moved."""

    build: Callable
    loss: Callable = cross_entropy
    data: Items = field(default_factory=lambda: vectors(N, 1))
    test: Items = field(default_factory=lambda: vectors(5, 2))
    measure: Callable | None = None
    batches: list | None = None  # of ids; by default shuffled ones of 4
    begin: Callable = lambda model: model  # what the script does before it builds the optimizer

    def fit(self, eps=None, **options):
        """The test losses [M] at the end; where eps [N] is left out, the recording."""
        torch.manual_seed(0)
        model = self.begin(self.build().double())
        optimizer = sgd(model)
        loader = (
            DataLoader(self.data, 4, shuffle=True)
            if self.batches is None
            else DataLoader(self.data, batch_sampler=self.batches)
        )
        sink = MemorySink(interval=3)
        if eps is None:
            with Recorder(sink, model=model, optimizer=optimizer, loader=loader, **options):
                self._loop(model, optimizer, loader, torch.zeros(N).double())
            return MemoryRun(sink)
        self._loop(model, optimizer, loader, eps)
        model.eval()
        singles = DataLoader(self.test, 1)
        return torch.cat([(self.measure or self.loss)(model, batch).detach() for batch in singles])

    def _loop(self, model, optimizer, loader, eps):
        for _ in range(2):
            for batch in loader:
                optimizer.zero_grad()
                (self.loss(model, batch) * (1 + N * eps[batch[-1]])).mean().backward()
                optimizer.step()

    def task(self, **options):
        options = {"loss": self.loss, "measure": self.measure} | options
        return Task(options.pop("model", self.build), self.data, self.test, **options)

    def truth(self, samples, h=1e-5):
        """[S, M] by retraining."""
        rows = []
        for sample in samples:
            eps = torch.zeros(N).double()
            eps[sample] = h
            rows.append(-(self.fit(eps) - self.fit(-eps)) / (2 * h) / N)
        return torch.stack(rows).numpy()

    def free_truth(self, run):
        """[N, M] without the Hessian: the recurrence of SGD with the gradients of single samples, in their batches."""
        model = self.build().double()
        weights = list(model.parameters())
        d, r = torch.zeros(2, N, len(run.row(0)), dtype=torch.float64)
        for t in range(1, run.steps + 1):
            nn.utils.vector_to_parameters(torch.from_numpy(run.row(t - 1).copy()), weights)
            ids = run.sample_ids(t).tolist()
            batch = torch.utils.data.default_collate([self.data[i] for i in ids])
            k = torch.zeros_like(d)
            for place, i in enumerate(ids):
                k[i] += N / len(ids) * gradient(self.loss(model, batch)[place], weights)
            r = MOMENTUM * r + k
            d = d - LR * r
        nn.utils.vector_to_parameters(torch.from_numpy(run.row(run.steps).copy()), weights)
        last = run.keyframe(run.keyframe_steps[-1]).arrays
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.from_numpy(np.array(last[f"buffers/{name}"])))
        model.eval()
        singles = [(self.measure or self.loss)(model, batch) for batch in DataLoader(self.test, 1)]
        gradients = torch.stack([gradient(loss.sum(), weights) for loss in singles])
        return (-(d @ gradients.T) / N).numpy()


def gradient(loss, weights):
    return torch.cat(
        [g.reshape(-1) for g in torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True)]
    )


def distance(found, truth):
    return np.abs(found - truth).max() / np.abs(truth).max()


def assert_exact(training, samples=(0, 5, 11), tolerance=1e-6, h=1e-5, **options):
    run, truth = training.fit(), training.truth(samples, h)
    for mode in ("adjoint", "tangent"):
        c = contributions(
            run, training.task(**options), targets="each", samples=np.array(samples), exact=True, mode=mode
        )
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert distance(c.values, truth) < tolerance
    return run


def assert_free(training, run):
    truth = training.free_truth(run)
    for mode, targets in (("adjoint", "each"), ("adjoint", "mean"), ("tangent", "each")):
        c = contributions(run, training.task(), targets=targets, curvature="none", mode=mode)
        assert distance(c.values, truth if targets == "each" else truth.mean(1, keepdims=True)) < 1e-9
