"""Kinks of a loss: found in what is written below autograd, and only where the weights come to it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made import loops
from tests.made.loops import Loop
from trajrec.replay.session import Session


def network(activation):
    return lambda: nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 4)), activation(), nn.Flatten(), nn.LazyLinear(3))


class Sizes(nn.Sequential):
    """A network whose rows are brought to length 1."""

    def forward(self, x):
        return F.normalize(super().forward(x))


class Gate(nn.Sequential):
    def forward(self, x):
        y = super().forward(x)
        return y * (y > 0)


class Clamped(nn.Sequential):
    """Only the data are cut, which the weights never come to."""

    def forward(self, x):
        return super().forward(x.clamp(-1, 1).abs())


ACTIVATIONS = {
    nn.ReLU: "relu",
    lambda: nn.ReLU(inplace=True): "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.RReLU: "rrelu",
    nn.ReLU6: "hardtanh",
    nn.Hardswish: "hardswish",
    nn.Hardsigmoid: "hardsigmoid",
    nn.SELU: "elu",
    lambda: nn.MaxPool1d(2): "max_pool2d",
    lambda: nn.AdaptiveMaxPool1d(2): "adaptive_max_pool2d",
}
SMOOTH = nn.Tanh, nn.GELU, nn.SiLU, nn.Softplus, nn.ELU, nn.Softsign, nn.Sigmoid, nn.Dropout, nn.LogSigmoid, nn.Identity
LOSSES = {
    "l1_loss": "abs",
    "smooth_l1_loss": "smooth_l1_loss",
    "huber_loss": "huber_loss",
    "mse_loss": None,
    "binary_cross_entropy_with_logits": None,
}


def found(loop):
    """What a session of a recorded training says."""
    made = loops.train(loop)
    return Session(made.run, made.task).function.kinks


def small(build):
    """A training of few steps; lazy layers have been through a pass, as in a user's script."""

    def built():
        model = build()
        model(torch.zeros(2, 4))
        return model

    return Loop(build=built, epochs=1, task={})


@pytest.mark.parametrize(("activation", "name"), ACTIVATIONS.items(), ids=range(len(ACTIVATIONS)))
def test_activations_and_poolings_with_kinks_are_named(activation, name):
    assert found(small(network(activation))) == (name,)


@pytest.mark.parametrize("activation", SMOOTH)
def test_smooth_networks_have_none(activation):
    assert found(small(network(activation))) == ()


@pytest.mark.parametrize(("loss", "name"), LOSSES.items())
def test_losses_have_kinks_too(loss, name):
    def per_sample(model, batch):
        outputs = model(batch[0])
        return getattr(F, loss)(outputs, torch.full_like(outputs, 0.5), reduction="none").mean(1)

    loop = Loop(epochs=1, loss=per_sample, objective=loops.Objective(per_sample))
    assert found(loop) == (() if name is None else (name,))


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (lambda: Sizes(nn.Linear(4, 3)), ()),
        (lambda: Clamped(nn.Linear(4, 3)), ()),
        (lambda: Gate(nn.Linear(4, 3)), ("gt",)),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), ()),
        (lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), ()),
    ],
)
def test_what_is_written_by_hand(build, names):
    assert found(Loop(build=build, epochs=1)) == names


def penalty(model):
    return 0.01 * sum(p.abs().sum() for p in model.parameters())


def test_a_penalty_counts():
    def penalised(model, batch, eps):
        return loops.Objective()(model, batch, eps) + penalty(model)

    assert found(Loop(epochs=1, objective=penalised, task={"penalty": penalty})) == ("abs",)


def test_a_loss_that_cannot_be_watched_is_not_called_smooth():
    """It counts how often it is called, and fails the first time."""
    calls = []

    def moody(model, batch):
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("not now")
        return loops.per_sample(model, batch)

    made = loops.train(Loop(epochs=1))
    made.task.loss = moody
    assert Session(made.run, made.task).function.kinks is None
