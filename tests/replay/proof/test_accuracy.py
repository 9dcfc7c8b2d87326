"""What numbers in single precision are good to is told within an order of magnitude, and resumes."""

import numpy as np
import pytest
import torch

import trajrec
from tests.replay.proof import test_sameness as made
from trajrec.replay import contributions
from trajrec.replay.proof.accuracy import Accuracy
from trajrec.replay.report.accuracy import sentence


def off(values, true):
    return float(np.abs(values - true).max() / np.abs(true).max())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(("build", "optimizer"), [(made.Attention, made.adam), (made.smooth, made.sgd)])
def test_the_accuracy_is_that_against_double_precision(tmp_path, build, optimizer, exact):
    told = made.record(tmp_path / "run.h5", build, optimizer)
    with trajrec.open(tmp_path / "run.h5") as run:
        task = trajrec.Task(**told)
        single = contributions(run, task, exact=exact, mode="adjoint")
        double = contributions(run, task, exact=exact, mode="adjoint", dtype="float64")
    assert double.accuracy is None
    true = off(single.values, double.values)
    assert true / 15 < single.accuracy < 15 * max(true, 1e-8)


def test_adam_is_the_worse_by_far(tmp_path):
    """A loss that is off by rounding gives steps that are off by much: keys of attention at Adam's first step."""
    found = {}
    for optimizer in (made.sgd, made.adam):
        told = made.record(tmp_path / f"{optimizer.__name__}.h5", made.Attention, optimizer)
        with trajrec.open(tmp_path / f"{optimizer.__name__}.h5") as run:
            found[optimizer] = contributions(run, trajrec.Task(**told), exact=True, mode="adjoint").accuracy
    assert found[made.adam] > 100 * found[made.sgd]


def test_it_is_carried_over_a_kill():
    found = Accuracy()
    found.note(
        _step(3), torch.tensor([[1e-4, -2e-4]]), torch.ones(1, 4), torch.full((1, 4), 1.001), torch.tensor([2.0])
    )
    again = Accuracy()
    again.resume(found.to_json())
    assert again == found
    assert again.of(np.array([[0.1], [-0.2]]), 1, 4) == pytest.approx(2e-3, rel=1e-3)
    assert again.of(np.array([[10.0]]), 1, 4) == pytest.approx(2 * 1e-3, rel=1e-3)
    assert again.of(np.array([[0.0]]), 1, 4) is None
    assert Accuracy().of(np.array([[1.0]]), 1, 4) is None


def _step(t):
    return type("At", (), {"t": t})()


def test_the_sentence_offers_double_precision_where_it_helps():
    assert sentence(None, "float32") == ""
    assert sentence(2.1e-7, "float32") == "Numbers in float32 are good to about 2e-07 of the largest."
    told = "Numbers in float32 are good to about 2e-03 of the largest; --dtype float64 gives more."
    assert sentence(2.1e-3, "float32") == told
