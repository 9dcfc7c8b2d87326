"""Small real trainings to be recorded in memory, with what the naive reference needs to repeat them."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from tests.made import reference
from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.sink import MemorySink
from trajrec.task.task import Task

OPTIONS = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")


@dataclass
class Scenario:
    """A recorded run, its task, and the same training as the reference sees it."""

    run: MemoryRun
    task: Task
    model: nn.Module
    start: dict
    data: tuple
    plan: reference.Plan
    test: tuple

    @property
    def n(self):
        return len(self.data[0])

    def losses(self, f, batch):
        return nn.functional.cross_entropy(f(batch[0]), batch[1], reduction="none")

    def target(self, params):
        """The test losses [M] of weights and running statistics, in eval mode."""
        self.model.eval()
        try:
            with reference.Statistics(self.model).in_place():
                return self.losses(lambda x: functional_call(self.model, params, (x,)), self.test)
        finally:
            self.model.train()

    def reference(self, exact=True):
        params = {k: v.clone().requires_grad_() for k, v in self.start.items()}
        values = reference.contributions(
            self.model, params, self.data, self.losses, self.plan, self.n, self.target, hessian=exact
        )
        return values.numpy()

    def value(self, eps):
        """The test losses [M] after training with weights eps [N]."""
        params = {k: v.clone().requires_grad_() for k, v in self.start.items()}
        trained = reference.train(self.model, params, self.data, self.losses, self.plan, eps)
        return self.target(trained).detach()


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def batch_norm():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 3))


def convolution():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.Softplus(), nn.Flatten(), nn.Linear(27, 3)
    )


def train(
    build=mlp,
    groups=None,
    epochs=2,
    n=17,
    batch_size=5,
    sampler=None,
    schedule=None,
    dtype=torch.float64,
    seed=0,
):
    """Trains and records. `groups` is a list of option dicts: biases go to the second if there are two."""
    torch.manual_seed(seed)
    groups = groups or [{"lr": 0.1, "momentum": 0.9}]
    data = (torch.randn(n, 4, dtype=dtype), torch.randint(0, 3, (n,)))
    test = (torch.randn(6, 4, dtype=dtype), torch.randint(0, 3, (6,)))
    model = build().to(dtype)
    start = {k: v.detach().clone() for k, v in model.named_parameters()}
    names = [list(start)] if len(groups) == 1 else _weights_and_biases(start)
    parameters = dict(model.named_parameters())
    optimizer = torch.optim.SGD(
        [{"params": [parameters[k] for k in part], **o} for part, o in zip(names, groups, strict=True)], lr=1.0
    )
    train_set = TensorDataset(*data)
    loader = DataLoader(train_set, batch_size, shuffle=sampler is None, sampler=sampler)
    scheduler = schedule and torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    sink, states, options = MemorySink(interval=4), [], []
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                states.append(torch.get_rng_state())
                nn.functional.cross_entropy(model(x), y).backward()
                options.append([{k: g[k] for k in OPTIONS} for g in optimizer.param_groups])
                optimizer.step()
                if scheduler:
                    scheduler.step()
            model.eval()
            nn.functional.cross_entropy(model(test[0]), test[1])
            model.train()
    run = MemoryRun(sink)
    plan = reference.Plan([torch.as_tensor(r.ids) for r in sink.records[1:]], options, names)
    plan.dropout_states = states if build is dropout else []
    task = Task.supervised(build, train_set, TensorDataset(*test))
    return Scenario(run, task, model, start, data, plan, test)


def _weights_and_biases(start):
    return [[k for k in start if "weight" in k], [k for k in start if "bias" in k]]
