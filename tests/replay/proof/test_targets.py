"""The second proof of what contributions begin with: target losses whose gradient is not their own are refused."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made.retrained import Training, assert_exact, cross_entropy
from trajrec.errors import DerivativeError, TaskError
from trajrec.replay import contributions


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def by_item(model, batch):
    losses = cross_entropy(model, batch)
    return losses * (1 + losses.mean().item())


def by_numpy(model, batch):
    losses = cross_entropy(model, batch)
    return losses * torch.from_numpy(np.exp(losses.detach().numpy()))


def in_place(model, batch):
    scores = model(batch[0])
    with torch.no_grad():
        scores.mul_(1 + scores.square())
    return F.cross_entropy(scores, batch[1], reduction="none")


class EvalByItem(nn.Module):
    """Leaves the graph in eval mode alone."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        y = self.body(x)
        return y if self.training else y * (1 + y.square().mean().item())


WRONG = {
    "item": (Training(mlp, measure=by_item), r"by \.item\(\) in test_targets\.py, line \d+"),
    "numpy": (Training(mlp, measure=by_numpy), r"by \.numpy\(\) in test_targets\.py, line \d+"),
    "in place": (Training(mlp, measure=in_place), "changed in place"),
    "in eval mode alone": (Training(EvalByItem), r"by \.item\(\)"),
}


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
@pytest.mark.parametrize("name", WRONG)
def test_a_target_whose_gradient_is_not_its_own_is_refused_by_name(name, mode):
    training, named = WRONG[name]
    with pytest.raises(DerivativeError, match=f"The gradient of a target loss is not .*{named}"):
        contributions(training.fit(), training.task(), mode=mode, exact=True)


@pytest.mark.parametrize("exact", [True, False])
def test_a_target_without_a_derivative_is_refused(exact):
    def right(model, batch):
        return (model(batch[0]).argmax(1) == batch[1]).double()

    training = Training(mlp, measure=right)
    with pytest.raises(TaskError, match="The target loss has no derivative"):
        contributions(training.fit(), training.task(), exact=exact)


class EvalDetached(nn.Module):
    """Stops a gradient in eval mode alone."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        y = self.body(x)
        return y if self.training else y * (1 + y.detach().square())


class Sine(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx, x):
        return torch.sin(3 * x)

    @staticmethod
    def backward(ctx, bar):
        return bar


class EvalStraight(EvalDetached):
    """Goes through a function of the user's in eval mode alone."""

    def forward(self, x):
        y = self.body(x)
        return y if self.training else Sine.apply(y)


def hooked(model, batch):
    scores = model(batch[0])
    scores.register_hook(lambda bar: 2 * bar)
    return F.cross_entropy(scores, batch[1], reduction="none")


def of_pairs(model, batch):
    """Depends on what else is in the batch."""
    losses = cross_entropy(model, batch)
    return losses * (1 + losses.detach().mean())


RIGHT = {
    "a stop in eval mode alone": Training(EvalDetached),
    "a function in eval mode alone": Training(EvalStraight),
    "a hook": Training(mlp, measure=hooked),
}


@pytest.mark.parametrize("name", RIGHT)
def test_what_targets_hide_in_eval_mode_alone_is_seen_through(name):
    run = assert_exact(RIGHT[name])
    assert contributions(run, RIGHT[name].task(), exact=True).certificate.derivative.verdict == "proved"


@pytest.mark.parametrize("targets", ["each", "mean"])
def test_targets_that_compare_the_samples_of_a_batch_are_tried_in_their_batches(targets):
    training = Training(mlp, measure=of_pairs)
    found = contributions(training.fit(), training.task(), targets=targets, exact=True)
    assert found.certificate.derivative.verdict == "proved"


def test_a_target_that_fails_in_float64_is_not_proved_and_said():
    def measure(model, batch):
        assert batch[0].dtype == torch.float32
        return cross_entropy(model, batch)

    training = Training(mlp, measure=measure)
    patched = Training(mlp)
    found = contributions(patched.fit(), training.task(), exact=True, dtype="float32", allow_drift=True)
    assert found.certificate.derivative.verdict == "not proved"
    assert "a target loss cannot be computed in float64 (AssertionError" in found.certificate.derivative.sentence


def test_a_target_in_lower_precision_is_not_refused():
    def narrow(model, batch):
        return F.cross_entropy(model(batch[0]).type(torch.BFloat16Tensor), batch[1], reduction="none")

    training = Training(mlp, measure=narrow)
    found = contributions(training.fit(), training.task(), exact=True)
    assert found.certificate.derivative.verdict == "not proved"
    assert "a target loss computes in bfloat16 inside" in found.certificate.derivative.sentence
