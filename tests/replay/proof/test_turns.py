"""The certificate that checks a part of the weights at each step: what it proves, and that no fault gets past it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from tests.made import scenario
from trajrec.errors import DriftError
from trajrec.replay import contributions
from trajrec.replay.derivatives.choice import FORMS, Forms
from trajrec.replay.methods.contributions import solve
from trajrec.replay.proof.turns import portions_of
from trajrec.replay.session import Session


def deep():
    """Nine large tensors and ten small ones, of which none is in every layer's way."""
    layers = [m for _ in range(8) for m in (nn.Linear(20, 20), nn.Tanh())]
    return nn.Sequential(nn.Linear(4, 20), *layers, nn.Linear(20, 3, bias=False))


def one_epoch(dtype=torch.float32):
    return scenario.train(deep, epochs=1, n=48, batch_size=4, dtype=dtype, groups=[{"lr": 0.1, "momentum": 0.5}])


def test_every_weight_has_its_turn_within_eight_steps_and_the_small_ones_always():
    session = Session(*(lambda s: (s.run, s.task))(one_epoch()))
    portions = portions_of(session.rule)
    assert len(portions) == 8
    every = [p.name for p in session.layout.params]
    assert set().union(*(p.names for p in portions)) == set(every)
    assert all({n for n in every if "bias" in n} <= p.names for p in portions)
    whole = torch.arange(session.layout.size, dtype=torch.float32)
    for portion in portions:
        parts = session.layout.split(whole)
        expected = torch.cat([parts[name].flatten() for name in every if name in portion.names])
        assert torch.equal(portion.of(whole), expected)
        assert portion.rule.layout.groups == (slice(0, len(expected)),)


@pytest.mark.parametrize("groups", [None, [{"lr": 0.1, "momentum": 0.9}, {"lr": 0.05, "weight_decay": 0.1}]])
def test_a_model_with_few_tensors_is_checked_at_every_step(groups):
    s = scenario.train(groups=groups)
    c = contributions(s.run, s.task, exact=True, certify="turns")
    assert (c.certificate.steps_checked, c.certificate.in_turns) == (s.run.steps, True)
    assert "8 of 8 steps were made again, their large tensors in turns" in c.certificate.sentence
    every = contributions(s.run, s.task, exact=True).certificate
    assert (every.steps_checked, every.in_turns) == (s.run.steps, False)


@pytest.mark.parametrize("form", ["forward", "reverse"])
def test_only_the_gradient_that_is_asked_for_is_given(form):
    s = one_epoch(torch.float64)
    session = Session(s.run, s.task)
    step = next(iter(session.trajectory.backwards(3)))
    gamma = torch.randn(1, session.layout.size, dtype=torch.float64)
    names = frozenset({"0.bias", "3.weight"})
    whole, part = (
        FORMS[form](session.function, session.train, step, 0).along(gamma, hessian=True, gradient=wanted)
        for wanted in (True, names)
    )
    torch.testing.assert_close(part.hvp, whole.hvp)
    for name, value in session.layout.split(whole.gradient).items():
        torch.testing.assert_close(
            session.layout.split(part.gradient)[name], value if name in names else torch.zeros_like(value)
        )


@pytest.mark.parametrize("asked", [{"targets": "each"}, {"mode": "tangent"}, {"curvature": "ggn"}])
def test_where_the_gradient_is_at_hand_all_weights_are_checked(asked):
    s = scenario.train()
    asked = {"exact": "curvature" not in asked, "certify": "turns"} | asked
    assert not contributions(s.run, s.task, **asked).certificate.in_turns


def refused(s, t):
    with pytest.raises(DriftError, match=f"drifted at step {t}:"):
        contributions(s.run, s.task, exact=True, certify="turns")
    for form in ("forward", "reverse"):
        session = Session(s.run, s.task, allow_drift=True)
        found = solve(session, exact=True, certify="turns", mode="adjoint", forms=Forms(only=form)).certificate
        assert (found.verdict, found.first_bad_step) == ("drifted", t)


@pytest.mark.parametrize("t", range(2, 12))
def test_one_wrong_label_in_one_step_is_caught_whosever_turn_it_is(t):
    s = one_epoch()
    wrong = s.data[0][s.run.sample_ids(t)[1]]

    def loss(model, batch):
        x, y = batch
        changed = (x == wrong).all(1)
        return nn.functional.cross_entropy(model(x), torch.where(changed, (y + 1) % 3, y), reduction="none")

    s.task.loss = loss
    refused(s, t)


@pytest.mark.parametrize("t", range(2, 12))
def test_a_wrong_learning_rate_in_one_step_is_caught_whosever_turn_it_is(t):
    s = one_epoch()
    record = s.run.sink.records[t]
    s.run.sink.records[t] = replace(record, hyper=np.where(record.hyper == 0.1, 0.101, record.hyper))
    refused(s, t)


@pytest.mark.parametrize("place", ["0.weight", "7.weight", "7.bias", "17.weight"])
def test_weights_that_something_else_moves_are_caught_when_their_turn_comes(place):
    """A tensor that is shrunk after every step, as by a loop that clamps or decays by hand."""
    s = one_epoch()
    (span,) = [p.span for p in s.run.spec.params if p.name == place]
    for t in range(1, s.run.steps + 1):
        s.run.sink.rows[t][span] *= 0.999**t
    with pytest.raises(DriftError):
        contributions(s.run, s.task, exact=True, certify="turns")
