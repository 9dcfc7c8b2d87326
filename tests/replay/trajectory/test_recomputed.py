"""A keyframed run replays as a fully recorded one: the same steps, the same numbers, its own certificate."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.errors import DriftError
from trajrec.replay import contributions, hypergradients
from trajrec.runfile.trainer.sink import RunFileSink
from trajrec.task.task import Task


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def record(path, steps, **options):
    torch.manual_seed(2)
    data = TensorDataset(torch.randn(40, 4), torch.randint(0, 3, (40,)))
    test = TensorDataset(torch.randn(9, 4), torch.randint(0, 3, (9,)))
    model = net()
    model[4].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    loader = DataLoader(data, batch_size=8, shuffle=True)
    done = 0
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader, **options):
        while done < steps:
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break
    return Task.supervised(net, data, test)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    task = record(folder / "steps.h5", 23)
    record(folder / "keyframes.h5", 23, keep=7)
    with trajrec.open(folder / "steps.h5") as full, trajrec.open(folder / "keyframes.h5") as sparse:
        yield full, sparse, task


def test_the_keyframed_run_holds_a_row_only_now_and_then(runs):
    full, sparse, _ = runs
    assert [t for t in range(24) if sparse.stored(t)] == [0, 7, 14, 21, 23]
    assert all(full.stored(t) for t in range(24))
    assert all(full.crc32(t) == sparse.crc32(t) for t in range(24))


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
@pytest.mark.parametrize("memory", [None, 1, 2000])
def test_replay_of_a_keyframed_run_is_the_same_bit_for_bit(monkeypatch, runs, mode, exact, memory):
    full, sparse, task = runs
    monkeypatch.setattr("trajrec.replay.session.budget", lambda *_: memory or 1 << 30)
    expected = contributions(full, task, targets="each", exact=exact, mode=mode)
    found = contributions(sparse, task, targets="each", exact=exact, mode=mode)
    assert (found.values == expected.values).all()
    assert found.certificate.verdict == "bit-exact"
    assert found.certificate.steps_checked == 23


def test_hypergradients_and_float64_too(runs):
    full, sparse, task = runs
    with (
        hypergradients(full, task, samples=[3], exact=True) as a,
        hypergradients(sparse, task, samples=[3], exact=True) as b,
    ):
        assert all(torch.equal(a[3][k], b[3][k]) for k in a[3])
    x, y = (contributions(run, task, exact=True, dtype="float64") for run in (full, sparse))
    assert (x.values == y.values).all()


def test_rounding_between_keyframes_is_measured_and_passes(runs, monkeypatch):
    """Another machine rounds differently: here by a last-place nudge of every gradient."""
    from trajrec.replay.trajectory import recomputed

    full, sparse, task = runs
    exact = recomputed.gradient_of
    monkeypatch.setattr(recomputed, "gradient_of", lambda *a: exact(*a) * (1 + 2e-7))
    c = contributions(sparse, task, exact=True)
    assert c.certificate.verdict == "within rounding"
    assert 0 < c.certificate.max_drift < 1e-4
    np.testing.assert_allclose(c.values, contributions(full, task, exact=True).values, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_a_wrong_task_is_refused_with_the_first_bad_step(runs, mode):
    _, sparse, task = runs
    inner = task.loss
    wrong = Task(net, task.train, task.test, loss=lambda m, b: 1.01 * inner(m, b))
    with pytest.raises(DriftError, match=r"drifted at step 1:.*keyframe of step 7.*is 0\.9901 times the Task"):
        contributions(sparse, wrong, mode=mode, samples=[0, 1, 2], targets="mean")
    allowed = contributions(sparse, wrong, mode=mode, allow_drift=True)
    assert allowed.certificate.verdict == "drifted"
    assert allowed.certificate.first_bad_step == 1


@pytest.mark.parametrize("options", [{"keep": 7}, {"keyframe_every": 7}])
def test_a_run_that_was_cut_off_goes_on_beyond_its_last_keyframe(runs, tmp_path, monkeypatch, options):
    """Weights that are not stored and the running statistics of the targets are both made again."""
    full, _, task = runs
    # The last keyframe is written when a recording ends; kill -9 leaves none.
    take = RunFileSink.keyframe
    monkeypatch.setattr(RunFileSink, "keyframe", lambda self, k: None if k.step == 23 else take(self, k))
    record(tmp_path / "cut.h5", 23, **options)
    with trajrec.open(tmp_path / "cut.h5") as run:
        assert run.keyframe_steps[-1] == 21
        found = contributions(run, task, exact=True)
        assert (found.values == contributions(full, task, exact=True).values).all()
