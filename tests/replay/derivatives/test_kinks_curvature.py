"""Curvature "kinks": what autograd takes for zero at a kink is spread over a width; nothing else changes."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import jvp, vjp

from tests.made.retrained import Training, cross_entropy
from trajrec.replay import contributions
from trajrec.replay.derivatives.kinks import SMOOTHED, bent
from trajrec.replay.derivatives.reverse import ReversePoint
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.session import Session


def net(activation=nn.ReLU):
    return lambda: nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 3))


def point(curvature):
    training = Training(net())
    session = Session(training.fit(), training.task())
    session.function.smoothing = curvature == "kinks"
    step = next(iter(session.trajectory.backwards(3)))
    return session, step


def products(curvature, directions):
    session, step = point(curvature)
    made = ReversePoint(session.function, session.train, step)
    return made.along(directions, hessian=True, gradient=True), session, step


def test_the_hessian_gains_the_kinks_own_curvature_and_nothing_else():
    directions = torch.randn(2, 59, dtype=torch.float64)
    plain, session, step = products("hessian", directions)
    with_kinks, _, _ = products("kinks", directions)
    own = gradient_of(session.function, session.train, step)
    torch.testing.assert_close(with_kinks.gradient, own, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(with_kinks.inner, plain.inner, rtol=1e-12, atol=1e-14)

    x, y = session.train.batch(step.ids)[:2]
    model = net()().double()
    names = [name for name, _ in model.named_parameters()]
    values = session.function.layout.split(step.before)

    def pre_activations(*flat):
        named = dict(zip(names, flat, strict=True))
        return x @ named["0.weight"].T + named["0.bias"]

    given = tuple(values[name] for name in names)
    z = pre_activations(*given)
    hidden = torch.relu(z).requires_grad_()
    losses = nn.functional.cross_entropy(hidden @ values["2.weight"].T + values["2.bias"], y)
    (slope,) = torch.autograd.grad(losses, hidden)
    h = 0.25 * z.std(correction=0)
    kernel = torch.sigmoid(z / h) * torch.sigmoid(-z / h) / h
    for k in range(2):
        direction = session.function.layout.split(directions[k])
        pushed = jvp(pre_activations, given, tuple(direction[name] for name in names))[1]
        pulled = vjp(pre_activations, *given)[1](slope * kernel * pushed)
        expected = session.function.layout.join(dict(zip(names, pulled, strict=True)))
        torch.testing.assert_close(with_kinks.hvp[k] - plain.hvp[k], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("function", SMOOTHED, ids=range(len(SMOOTHED)))
def test_values_and_slopes_stay_those_of_the_activation(function):
    z = torch.linspace(-8, 8, 41, dtype=torch.float64).requires_grad_()
    smoothed = SMOOTHED[function]
    torch.testing.assert_close(smoothed(z), function(z), rtol=0, atol=0)
    slopes = [torch.autograd.grad(f(z).sum(), z)[0] for f in (smoothed, function)]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-15)


def test_a_kink_has_a_mass_of_one():
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(bent(z).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), z)
    assert abs(float(torch.trapezoid(second, z.detach())) - 1) < 1e-2


def test_of_a_smooth_model_it_is_the_exact_form():
    training = Training(net(nn.Tanh))
    run = training.fit()
    found = [
        contributions(run, training.task(), targets="each", curvature=curvature).values
        for curvature in ("kinks", "hessian")
    ]
    np.testing.assert_allclose(*found, rtol=1e-10, atol=1e-13)


def test_both_directions_agree_and_it_is_an_approximation():
    training = Training(net(), loss=cross_entropy)
    run = training.fit()
    back, forth = (
        contributions(run, training.task(), targets="each", curvature="kinks", mode=mode)
        for mode in ("adjoint", "tangent")
    )
    np.testing.assert_allclose(back.values, forth.values, rtol=1e-8, atol=1e-11)
    exact = contributions(run, training.task(), targets="each")
    assert abs(back.values - exact.values).max() > 1e-3 * abs(exact.values).max()
    assert (back.exact, back.label) == (False, "approximation, not checked against exact")
