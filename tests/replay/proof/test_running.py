"""Running statistics that the training moved otherwise than the Task does are refused where targets need them."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.made.retrained import N, Training, cross_entropy, vectors
from trajrec.errors import DerivativeError
from trajrec.replay import contributions


def norm():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def validated(model, epoch, t):
    with torch.no_grad():
        model(vectors(7, 9).x)


def validated_once(model, epoch, t):
    if t == 4:
        validated(model, epoch, t)


def momentum(model, epoch, t):
    model[1].momentum = 0.2 / (epoch + 1)


def reset(model, epoch, t):
    if t == 3:
        model[1].reset_running_stats()


def by_hand(model, epoch, t):
    if t == 3:
        model[1].running_mean.mul_(0.5)


@dataclass
class Meddling(Training):
    """The loop does something of its own after every step."""

    after: object = None

    def _loop(self, model, optimizer, loader, eps):
        t = 0
        for epoch in range(2):
            for batch in loader:
                optimizer.zero_grad()
                (self.loss(model, batch) * (1 + N * eps[batch[-1]])).mean().backward()
                optimizer.step()
                t += 1
                self.after(model, epoch, t)


@pytest.mark.parametrize("after", [validated, validated_once, momentum, reset, by_hand])
@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_statistics_that_the_loop_moves_otherwise_are_refused(after, mode):
    training = Meddling(norm, after=after)
    with pytest.raises(DerivativeError, match="running statistics of BatchNorm1d '1', and up to step"):
        contributions(training.fit(), training.task(), exact=True, mode=mode)


def test_targets_that_do_not_use_them_are_answered():
    def in_train_mode(model, batch):
        model.train()
        return cross_entropy(model, batch)

    training = Meddling(norm, measure=in_train_mode, after=validated)
    assert contributions(training.fit(), training.task(), exact=True).certificate.derivative.verdict == "proved"


class Checkpointed(nn.Module):
    """A normalisation that goes through every batch once more going backwards."""

    def __init__(self):
        super().__init__()
        self.body, self.out = norm()[:3], nn.Linear(6, 3)

    def forward(self, x):
        return self.out(checkpoint(self.body, x, use_reentrant=False) if self.training else self.body(x))


def test_gradient_checkpointing_moves_them_twice():
    training = Training(Checkpointed)
    with pytest.raises(DerivativeError, match="gradient checkpointing"):
        contributions(training.fit(), training.task(), exact=True)


class Aside(nn.Module):
    """Statistics of values that have left the graph, and are of no use to the training."""

    def __init__(self, leave):
        super().__init__()
        self.body, self.norm, self.out, self.leave = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), leave

    def forward(self, x):
        x = self.body(x)
        if not self.training:
            return self.out(torch.tanh(self.norm(x)))
        self.norm(self.leave(x))
        return self.out(torch.tanh(x))


@pytest.mark.parametrize(
    "leave", [lambda x: torch.tensor(x.tolist()).double(), lambda x: torch.from_numpy(2 * x.detach().numpy())]
)
def test_statistics_of_values_that_left_the_graph_are_refused(leave):
    training = Training(lambda: Aside(leave))
    with pytest.raises(DerivativeError, match="has left the graph"):
        contributions(training.fit(), training.task(), exact=True)
