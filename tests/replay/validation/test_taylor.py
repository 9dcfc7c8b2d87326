"""The Taylor check: it trains again without a sample, and says how well the contribution predicted that."""

import numpy as np
import pytest
import torch

import trajrec
from tests.made import loops
from tests.made.loops import Loop, N, Objective, cut
from trajrec.replay import contributions
from trajrec.replay.losses.targets import choose_targets
from trajrec.replay.session import Session
from trajrec.replay.validation.taylor import TaylorCheck, taylor_check, taylor_steps

SAMPLES = np.array([0, 5, 11])


def clip(model, optimizer):
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)


LOOPS = {
    "plain": Loop(),
    "clipped micro-batches, Adam": Loop(
        optimizer=lambda model: torch.optim.Adam(model.parameters(), lr=0.01),
        pieces=cut(2),
        objective=lambda *a: Objective()(*a) / 2,
        before_step=clip,
        task={"gradient": trajrec.clip_norm(0.5)},
    ),
}


def checked(made, exact=True):
    session = Session(made.run, made.task)
    steps = []
    wanted = choose_targets("each", session.test)
    c = contributions(made.run, made.task, targets="each", samples=SAMPLES, exact=exact)
    check = taylor_check(session, wanted, SAMPLES, c.values, steps.append)
    assert sum(steps) == taylor_steps(session, SAMPLES.tolist())
    return check


@pytest.mark.parametrize("name", LOOPS)
def test_it_trains_again_without_the_sample(name):
    made = loops.train(LOOPS[name], interval=2)
    check = checked(made)
    base = loops.train(LOOPS[name], torch.zeros(N)).values
    for sample, whole, half in zip(SAMPLES, check.removed, check.halved, strict=True):
        for found, part in ((whole, 1.0), (half, 0.5)):
            eps = torch.zeros(N, dtype=torch.float64)
            eps[sample] = -part / N
            expected = loops.train(LOOPS[name], eps).values - base
            np.testing.assert_allclose(found, expected.numpy(), rtol=1e-7, atol=1e-12)


def test_the_exact_form_is_of_second_order_and_the_other_is_not():
    made = loops.train(Loop(optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)))
    exact, free = checked(made), checked(made, exact=False)
    assert np.nanmedian(exact.rates) == pytest.approx(2, abs=0.2)
    assert np.nanmedian(exact.ratios) == pytest.approx(1, abs=0.2)
    assert np.nanmedian(free.rates) < 1.7


def test_a_bad_prediction_is_said():
    good = TaylorCheck(SAMPLES, np.ones((3, 1)), np.full((3, 1), 1.1), np.full((3, 1), 0.52))
    bad = TaylorCheck(SAMPLES, np.ones((3, 1)), np.full((3, 1), 7.0), np.full((3, 1), 1.0))
    assert good.sentence.endswith("did 1.10 times what its contribution says (median; ideal 1).")
    assert "should not be trusted" in bad.sentence
