"""The Gauss-Newton form against its definition, made of dense Jacobians and Hessians by torch.func."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

from tests.made import loops
from tests.made.loops import Loop, Objective, cut
from trajrec.errors import ReplayError
from trajrec.replay import contributions
from trajrec.replay.derivatives.gauss_newton import GaussNewton
from trajrec.replay.losses.targets import choose_targets
from trajrec.replay.session import Session
from trajrec.replay.step import make_step, vector_of


def batch_norm():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 3))


def rectified():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def twice(model, batch):
    """Two calls of the model in one loss."""
    return F.cross_entropy(model(batch[0]) + 0.5 * model(-batch[0]).square(), batch[1], reduction="none")


def norms(model):
    return 0.1 * sum(p.pow(4).sum() for p in model.parameters())


LOOPS = {
    "plain": Loop(),
    "rectified": Loop(build=rectified),
    "batch norm": Loop(build=batch_norm),
    "two calls": Loop(loss=twice, objective=Objective(twice)),
    "penalty": Loop(objective=lambda model, *rest: Objective()(model, *rest) + norms(model), task={"penalty": norms}),
    "micro-batches": Loop(pieces=cut(2), objective=lambda *a: Objective()(*a) / 2, build=batch_norm),
}


def at_a_step(made, t=3):
    session = Session(made.run, made.task)
    before = vector_of(made.run.row(t - 1), t - 1, session.layout)
    return session, make_step(made.run, t, before, before)


def dense(loop, made, session, step):
    """J^T H J from the definition; outputs of both calls one after the other."""
    calls = (lambda x: x, lambda x: -x) if loop.loss is twice else (lambda x: x,)
    data = [torch.stack(column) for column in zip(*made.task.train, strict=True)]
    model, total = session.function.model, 0
    shares = session.function.objective(step.before, session.train, step).shares
    for part in step.parts:
        ids = torch.as_tensor(step.ids[part.span])
        x, y = data[0][ids], data[1][ids]

        def outputs(w, x=x):
            named = session.layout.split(w)
            return torch.stack([functional_call(model, named, (call(x),)) for call in calls])

        def value(z, y=y, share=shares[part.span]):
            z = z[0] + 0.5 * z[1].square() if len(z) == 2 else z[0]
            return torch.dot(share, F.cross_entropy(z, y, reduction="none"))

        jacobian = jacrev(outputs)(step.before).reshape(-1, len(step.before))
        z = outputs(step.before)
        total = total + jacobian.T @ hessian(value)(z).reshape(z.numel(), z.numel()) @ jacobian
    if "penalty" in loop.task:
        total = total + torch.diag(1.2 * step.before.square())
    return total


@pytest.mark.parametrize("name", LOOPS)
def test_it_is_what_it_is_defined_as(name):
    loop = LOOPS[name]
    made = loops.train(loop)
    session, step = at_a_step(made)
    expected = dense(loop, made, session, step)
    found = GaussNewton(session.function, session.train, step).products(
        torch.eye(len(step.before), dtype=torch.float64)
    )
    np.testing.assert_allclose(found.numpy(), expected.detach().numpy(), rtol=1e-9, atol=1e-12)


def test_it_is_positive_semi_definite_and_the_hessian_is_not():
    made = loops.train(Loop())
    session, step = at_a_step(made, t=1)
    identity = torch.eye(len(step.before), dtype=torch.float64)
    product = GaussNewton(session.function, session.train, step).products(identity)
    assert torch.linalg.eigvalsh(product).min() > -1e-12

    def value(w):
        return session.function.objective(w, session.train, step).total

    exact = torch.autograd.functional.hessian(value, step.before)
    assert torch.linalg.eigvalsh(exact).min() < -1e-3


@pytest.mark.parametrize("name", ["plain", "batch norm", "penalty", "micro-batches"])
def test_both_directions_give_the_recurrence_with_dense_matrices(name):
    """Momentum 0.8, weight decay 0.01, learning rate 0.2, as `loops.sgd` has them."""
    loop = LOOPS[name]
    made = loops.train(loop)
    session, _ = at_a_step(made)
    sample, n = 5, loops.N
    d = v = torch.zeros(session.layout.size, dtype=torch.float64)
    for t in range(1, made.run.steps + 1):
        session, step = at_a_step(made, t)
        own = torch.zeros_like(d)
        for place in np.flatnonzero(step.ids == sample):
            w = step.before.clone().requires_grad_()
            objective = session.function.objective(w, session.train, step)
            own += n * objective.shares[place] * torch.autograd.grad(objective.losses[place], w)[0]
        v = 0.8 * v + dense(loop, made, session, step) @ d + own + 0.01 * d
        d = d - 0.2 * v
    gradients = session.target_gradients(choose_targets("each", session.test))[0]
    expected = -(gradients @ d).detach().numpy() / n
    for mode in ("adjoint", "tangent"):
        c = contributions(made.run, made.task, targets="each", samples=[sample], curvature="ggn", mode=mode)
        np.testing.assert_allclose(c.values[0], expected, rtol=1e-8, atol=1e-12)
        assert (c.exact, c.curvature) == (False, "ggn")


def test_contradictory_questions_are_refused():
    made = loops.train(Loop())
    with pytest.raises(ReplayError, match='curvature "hessian" is the exact form'):
        contributions(made.run, made.task, exact=False, curvature="hessian")
    with pytest.raises(ReplayError, match="curvature must be one of hessian, ggn, kinks, none"):
        contributions(made.run, made.task, curvature="fisher")
