"""Running statistics are moved by the training, and targets in eval mode depend on them."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made.retrained import N, Training, assert_exact, cross_entropy, distance
from trajrec.replay import contributions
from trajrec.replay.methods.adjoint import Adjoint


def norm(**options):
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, **options), nn.Tanh(), nn.Linear(6, 3))


def deep():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=0.3, affine=False),
        nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


def instances(**options):
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2),
        nn.InstanceNorm1d(3, track_running_stats=True, affine=True, **options), nn.Tanh(), nn.Flatten(),
        nn.Linear(9, 3),
    )  # fmt: skip


def pictures():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(27, 3),
    )  # fmt: skip


def two_views(model, batch):
    return cross_entropy(model, batch) + F.mse_loss(model(batch[0] + 0.3), model(batch[0]), reduction="none").mean(1)


def detached_view(model, batch):
    return cross_entropy(model, batch) - F.cosine_similarity(model(batch[0]), model(batch[0] + 0.1).detach())


@dataclass
class Freezing(Training):
    """The normalisation is put into eval mode half-way, as in fine-tuning."""

    def _loop(self, model, optimizer, loader, eps):
        for epoch in range(4):
            model.train()
            if epoch >= 2:
                model[1].eval()
            for batch in loader:
                optimizer.zero_grad()
                (self.loss(model, batch) * (1 + N * eps[batch[-1]])).mean().backward()
                optimizer.step()


@dataclass
class Accumulating(Training):
    """Two micro-batches a step: the statistics move twice."""

    def _loop(self, model, optimizer, loader, eps):
        for _ in range(2):
            for number, batch in enumerate(loader):
                ((self.loss(model, batch) * (1 + N * eps[batch[-1]])).mean() / 2).backward()
                if number % 2:
                    optimizer.step()
                    optimizer.zero_grad()


def still():
    model = norm()()
    model[0].requires_grad_(False)
    return model


SIX = [[k, k + 1] for k in range(0, N, 2)]
TRAININGS = {
    "a momentum of .1": Training(norm()),
    "a cumulative mean": Training(norm(momentum=None)),
    "several": Training(deep),
    "of instances": Training(instances),
    "of the inputs": Training(lambda: nn.Sequential(nn.BatchNorm1d(4), norm()())),
    "of what no weight moves": Training(still),
    "of instances, without a momentum": Training(lambda: instances(momentum=None)),
    "of pictures": Training(pictures),
    "of two views": Training(norm(), loss=two_views, measure=cross_entropy),
    "of a detached view": Training(norm(), loss=detached_view, measure=cross_entropy),
    "frozen half-way": Freezing(norm()),
    "a cumulative mean, frozen": Freezing(norm(momentum=None)),
    "micro-batches": Accumulating(norm(), batches=SIX),
    "cumulative over micro-batches": Accumulating(norm(momentum=None), batches=SIX),
    "before an operator without a second derivative": Training(
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)),
        loss=lambda model, batch: F.multi_margin_loss(model(batch[0]), batch[1], reduction="none"),
    ),
}


@pytest.mark.parametrize("name", TRAININGS)
def test_statistics_that_the_training_moved_are_differentiated(name):
    assert_exact(TRAININGS[name], tolerance=1e-5 if "micro" in name else 1e-6, h=1e-6)


def test_leaving_the_way_through_the_statistics_out_shows(monkeypatch):
    training = TRAININGS["a momentum of .1"]
    run, truth = training.fit(), training.truth((0, 5, 11))
    begin = Adjoint.begin
    monkeypatch.setattr(Adjoint, "begin", lambda *given: begin(*given[:4], None))
    found = contributions(
        run, training.task(), targets="each", samples=np.array([0, 5, 11]), exact=True, mode="adjoint"
    )
    assert distance(found.values, truth) > 1e-3


def test_several_targets_at_once_carry_their_own():
    training = TRAININGS["several"]
    run = training.fit()
    together = contributions(run, training.task(), targets="each", exact=True).values
    apart = [contributions(run, training.task(), targets=np.array([j]), exact=True).values for j in range(5)]
    np.testing.assert_allclose(together, np.hstack(apart), rtol=1e-9, atol=1e-12)


def test_a_norm_that_never_moves_has_no_statistics_to_carry():
    def frozen():
        model = norm()()
        model[1].eval()
        model[1].train = lambda mode=True: model[1]
        return model

    training = Training(frozen)
    run = assert_exact(training)
    assert run.spec.eval_modules == ("1",)
    assert torch.is_tensor(training.build()[1].running_mean)
