"""Values that forward passes move: refused by name where a loss depends on them, left alone where none does."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from tests.made import loops
from tests.made.loops import CLASSES, Loop
from trajrec.errors import DerivativeError
from trajrec.replay import contributions
from trajrec.task.task import Task


class Around(nn.Module):
    """A model with something in front of its layers, or behind the first one."""

    def __init__(self, front=None):
        super().__init__()
        self.front = front or nn.Identity()
        self.layers = loops.mlp()

    def forward(self, x):
        return self.layers(self.front(x))


class Usual(nn.Module):
    """Normalises by a running mean, in train mode, too; the buffer is given anew, or changed in place."""

    def __init__(self, in_place, always=True):
        super().__init__()
        self.in_place, self.always = in_place, always
        self.register_buffer("usual", torch.zeros(4, dtype=torch.float64))

    def forward(self, x):
        if self.training:
            new = 0.9 * self.usual + 0.1 * x.detach().mean(0)
            if self.in_place:
                self.usual.copy_(new)
            else:
                self.usual = new
        return x - self.usual if self.always or not self.training else x - x.mean(0)


class Attribute(nn.Module):
    """The same in a plain attribute."""

    def __init__(self):
        super().__init__()
        self.past = None

    def forward(self, x):
        past = torch.zeros_like(x[0]) if self.past is None else self.past
        self.past = 0.9 * past + 0.1 * x.detach().mean(0)
        return x - self.past


class Annealed(nn.Module):
    """Counts its passes, and computes with the count."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x / (1 + self.calls)


class Hidden(nn.Module):
    """Carries the state of an LSTM from batch to batch."""

    def __init__(self):
        super().__init__()
        self.rnn, self.state = nn.LSTM(4, 4, batch_first=True).double(), None

    def forward(self, x):
        out, state = self.rnn(x[None], self.state)
        self.state = tuple(part.detach() for part in state)
        return out[0]


class Codebook(nn.Module):
    """The nearest of eight vectors, which follow by moving averages."""

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(8, 4, generator=torch.Generator().manual_seed(3)).double())
        self.register_buffer("cluster_size", torch.ones(8, dtype=torch.float64))

    def forward(self, x):
        with torch.no_grad():
            nearest = (x[:, None] - self.codes).square().sum(2).argmin(1)
            one_hot = F.one_hot(nearest, 8).double()
            if self.training:
                self.cluster_size.mul_(0.9).add_(0.1 * one_hot.sum(0))
                self.codes.add_(0.1 * (one_hot.T @ x / one_hot.sum(0).clamp(min=1)[:, None]))
        return x * 0.5 + self.codes[nearest]


def spectral():
    return nn.Sequential(spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


def old_spectral():
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, CLASSES))


REFUSED = {
    "normaliser": (lambda: Around(Usual(False)), r"the buffer usual of the Usual 'front'.*nn\.BatchNorm1d"),
    "normaliser in place": (lambda: Around(Usual(True)), r"the buffer usual of the Usual 'front'"),
    "attribute": (lambda: Around(Attribute()), "the attribute past of the Attribute 'front'.*begin every batch"),
    "count": (lambda: Around(Annealed()), "the attribute calls of the Annealed 'front'"),
    "hidden state": (lambda: Around(Hidden()), "the attribute state of the Hidden 'front'.*hidden state"),
    "codebook": (
        lambda: Around(Codebook()),
        "the buffers cluster_size and codes of the Codebook 'front'.*by a gradient",
    ),
    "spectral": (
        spectral,
        re.escape("the buffers _u and _v of the spectral normalisation '0.parametrizations.weight.0'"),
    ),
    "old spectral": (old_spectral, "the buffers weight_u and weight_v of the spectral normalisation '0'"),
}


@pytest.mark.parametrize("curvature", ["hessian", "none"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_training_loss_depends_on_is_named(name, curvature):
    build, words = REFUSED[name]
    made = loops.train(Loop(build=build))
    with pytest.raises(DerivativeError, match=f"(?s)training loss depends on {words}"):
        contributions(made.run, made.task, curvature=curvature)


def test_spectral_normalisation_with_fixed_vectors_replays():
    class Fixed(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].parametrizations.weight[0].eval()
            return self

    made = loops.train(Loop(build=lambda: Fixed(*spectral()).train()))
    found = [contributions(made.run, made.task, exact=True, mode=mode) for mode in ("adjoint", "tangent")]
    assert found[0].certificate.first_bad_step is None
    np.testing.assert_allclose(found[0].values, found[1].values, rtol=1e-9, atol=1e-14)


class Last(nn.Module):
    """Compares with the batch before, which may be of another size in test; the state fits to no other batch."""

    def __init__(self):
        super().__init__()
        self.last = None

    def forward(self, x):
        out = x if self.last is None else x + 0.1 * self.last[: len(x)]
        self.last = x.detach() if self.training else self.last
        return out


def test_a_state_that_targets_would_see_is_named_by_the_training_loss():
    made = loops.train(Loop(build=lambda: Around(Last())))
    with pytest.raises(DerivativeError, match="training loss depends on the attribute last of the Last 'front'"):
        contributions(made.run, made.task, exact=True)


class Seen(nn.Module):
    """Counts, logs and caches: nothing that a loss depends on."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("last", torch.zeros(4, dtype=torch.float64))
        self.calls, self.log, self.table = 0, [], None

    def forward(self, x):
        self.count += len(x)
        self.last = x.detach().mean(0)
        self.calls += 1
        self.log.append(float(x.mean()))
        if self.table is None:
            self.table = torch.linspace(0, 1, 4, dtype=x.dtype)
        return x + self.table


@pytest.mark.parametrize("build", [lambda: Around(Seen()), lambda: Around(nn.BatchNorm1d(4))])
def test_what_no_loss_depends_on_is_left_alone(build):
    made = loops.train(Loop(build=build))
    found = contributions(made.run, made.task, exact=True)
    assert found.certificate.first_bad_step is None


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_what_only_targets_depend_on_is_named_when_they_are_asked_for(mode):
    made = loops.train(Loop(build=lambda: Around(Usual(False, always=False))))
    with pytest.raises(DerivativeError, match="target loss depends on the buffer usual of the Usual 'front'"):
        contributions(made.run, made.task, exact=True, mode=mode)
    task = Task(
        made.task.build_model,
        made.task.train,
        made.task.test,
        loss=loops.per_sample,
        measure=lambda model, batch: loops.per_sample(model.layers, batch),
    )
    assert contributions(made.run, task, exact=True, mode=mode).certificate.first_bad_step is None


class Tempered(nn.Module):
    """A temperature that the loop changes, or the average of weights as the loop makes it."""

    def __init__(self):
        super().__init__()
        self.layers = loops.mlp()
        self.register_buffer("temperature", torch.ones((), dtype=torch.float64))

    def forward(self, x):
        return self.layers(x) / self.temperature


def test_buffers_that_the_loop_changes_are_named():
    def anneal(model, optimizer, t):
        model.temperature.mul_(0.95)

    made = loops.train(Loop(build=Tempered, after_step=anneal))
    with pytest.raises(DerivativeError, match="temperature of the Tempered, which changed on the way"):
        contributions(made.run, made.task, exact=True)


def test_who_allows_drift_is_not_refused():
    made = loops.train(Loop(build=lambda: Around(Usual(False))))
    found = contributions(made.run, made.task, curvature="none", allow_drift=True)
    assert found.certificate.first_bad_step is not None
