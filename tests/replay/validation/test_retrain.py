"""Training again without samples is what training without them from the beginning would have been."""

import numpy as np
import pytest
import torch
from torch import nn

from tests.made import loops
from tests.made.loops import Loop, N, cut
from trajrec.errors import DriftError
from trajrec.replay.losses.targets import choose_targets
from trajrec.replay.session import Session
from trajrec.replay.validation.retrain import Retraining

SETS = np.array([3]), np.array([1, 8, 15]), np.arange(6, 12)


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Tanh(), nn.Linear(6, 3))


def averaged():
    """Running statistics that are the mean over all steps: the number of steps is a buffer, too."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=None), nn.Dropout(0.2), nn.Linear(6, 3))


def frozen_at_last(model, optimizer, t):
    """The normalisation comes into eval mode on the way: a keyframe, and its buffers, are recorded there."""
    if t == 5:
        model[1].eval()


LOOPS = {
    "plain": Loop(),
    "BatchNorm": Loop(build=normalised),
    "BatchNorm, mean over all steps, dropout": Loop(build=averaged),
    "BatchNorm, micro-batches": Loop(
        build=normalised, pieces=cut(2), optimizer=lambda m: torch.optim.Adam(m.parameters(), 0.01)
    ),
    "BatchNorm that is frozen on the way": Loop(build=normalised, after_step=frozen_at_last),
}


@pytest.mark.parametrize("interval", [100, 4])
@pytest.mark.parametrize("name", LOOPS)
def test_it_equals_a_training_of_its_own(name, interval):
    """In float64, to rounding; running statistics run, and targets are evaluated with those of the end."""
    loop = LOOPS[name]
    made = loops.train(loop, interval=interval)
    session = Session(made.run, made.task)
    steps = []
    again = Retraining(session, choose_targets("each", session.test), steps.append)
    base = loops.train(loop, torch.zeros(N)).values
    for samples in SETS:
        eps = torch.zeros(N, dtype=torch.float64)
        eps[samples] = -1 / N
        expected = (loops.train(loop, eps).values - base).numpy()
        np.testing.assert_allclose(again.change(samples), expected, rtol=1e-9, atol=1e-12)
        assert np.abs(expected).max() > 1e-4
    assert sum(steps) == again.steps(SETS)


def test_statistics_of_the_run_come_back():
    """After a retraining everything is evaluated as before it."""
    made = loops.train(LOOPS["BatchNorm"])
    session = Session(made.run, made.task)
    targets = choose_targets("each", session.test)
    before = session.target_gradients(targets)[0], session.loss(session.step_at_start())
    Retraining(session, targets, lambda _: None).change(SETS[1])
    after = session.target_gradients(targets)[0], session.loss(session.step_at_start())
    assert torch.equal(before[0], after[0])
    assert before[1] == after[1]


def test_a_task_that_does_not_describe_the_training_is_refused():
    made = loops.train(Loop())
    made.task.loss = lambda model, batch: 1.5 * loops.per_sample(model, batch)
    session = Session(made.run, made.task)
    again = Retraining(session, choose_targets("each", session.test), lambda _: None)
    with pytest.raises(DriftError, match="Replay drifted at step 1"):
        session.guarded(lambda: again.change(SETS[0]))
