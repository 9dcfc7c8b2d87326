"""Modules that come into eval mode, and out of it again, on the way: the buffers in force are in the recording."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import trajrec
from tests.made import loops
from tests.made.loops import CLASSES, Loop
from trajrec.errors import DerivativeError, DriftError
from trajrec.replay import contributions


def running():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


def switches(modes, module=lambda model: model[1]):
    """Puts a module into these modes after these steps."""

    def after_step(model, optimizer, t):
        if t in modes:
            module(model).train(modes[t])

    return after_step


def reestimate(model, optimizer, t):
    """Running statistics made anew before they are used, by passes without a gradient."""
    if t == 4:
        model[1].reset_running_stats()
        with torch.no_grad():
            model(torch.randn(50, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
        model[1].eval()


LOOPS = {
    "from step 5 on": Loop(build=running, after_step=switches({4: False})),
    "off and on again": Loop(build=running, after_step=switches({2: False, 4: True, 6: False, 7: True})),
    "the whole model": Loop(build=running, after_step=switches({4: False}, lambda model: model)),
    "eval mode at first": Loop(build=lambda: eval_first(), after_step=switches({3: True, 5: False})),
}


def eval_first():
    model = running()
    model[1].running_mean += 0.3
    model[1].eval()
    return model


@pytest.mark.parametrize("interval", [3, 4, 100])
@pytest.mark.parametrize("name", LOOPS)
def test_changes_of_mode_replay(name, interval):
    made = loops.train(LOOPS[name], interval=interval)
    found = []
    for mode in ("adjoint", "tangent"):
        c = contributions(made.run, made.task, targets="each", exact=True, mode=mode)
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert c.certificate.steps_checked == made.run.steps
        found.append(c.values)
    assert np.abs(found[0] - found[1]).max() < 1e-9 * np.abs(found[0]).max()


def test_statistics_made_anew_are_refused_where_targets_depend_on_them():
    made = loops.train(Loop(build=running, after_step=reestimate), interval=100)
    with pytest.raises(DerivativeError, match="statistics made anew"):
        contributions(made.run, made.task, targets="each", exact=True)
    c = contributions(made.run, made.task, targets="each", curvature="none")
    assert c.certificate.verdict in ("bit-exact", "within rounding")


def test_without_the_keyframe_it_would_drift():
    """What the tests above would see if the recorder wrote none before the change."""
    made = loops.train(LOOPS["from step 5 on"], interval=100)
    assert made.run.keyframe_steps == (0, 4, 9)
    keyframes = [k for k in made.run.sink.keyframes if k.step != 4]
    made.run.sink.keyframes = keyframes
    with pytest.raises(DriftError, match="drifted at step 5"):
        contributions(type(made.run)(made.run.sink), made.task, exact=True)


@pytest.mark.parametrize("keep", ["steps", 3])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_from_files(tmp_path, keep, make):
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(24, 4), torch.randint(0, CLASSES, (24,)))
    model = running()
    optimizer = make(model.parameters(), lr=0.05)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer, keep=keep):
        for epoch in range(4):
            model[1].train(epoch in (0, 2))
            for x, y in torch.utils.data.DataLoader(data, 6, shuffle=True):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
    task = trajrec.Task.supervised(running, data, data)
    with trajrec.open(tmp_path / "run.h5") as run:
        assert {4, 8, 12} <= set(run.keyframe_steps)
        for mode in ("adjoint", "tangent"):
            c = contributions(run, task, exact=True, mode=mode)
            assert c.certificate.verdict in ("bit-exact", "within rounding")
            assert c.certificate.steps_checked == 16


def test_models_without_buffers_need_no_keyframe():
    made = loops.train(Loop(build=loops.mlp, after_step=switches({4: False}, lambda model: model)), interval=100)
    assert made.run.keyframe_steps == (0, 9)
