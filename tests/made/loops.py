"""Training loops as users write them, each with one feature, in float64 and with sample weights 1 + N eps.

With eps = 0 a loop is recorded; with other eps it is the function that finite differences are taken of. Nothing here
uses the project's mathematics: `per_sample` and `weighted` are what a user would write.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink
from trajrec.task.seeding import Seeded
from trajrec.task.task import Task

N, CLASSES = 18, 3


def mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def per_sample(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8, weight_decay=0.01)


class Objective:
    """The loop's scalar loss of one micro-batch, with the loss of sample i multiplied by 1 + N eps_i."""

    def __init__(self, loss=per_sample):
        self.loss = loss

    def __call__(self, model, batch, eps):
        return (self.loss(model, batch) * (1 + N * eps[batch[-1]])).mean()


def nothing(*_):
    pass


@dataclass
class Loop:
    """One training loop.

    Attributes:
        build: () -> model.
        optimizer: model -> optimizer, or a list of them.
        objective: (model, batch, eps) -> scalar that backward() is called on.
        pieces: batch -> micro-batches.
        before_step: (model, optimizer) after backward() and before step().
        after_step: (model, optimizer, t) after every step.
        after_epoch: (model, optimizer, epoch, loss).
        task: further arguments of the Task.
        loss: per-sample loss of the Task.
        every: loader batches a step (gradient accumulation); an epoch's last step may have fewer.
        batch_size: of the loader.
        epochs: how many.
        setup: (model, optimizer) before the loop, returns a dict of things the hooks may want.
    """

    build: Callable = mlp
    optimizer: Callable = sgd
    objective: Callable = field(default_factory=Objective)
    pieces: Callable = lambda batch: [batch]
    before_step: Callable = nothing
    after_step: Callable = nothing
    after_epoch: Callable = nothing
    task: dict = field(default_factory=dict)
    loss: Callable = per_sample
    every: int = 1
    batch_size: int = 6
    epochs: int = 3
    wrap: Callable = lambda model: model
    data: Callable = lambda x, y: (x, y)
    step: Callable = lambda optimizer: optimizer.step()
    backward: Callable = lambda loss: loss.backward()
    set: Callable = lambda data: data
    test: Callable | None = None
    dtype: torch.dtype = torch.float64
    device: str = "cpu"


@dataclass
class Trained:
    """What a training left: test losses, the recording, its task."""

    values: torch.Tensor
    run: MemoryRun | None
    task: Task
    model: nn.Module


def train(loop, eps=None, interval=4, **options):
    """Trains; records if eps is None, with these options of the recorder."""
    recorded = eps is None
    eps = (torch.zeros(N, dtype=torch.float64) if eps is None else eps).to(loop.device, loop.dtype)
    torch.manual_seed(0)
    x, y = torch.randn(N, 4, dtype=loop.dtype), torch.randint(0, CLASSES, (N,))
    tx, ty = torch.randn(5, 4, dtype=loop.dtype), torch.randint(0, CLASSES, (5,))
    data = loop.set(TensorDataset(*loop.data(x, y), torch.arange(N)))
    test = TensorDataset(*loop.data(tx, ty), torch.arange(5))
    model = loop.build().to(loop.device, loop.dtype)
    used = loop.wrap(model)
    optimizer = loop.optimizer(model)
    loader = DataLoader(data, loop.batch_size, shuffle=True)
    sink = MemorySink(interval)
    if recorded:
        with Recorder(sink, model=used, optimizer=optimizer, loader=loader, **options):
            _fit(loop, model, used, optimizer, loader, eps)
    else:
        _fit(loop, model, used, optimizer, loader, eps)
    model.eval()
    with torch.no_grad():
        values = (loop.test or loop.loss)(model, [part.to(loop.device) for part in next(iter(DataLoader(test, 5)))])
    model.train()
    task = Task(loop.build, data, test, loss=loop.loss, measure=loop.test, **loop.task)
    return Trained(values.detach().cpu(), MemoryRun(sink) if recorded else None, task, model)


def _fit(loop, model, used, optimizer, loader, eps):
    t = 0
    optimizers = optimizer if isinstance(optimizer, list) else [optimizer]
    for epoch in range(loop.epochs):
        if isinstance(loader.dataset, Seeded):
            loader.dataset.set_epoch(epoch)
        for number, batch in enumerate(loader, 1):
            for piece in loop.pieces([part.to(loop.device) for part in batch]):
                total = loop.objective(used, piece, eps)
                loop.backward(total)
            if number % loop.every and number < len(loader):
                continue
            loop.before_step(model, optimizer)
            for one in optimizers:
                loop.step(one)
            for one in optimizers:
                one.zero_grad()
            t += 1
            loop.after_step(model, optimizer, t)
        loop.after_epoch(model, optimizer, epoch, total.item())


# -- pieces of loops ---------------------------------------------------------------------------------------------------


def cut(*edges):
    """Micro-batches between these places of a batch."""
    return lambda batch: [[v[a:b] for v in batch] for a, b in zip((0, *edges), (*edges, None), strict=True)]
