"""Trainings that hide a part of their loss from its gradient: what they did is what is differentiated."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made.memory_run import MemoryRun
from tests.made.retrained import Training, assert_exact, cross_entropy, distance
from trajrec.replay import contributions
from trajrec.replay.derivatives.forward import ForwardPoint
from trajrec.replay.derivatives.reverse import ReversePoint
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.session import Session


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


# -- stop-gradients ----------------------------------------------------------------------------------------------------


def focal(model, batch):
    losses = cross_entropy(model, batch)
    return ((1 - torch.exp(-losses)) ** 2).detach() * losses


def importance(model, batch):
    losses = cross_entropy(model, batch)
    return losses * torch.softmax(torch.detach(losses), 0) * len(losses)


def data(model, batch):
    losses = cross_entropy(model, batch)
    return (1 + losses.data**2) * losses


def branch(model, batch):
    far = model(batch[0] + 0.1)
    return cross_entropy(model, batch) - F.cosine_similarity(model(batch[0]), far.detach())


def without_grad(model, batch):
    with torch.no_grad():
        target = (model(batch[0] + 0.2) * 1.5).softmax(-1)
        target.mul_(0.5)
        target[0] += 0.1
        target = target.clamp(min=0.12)
    return F.cross_entropy(model(batch[0]), target, reduction="none")


@torch.no_grad()
def teacher(model, x):
    return model(x - 0.1).softmax(1)


def decorated(model, batch):
    return F.kl_div(model(batch[0]).log_softmax(1), teacher(model, batch[0]), reduction="none").sum(1)


def gumbel(model, batch):
    chosen = F.gumbel_softmax(model(batch[0]), tau=0.7, hard=True)
    return ((chosen - F.one_hot(batch[1], 3)) ** 2).sum(1)


def cut_in_place(model, batch):
    losses = cross_entropy(model, batch)
    weights = losses * 1.5
    weights.detach_()
    return losses * (1 + weights**2)


def changed_in_place(model, batch):
    scores = model(batch[0])
    weights = (scores * 2).detach()
    weights.sub_(1)
    weights.clamp_(-1, 1)
    weights[:, 0] = 0
    return F.cross_entropy(scores, batch[1], reduction="none") * (1 + weights.square().sum(1))


def copied(model, batch):
    scores = model(batch[0])
    weights = copy.deepcopy(scores.detach()).requires_grad_(False)
    return F.cross_entropy(scores, batch[1], reduction="none") * weights.exp().mean(1)


def adversarial(model, batch):
    """Virtual adversarial training: a direction by a derivative that is a constant to what is made of it."""
    x = batch[0]
    d = torch.full_like(x, 0.1).requires_grad_()
    target = model(x).softmax(1).detach()
    (g,) = torch.autograd.grad(F.kl_div(model(x + d).log_softmax(1), target, reduction="sum"), d)
    moved = model(x + 0.5 * g / g.norm(dim=1, keepdim=True)).log_softmax(1)
    return cross_entropy(model, batch) + F.kl_div(moved, target, reduction="none").sum(1)


class Rounded(nn.Linear):
    """Weights that are rounded in training, with a straight-through estimator."""

    def forward(self, x):
        weight = self.weight
        if self.training:
            weight = weight + (torch.sin(4 * weight) - weight).detach()
        return F.linear(x, weight, self.bias)


class Momentum(nn.Module):
    """A running centre of the outputs that is given a new value in a no_grad block, for later."""

    def __init__(self):
        super().__init__()
        self.body = mlp()
        self.register_buffer("centre", torch.zeros(3))

    def forward(self, x):
        y = self.body(x)
        with torch.no_grad():
            self.centre = 0.9 * self.centre + 0.1 * y.mean(0)
        return y


STOPS = {
    "a focal weight": Training(mlp, loss=focal, measure=cross_entropy),
    "importance weights": Training(mlp, loss=importance, measure=cross_entropy),
    ".data": Training(mlp, loss=data, measure=cross_entropy),
    "a branch": Training(mlp, loss=branch, measure=cross_entropy),
    "a no_grad block": Training(mlp, loss=without_grad, measure=cross_entropy),
    "a no_grad function": Training(mlp, loss=decorated, measure=cross_entropy),
    "detach_()": Training(mlp, loss=cut_in_place, measure=cross_entropy),
    "changed in place": Training(mlp, loss=changed_in_place, measure=cross_entropy),
    "copied": Training(mlp, loss=copied, measure=cross_entropy),
    "an adversarial direction": Training(mlp, loss=adversarial, measure=cross_entropy),
    "gumbel softmax": Training(mlp, loss=gumbel, measure=cross_entropy),
    "straight through": Training(lambda: nn.Sequential(Rounded(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    "through dropout": Training(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 3)),
        loss=focal,
        measure=cross_entropy,
    ),
    "in the target, too": Training(mlp, loss=focal),
    "a buffer given a new value": Training(Momentum),
}


@pytest.mark.parametrize("name", STOPS)
def test_stop_gradients_are_seen_through_in_both_directions(name):
    run = assert_exact(STOPS[name])
    proof = contributions(run, STOPS[name].task(), exact=True).certificate.derivative
    assert proof.verdict == "proved"


def test_a_stop_gradient_is_proved_because_it_is_seen_through(monkeypatch):
    """Without the stops the second proof finds autograd of autograd wrong, in both directions."""
    training = STOPS["a focal weight"]
    run = training.fit()
    monkeypatch.setattr("trajrec.replay.derivatives.through._Seeing.__torch_function__", plain)
    session = Session(run, training.task())
    assert session.function.seen.stops
    session.prove_derivative(forwards=True)
    assert session.derivative.verdict == "by differences"


def plain(self, func, types, args=(), kwargs=None):
    return func(*args, **(kwargs or {}))


# -- backward hooks and functions of the user's ------------------------------------------------------------------------


class Reversal(torch.autograd.Function):
    """Gradient reversal."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, bar):
        return -0.7 * bar


class Domains(nn.Module):
    """Classes, and domains that the features are not to tell."""

    def __init__(self):
        super().__init__()
        self.features, self.classes, self.domains = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 2)

    def forward(self, x):
        features = torch.tanh(self.features(x))
        return self.classes(features), self.domains(Reversal.apply(features))


def domains(model, batch):
    classes, found = model(batch[0])
    losses = F.cross_entropy(classes, batch[1], reduction="none")
    return losses + F.cross_entropy(found, (batch[1] > 1).long(), reduction="none")


def classes(model, batch):
    return F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")


class Surrogate(torch.autograd.Function):
    """A function with another's slope, as spiking networks have it; saves its input."""

    @staticmethod
    def forward(ctx, x, scale):
        ctx.save_for_backward(x)
        return torch.sin(scale * x)

    @staticmethod
    def backward(ctx, bar):
        (x,) = ctx.saved_tensors
        return bar / (1 + x**2), None


class SetUp(torch.autograd.Function):
    """The same in the newer style, and of two results."""

    @staticmethod
    def forward(x):
        return torch.sin(2 * x), x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, bar, _):
        return bar * torch.exp(-(ctx.saved_tensors[0] ** 2))


class Noise(torch.autograd.Function):
    """A forward pass that draws random numbers, straight through."""

    @staticmethod
    def forward(ctx, x):
        return x * (1 + 0.1 * torch.randn_like(x))

    @staticmethod
    def backward(ctx, bar):
        return bar


class Spiking(nn.Module):
    """A layer that goes through such a function while it is trained."""

    def __init__(self, function):
        super().__init__()
        self.body, self.out, self.function = nn.Linear(4, 5), nn.Linear(5, 3), function

    def forward(self, x):
        x = self.body(x)
        return self.out(self.function(x) if self.training else torch.tanh(x))


def hooked_module():
    model = mlp()
    model[1].register_full_backward_hook(lambda module, inner, outer: (inner[0] * 0.5,))
    model[2].register_full_backward_pre_hook(lambda module, outer: (outer[0] * 1.5,))
    return model


def hooked_value(model, batch):
    scores = model(batch[0])
    scores.register_hook(lambda bar: torch.tanh(8 * bar) / 8 + 0.3 * bar)
    return F.cross_entropy(scores, batch[1], reduction="none")


OWN = {
    "gradient reversal": Training(Domains, loss=domains, measure=classes),
    "a surrogate's slope": Training(lambda: Spiking(lambda x: Surrogate.apply(x, 1.5))),
    "the newer style": Training(lambda: Spiking(lambda x: SetUp.apply(x)[0])),
    "random numbers": Training(lambda: Spiking(Noise.apply)),
    "hooks of modules": Training(hooked_module, measure=cross_entropy),
    "a hook of a value": Training(mlp, loss=hooked_value, measure=cross_entropy),
}


@pytest.mark.parametrize("name", OWN)
def test_own_backward_passes_act_in_the_gradient_and_not_in_its_derivative(name):
    run = assert_exact(OWN[name])
    proof = contributions(run, OWN[name].task(), exact=True).certificate.derivative
    assert proof.verdict == "proved"


def test_the_models_hooks_and_torchs_functions_are_left_as_they_were():
    training = OWN["hooks of modules"]
    session = Session(training.fit(), training.task())
    hooks = [dict(m._backward_hooks) for m in session.function.model.modules()]
    session.prove_derivative(forwards=False)
    assert [dict(m._backward_hooks) for m in session.function.model.modules()] == hooks
    assert "apply" not in vars(torch.autograd.function._SingleLevelFunction)


def test_a_buffer_that_is_given_a_new_value_keeps_no_graph():
    training = STOPS["a buffer given a new value"]
    session = Session(training.fit(), training.task())
    contributions(training.fit(), training.task(), exact=True)
    step = next(iter(session.trajectory.backwards(3)))
    ReversePoint(session.function, session.train, step)
    assert not any(buffer.requires_grad for buffer in session.function.model.buffers())


@pytest.mark.parametrize("name", ["a focal weight", ".data", "through dropout"])
def test_the_forward_form_gives_the_same_and_the_trainings_own_gradient(name):
    training = STOPS[name]
    session = Session(training.fit(), training.task())
    step = next(iter(session.trajectory.backwards(3)))
    d = torch.randn(2, session.layout.size, dtype=torch.float64)
    forms = [form(session.function, session.train, step) for form in (ReversePoint, ForwardPoint)]
    reverse, forward = (form.along(d, hessian=True, gradient=True) for form in forms)
    own = gradient_of(session.function, session.train, step)
    for found in (reverse, forward):
        torch.testing.assert_close(found.gradient, own, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(forward.hvp, reverse.hvp, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(forward.inner, reverse.inner, rtol=1e-9, atol=1e-12)


def test_of_an_unsymmetric_derivative_forwards_and_backwards_are_transposed():
    training = STOPS["a branch"]
    session = Session(training.fit(), training.task())
    step = next(iter(session.trajectory.backwards(3)))
    a, d = torch.randn(2, 1, session.layout.size, dtype=torch.float64)
    nothing = torch.zeros(1, len(step.ids), dtype=torch.float64)
    pulled = ReversePoint(session.function, session.train, step).along(a, hessian=True, gradient=False).hvp
    pushed = ReversePoint(session.function, session.train, step).forced(d, nothing)
    plainly = ReversePoint(session.function, session.train, step).along(d, hessian=True, gradient=False).hvp
    torch.testing.assert_close((a * pushed).sum(), (pulled * d).sum(), rtol=1e-10, atol=1e-12)
    assert float((pushed - plainly).norm() / pushed.norm()) > 0.01


def test_in_single_precision_a_stop_is_seen_through_as_well():
    training = STOPS["a focal weight"]
    run, truth = training.fit(), training.truth((0, 5, 11))
    assert isinstance(run, MemoryRun)
    for mode in ("adjoint", "tangent"):
        c = contributions(
            run, training.task(), targets="each", samples=np.array([0, 5, 11]), exact=True, mode=mode, dtype="float32"
        )
        assert distance(c.values, truth) < 1e-4
