"""Gradients of single samples, layer by layer: against autograd on one loss after the other, in float64."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from tests.made import scenario
from trajrec.replay import contributions
from trajrec.replay.derivatives import choice, layers
from trajrec.replay.derivatives.choice import FORMS, right_forms
from trajrec.replay.derivatives.layers import Tape
from trajrec.replay.session import Session


class Tokens(nn.Module):
    """A sequence of tokens with places, norms, an in-place activation and a head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 6, padding_idx=-1)
        self.place, self.start = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(1, 1, 6))
        self.norm, self.rms, self.up = nn.LayerNorm(6), nn.RMSNorm(6), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        y = self.embedding((5 * x.sigmoid()).long().clamp(0, 4)) + self.place
        y = torch.cat([self.start.expand(len(y), -1, -1), self.up(self.norm(y)).relu_() + y], 1)
        return self.head(self.rms(y)).mean(1)


class Scaled(nn.Module):
    """Scales and shifts of every shape, and a layer that is used twice."""

    def __init__(self):
        super().__init__()
        self.each, self.one = nn.Parameter(torch.randn(1, 4)), nn.Parameter(torch.randn(()))
        self.layer, self.out = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        y = self.layer(torch.tanh(self.layer(self.each * x) * self.one))
        return self.out(torch.add(self.one, y))


def images():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, (2, 1), (1, 2), (2, 1), (1, 2)), nn.ReLU(inplace=True),
        nn.GroupNorm(2, 4), nn.Conv2d(4, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2).eval(), nn.Tanh(),
        nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def wide():
    return nn.Sequential(nn.Linear(4, 20), nn.Sigmoid(), nn.Linear(20, 3, bias=False))


MODELS = {"tokens": Tokens, "scaled": Scaled, "images": images, "wide": wide}


def made(build):
    """A model in float64 whose layers that are made by their first call are there, and its weights."""
    torch.manual_seed(0)
    model = build().double()
    model(torch.randn(6, 4, dtype=torch.float64))
    return model, {name: value.detach().requires_grad_() for name, value in model.named_parameters()}


def taped(model, weights, x, y):
    """The pieces of a batch."""
    tape = Tape(weights)
    with tape:
        losses = functional.cross_entropy(functional_call(model, weights, (x,)), y, reduction="none")
    return tape.pieces(losses)


def one_by_one(model, weights, x, y):
    """The gradients of all samples by name, [B, n]: a forward and a backward pass for each."""
    rows = []
    for k in range(len(x)):
        loss = functional.cross_entropy(functional_call(model, weights, (x[k : k + 1],)), y[k : k + 1])
        rows.append(torch.autograd.grad(loss, list(weights.values())))
    return {k: torch.stack(c).reshape(len(x), -1) for k, c in zip(weights, zip(*rows, strict=True), strict=True)}


@pytest.mark.parametrize(("count", "most"), [(1, 1 << 24), (3, 1 << 24), (40, 1 << 24), (40, 50)])
@pytest.mark.parametrize("name", MODELS)
def test_the_pieces_of_a_weight_add_up_to_the_gradients_of_the_samples(name, count, most, monkeypatch):
    monkeypatch.setattr(layers, "_MOST_NUMBERS", most)
    model, weights = made(MODELS[name])
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 1, 0])
    shares = torch.rand(6, dtype=torch.float64)
    expected, pieces = one_by_one(model, weights, x, y), taped(model, weights, x, y)
    assert {name for name, _ in pieces} == set(weights)
    for weight, rows in expected.items():
        directions = torch.randn(count, rows.shape[1], dtype=torch.float64)
        found = [piece() for name, piece in pieces if name == weight]
        torch.testing.assert_close(sum(p.inner(directions) for p in found), directions @ rows.T, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(sum(p.summed(shares) for p in found), shares @ rows, rtol=1e-10, atol=1e-13)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        return x @ self.weight


class Both(nn.Linear):
    """A layer's weight that is used elsewhere, too."""

    def forward(self, x):
        return super().forward(x) * self.weight.square().mean()


class Places(nn.Linear):
    """A layer that goes over the places first, then over the samples."""

    def forward(self, x):
        return super().forward(x[:, None].expand(-1, 2, -1).transpose(0, 1)).sum(0)


class Cast(nn.Linear):
    def forward(self, x):
        with torch.autocast("cpu"):
            return super().forward(x).double()


REFUSED = {
    "a product": Product,
    "a use besides": lambda: Both(4, 3),
    "a parametrization": lambda: weight_norm(nn.Linear(4, 3)),
    "groups": lambda: nn.Sequential(nn.Unflatten(1, (2, 2, 1)), nn.Conv2d(2, 4, 1, groups=2), nn.Flatten()),
    "batch norm": lambda: nn.BatchNorm1d(4),
    "autocast": lambda: Cast(4, 3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_weight_that_is_used_in_another_way_is_noticed(name):
    model, weights = made(REFUSED[name])
    with pytest.raises(NotImplementedError, match="is used otherwise than as the weight of a known layer"):
        taped(model, weights, torch.randn(6, 4, dtype=torch.float64), torch.ones(6).long())


def test_rows_that_are_not_samples_are_noticed():
    model, weights = made(lambda: Places(4, 3))
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.ones(6).long()
    with pytest.raises(NotImplementedError, match="for a batch of 6 samples"):
        taped(model, weights, x, y)
    tape, weight = Tape({"shift": (w := torch.zeros(6, 3, dtype=torch.float64, requires_grad=True))}), w
    with tape:
        losses = (x[:, :3] + weight).sum(1)
    ((_, piece),) = tape.pieces(losses)
    with pytest.raises(NotImplementedError, match="rows of its own"):
        piece()


@pytest.mark.parametrize("name", ["tokens", "scaled", "wide"])
def test_contributions_to_several_targets_are_right_in_this_form(name, monkeypatch):
    tried = []
    monkeypatch.setattr(choice, "fastest", lambda names, trial: tried.append(right_forms(names, trial)) or "layers")
    s = scenario.train(MODELS[name])
    found = contributions(s.run, s.task, targets="each", exact=False, mode="adjoint")
    expected = s.reference(False)
    assert abs(found.values - expected).max() < 1e-9 * abs(expected).max()
    assert all("layers" in right for right in tried)


class Moody(nn.Sequential):
    """Uses a weight in a way of its own for some inputs."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else functional.linear(x, self[0].weight * 1.0, self[0].bias)


def test_another_form_takes_over_where_a_later_step_uses_a_weight_in_another_way(monkeypatch):
    chosen = []
    monkeypatch.setattr(choice, "fastest", lambda names, trial: chosen.append(right_forms(names, trial)) or "layers")
    s = scenario.train(lambda: Moody(nn.Linear(4, 3)))
    assert len({bool(s.task.train[i][0].sum() > 0) for i in range(len(s.task.train))}) == 2
    found = contributions(s.run, s.task, targets="each", exact=False, mode="adjoint")
    expected = s.reference(False)
    assert abs(found.values - expected).max() < 1e-9 * abs(expected).max()


def test_a_penalty_is_in_the_gradient():
    s = scenario.train(MODELS["wide"])
    s.task.penalty = lambda model: 1e-2 * model[0].weight.square().sum()
    session = Session(s.run, s.task)
    step = next(iter(session.trajectory.backwards()))
    found = [FORMS[form](session.function, session.train, step, 0).gradient() for form in ("layers", "reverse")]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-13)
