"""Batches in pieces give what whole batches give, where they may be cut; and take less memory."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from tests.made import loops, scenario
from tests.replay.derivatives.test_forms import Attention
from trajrec.errors import ReplayError
from trajrec.replay import contributions
from trajrec.replay.derivatives.choice import FIRST_ORDER, FORMS
from trajrec.replay.derivatives.pieces import CutPoint, cut
from trajrec.replay.session import Session
from trajrec.replay.step import Part


def point(build=scenario.mlp, edges=(0, 5), penalty=False):
    """A session, and a step of it with micro-batches between these edges."""
    s = scenario.train(build)
    if penalty:
        s.task.penalty = lambda model: 1e-2 * model[0].weight.square().sum()
    session = Session(s.run, s.task)
    step = next(iter(session.trajectory.backwards(3)))
    return session, replace(step, parts=tuple(Part(slice(a, b)) for a, b in pairwise(edges)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("edges", [(0, 5), (0, 2, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_a_step_in_pieces_has_the_derivatives_of_the_whole(form, edges, size):
    hessian = form not in FIRST_ORDER
    for build, penalty in ((scenario.mlp, True), (scenario.convolution, False), (Attention, False)):
        session, step = point(build, edges, penalty)
        about = session.function, session.train, step, 2
        directions = torch.randn(3, session.layout.size, dtype=torch.float64)
        whole = FORMS[form](*about).along(directions, hessian=hessian, gradient=True)
        found = CutPoint(FORMS[form], *about, size).along(directions, hessian=hessian, gradient=True)
        for name in ("inner", "shares", "gradient", "hvp") if hessian else ("inner", "shares", "gradient"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name), rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(CutPoint(FORMS[form], *about, size).gradient(), whole.gradient)


def test_pieces_are_no_larger_than_asked_and_hold_every_sample_once():
    session, step = point(edges=(0, 2, 5))
    pieces = list(cut(session.function, session.train, step, 2))
    assert [len(piece.ids) for piece in pieces] == [2, 2, 1]
    assert [i for piece in pieces for i in piece.ids] == list(step.ids)
    assert sum(float(piece.shares.sum()) for piece in pieces) == pytest.approx(1.0)


MODES = [("adjoint", "hessian"), ("adjoint", "none"), ("adjoint", "ggn"), ("tangent", "hessian"), ("tangent", "none")]


@pytest.mark.parametrize(("mode", "curvature"), MODES)
@pytest.mark.parametrize("inputs", ["digest", "store"])
def test_a_replay_with_next_to_no_memory_gives_the_same(monkeypatch, mode, curvature, inputs):
    sizes, trained = [], loops.train(loops.Loop(batch_size=9, pieces=loops.cut(5)), inputs=inputs)
    asked = {"targets": [1, 3], "samples": [0, 3, 8], "mode": mode, "curvature": curvature}
    expected = contributions(trained.run, trained.task, **asked)
    made = CutPoint.__init__
    monkeypatch.setattr(CutPoint, "__init__", lambda self, *a: sizes.append(a[-1]) or made(self, *a))
    found = contributions(trained.run, trained.task, memory=1, **asked)
    assert set(sizes) == {1}
    assert abs(found.values - expected.values).max() < 1e-10 * abs(expected.values).max()
    assert found.certificate.steps_checked == expected.certificate.steps_checked


WHOLE = {
    "batch norm": (scenario.batch_norm, "BatchNorm1d '1' is in training mode, where the samples of a batch touch"),
    "dropout": (scenario.dropout, r"random numbers \(of dropout, say\) were drawn for the batch as a whole"),
}


@pytest.mark.parametrize("name", WHOLE)
def test_batches_that_cannot_be_cut_are_refused_where_memory_was_given_and_else_taken_whole(monkeypatch, name):
    build, reason = WHOLE[name]
    s = scenario.train(build)
    with pytest.raises(ReplayError, match=r"Step 7 with its batch of 5 needs .* taken in pieces: " + reason):
        contributions(s.run, s.task, exact=True, memory=1)
    monkeypatch.setattr("trajrec.replay.session.budget", lambda memory, device: 8)
    found = contributions(s.run, s.task, targets="each", exact=True).values
    assert abs(found - s.reference()).max() < 1e-9 * abs(s.reference()).max()


def test_a_loss_that_looks_at_the_whole_batch_is_not_cut():
    s = scenario.train()
    inner = s.task.loss
    s.task.loss = lambda model, batch: inner(model, batch) * batch[0].mean()
    with pytest.raises(ReplayError, match="loss of a sample depends on the others of its batch"):
        contributions(s.run, s.task, exact=False, memory=1, allow_drift=True)


BIG = """
import pathlib, sys, torch, trajrec
from torch import nn
from trajrec.replay import contributions

def net():
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(16 * 24 * 24, 3))
    return nn.Sequential(nn.Conv2d(1, 16, 3), nn.Tanh(), nn.Conv2d(16, 16, 3), nn.Tanh(), flat)

torch.set_num_threads(1)
torch.manual_seed(0)
train = torch.utils.data.TensorDataset(torch.randn(384, 1, 28, 28), torch.randint(0, 3, (384,)))
task = trajrec.Task.supervised(net, train, torch.utils.data.Subset(train, range(8)))
if sys.argv[1] == "record":
    model, loader = net(), torch.utils.data.DataLoader(train, batch_size=192)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with trajrec.record("run.h5", model=model, optimizer=optimizer, loader=loader):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
else:
    with trajrec.open("run.h5") as run:
        found = contributions(run, task, exact=True, memory=int(sys.argv[2]))
    status = pathlib.Path("/proc/self/status").read_text().splitlines()
    print(next(line for line in status if line.startswith("VmHWM")).split()[1], *found.values[:3, 0].tolist())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_the_peak_follows_the_memory_that_is_given(tmp_path):
    """The training's own pass over 192 images keeps 30 MB, an exact step some 200 MB more."""
    (tmp_path / "big.py").write_text(BIG)

    def call(*words):
        command = [sys.executable, "big.py", *words]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True, timeout=120).stdout

    call("record")
    plenty, little = (call("replay", str(memory)).split() for memory in (4_000_000_000, 80_000_000))
    assert [float(v) for v in little[1:]] == pytest.approx([float(v) for v in plenty[1:]], rel=1e-4, abs=1e-9)
    saved = (int(plenty[0]) - int(little[0])) / 1024
    assert saved > 50, f"{saved} MB"
