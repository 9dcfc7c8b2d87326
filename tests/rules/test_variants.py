"""foreach, fused and capturable: other code of torch for the same mathematics, recorded and replayed as one."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made import own_optimizers
from tests.made.memory_run import MemoryRun
from trajrec.capture.recorder import Recorder
from trajrec.replay import contributions
from trajrec.rules import registry
from trajrec.sink import MemorySink
from trajrec.task.task import Task

FOREACH = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta", "ASGD", "Adafactor"]
FUSED = ["SGD", "Adam", "AdamW", "Adagrad"]
CAPTURABLE = ["Adam", "AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adadelta", "ASGD", "Rprop"]
OPTIONS = {"SGD": {"momentum": 0.9, "nesterov": True}, "RMSprop": {"momentum": 0.5, "centered": True}}


def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def replayed(name, device="cpu", **variant):
    """Contributions of one training, recorded under a variant of an optimizer."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
    model, sink = build().to(device), MemorySink(interval=4)
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **OPTIONS.get(name, {}), **variant)
    loader = DataLoader(data, 5, shuffle=True)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(4):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
                optimizer.step()
    task = Task.supervised(build, data, data)
    return [contributions(MemoryRun(sink), task, targets="each", exact=True, mode=m, device=device) for m in MODES]


MODES = ("adjoint", "tangent")


def check(name, device="cpu", **variant):
    plain = replayed(name, device, **(variant | dict.fromkeys(variant, False)))
    scale = max(np.abs(plain[0].values).max(), 1e-30)
    for one, other in zip(plain, replayed(name, device, **variant), strict=True):
        assert other.certificate.verdict in ("bit-exact", "within rounding")
        assert other.certificate.steps_checked == 12
        assert other.certificate.max_drift < 1e-4
        assert np.abs(one.values - other.values).max() < 1e-3 * scale


@pytest.mark.parametrize("name", FOREACH)
def test_foreach_replays_through_the_same_mathematics(name):
    check(name, foreach=True)


def test_foreach_of_rprop_is_made_again():
    """It sees signs only: all its contributions are zero."""
    for c in replayed("Rprop", foreach=True):
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert (c.values == 0).all()


@pytest.mark.parametrize("name", FUSED)
def test_fused_replays_through_the_same_mathematics(name):
    check(name, fused=True)


@pytest.mark.cuda
@pytest.mark.parametrize("name", CAPTURABLE)
def test_capturable_replays_through_the_same_mathematics(name):
    check(name, "cuda", capturable=True)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_matrix_rules_replay_on_cuda(name):
    """Muon takes matrices only, so the model has no biases there."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))

    def build():
        return nn.Sequential(nn.Linear(4, 5, bias=False), nn.Tanh(), nn.Linear(5, 3, bias=False))

    model, sink = build().cuda(), MemorySink(interval=4)
    optimizer, loader = getattr(torch.optim, name)(model.parameters(), lr=0.01), DataLoader(data, 5)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
            optimizer.step()
    found = [
        contributions(MemoryRun(sink), Task.supervised(build, data, data), exact=True, mode=m, device="cuda")
        for m in MODES
    ]
    assert all(c.certificate.verdict in ("bit-exact", "within rounding") for c in found)
    np.testing.assert_allclose(found[0].values, found[1].values, rtol=1e-2, atol=1e-6)


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["Belief", "Lars", "Slow"])
def test_own_classes_replay_on_cuda(name, monkeypatch):
    monkeypatch.setattr(registry, "_registered", {})
    cls = getattr(own_optimizers, name)
    trajrec.register_rule(cls)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(12, 4), torch.randint(0, 3, (12,)))
    model, sink = build().cuda(), MemorySink(interval=4)
    optimizer, loader = cls(model.parameters()), DataLoader(data, 5)
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(2):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x.cuda()), y.cuda()).backward()
                optimizer.step()
    task = Task.supervised(build, data, data, optimizer=cls)
    for device in ("cuda", "cpu"):
        found = [contributions(MemoryRun(sink), task, exact=True, mode=m, device=device) for m in MODES]
        assert all(c.certificate.verdict in ("bit-exact", "within rounding") for c in found)
        np.testing.assert_allclose(found[0].values, found[1].values, rtol=1e-3, atol=1e-7)
