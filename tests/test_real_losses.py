"""Losses and models that people really have: operators with one derivative only, shapes that differ, lazy layers,
weights that the forward pass changes, losses that take derivatives themselves.

The truth is central differences of whole retrainings; without the Hessian, where there is nothing to train again, the
recurrence for SGD with naive gradients of single samples.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from tests.memory_run import MemoryRun
from trajrec.errors import DataMismatchError, DerivativeError, TaskError
from trajrec.recorder import Recorder
from trajrec.replay import contributions
from trajrec.sink import MemorySink
from trajrec.task import Task

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

    def fit(self, eps=None, **options):
        """The test losses [M] at the end; where eps [N] is left out, the recording."""
        torch.manual_seed(0)
        model = self.build().double()
        first_pass = self.loss(model, [torch.stack([v]) if torch.is_tensor(v) else v for v in self.data[0]][:2]) if (
            any(nn.parameter.is_lazy(p) for p in model.parameters())
        ) else None  # fmt: skip
        del first_pass
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
        return Task(self.build, self.data, self.test, **{"loss": self.loss, "measure": self.measure} | options)

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
                k[i] += N / len(ids) * _flat(torch.autograd.grad(self.loss(model, batch)[place], weights))
            r = MOMENTUM * r + k
            d = d - LR * r
        nn.utils.vector_to_parameters(torch.from_numpy(run.row(run.steps).copy()), weights)
        last = run.keyframe(run.keyframe_steps[-1]).arrays
        for name, buffer in model.named_buffers():
            buffer.copy_(torch.from_numpy(np.array(last[f"buffers/{name}"])))
        model.eval()
        singles = [(self.measure or self.loss)(model, batch) for batch in DataLoader(self.test, 1)]
        gradients = torch.stack([_flat(torch.autograd.grad(loss.sum(), weights)) for loss in singles])
        return (-(d @ gradients.T) / N).numpy()


def _flat(gradients):
    return torch.cat([g.reshape(-1) for g in gradients])


def distance(found, truth):
    return np.abs(found - truth).max() / np.abs(truth).max()


def assert_exact(training, samples=(0, 5, 11), **options):
    run, truth = training.fit(), training.truth(samples)
    for mode in ("adjoint", "tangent"):
        c = contributions(run, training.task(**options), "each", samples=np.array(samples), exact=True, mode=mode)
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert distance(c.values, truth) < 1e-6
    return run


def assert_free(training, run):
    truth = training.free_truth(run)
    for mode, targets in (("adjoint", "each"), ("adjoint", "mean"), ("tangent", "each")):
        c = contributions(run, training.task(), targets, curvature="none", mode=mode)
        assert distance(c.values, truth if targets == "each" else truth.mean(1, keepdims=True)) < 1e-9


# -- operators without a second derivative -----------------------------------------------------------------------------


class Words(nn.Module):
    """A bag of words, summed in one of the ways that there are."""

    def __init__(self, mode):
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(7, 5, mode=mode), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.words(x)))


class Prototypes(nn.Module):
    """The classes are points, the scores distances to them."""

    def __init__(self):
        super().__init__()
        self.body, self.points = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return -torch.cdist(torch.tanh(self.body(x)), self.points)


class OnceOnly(torch.autograd.Function):
    """A square whose backward pass is not to be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class InNumpy(OnceOnly):
    """The same in numpy."""

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(2 * ctx.saved_tensors[0].numpy() * grad.numpy())


class Squared(nn.Module):
    """A layer made of one of these functions."""

    def __init__(self, function):
        super().__init__()
        self.body, self.out, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, x):
        return self.out(self.function.apply(self.body(x)))


def ctc(model, batch):
    logs = model(batch[0]).view(-1, 6, 4).transpose(0, 1).log_softmax(-1)
    lengths = torch.full((2, len(batch[0])), 6)
    return F.ctc_loss(logs, torch.stack([batch[1] + 1, 3 - batch[1]], 1), lengths[0], lengths[1] * 0 + 2, reduction="none")


def margins(model, batch):
    return F.multi_margin_loss(model(batch[0]), batch[1], reduction="none")


def gate(*between):
    return lambda: nn.Sequential(nn.Linear(4, 6), *(make() for make in between), nn.Hardsigmoid(), nn.Linear(6, 3))


def bags(mode):
    return Training(lambda: Words(mode), data=words(N, 1), test=words(5, 2))


OPERATORS = {
    "mean of words": (bags("mean"), r"EmbeddingBag \(embedding_bag; module 'words'\)"),
    "sum of words": (bags("sum"), "EmbeddingBag"),
    "largest of words": (bags("max"), "EmbeddingBag"),
    "hard sigmoid": (Training(gate()), r"Hardsigmoid \(module '1'\)"),
    "hard sigmoid of a norm": (Training(gate(lambda: nn.BatchNorm1d(6))), "Hardsigmoid"),
    "distances": (Training(Prototypes), "cdist"),
    "CTC loss": (Training(lambda: nn.Linear(4, 24), loss=ctc), r"CTCLoss \(ctc_loss\)"),
    "margins": (Training(lambda: nn.Linear(4, 3), loss=margins), "MultiMarginLoss"),
    "once differentiable": (Training(lambda: Squared(OnceOnly)), "@once_differentiable"),
    "in numpy": (Training(lambda: Squared(InNumpy)), "numpy"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_without_the_hessian_operators_need_one_derivative(name):
    training, operator = OPERATORS[name]
    run = training.fit()
    assert_free(training, run)
    for curvature, mode in (("hessian", "adjoint"), ("hessian", "tangent"), ("ggn", "adjoint")):
        with pytest.raises(DerivativeError, match=operator) as refusal:
            contributions(run, training.task(), "each", curvature=curvature, mode=mode)
        assert "--curvature none" in str(refusal.value)
        assert refusal.value.exit_code == 3
