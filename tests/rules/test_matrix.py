"""Optimizers that see a parameter as a matrix: Muon and Adafactor, against a second writing of their equations."""

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made import reference
from tests.made.memory_run import MemoryRun
from tests.made.rule_point import rule_of
from trajrec.capture.recorder import Recorder
from trajrec.errors import DriftError, UnsupportedOptimizerError
from trajrec.replay import contributions
from trajrec.rules import RoundedRule, registry
from trajrec.rules.matrix.muon import MuonRule
from trajrec.rules.selftest import self_test
from trajrec.sink import MemorySink
from trajrec.task.task import Task

CASES = {
    "Muon": {"lr": 0.02},
    "Muon plain": {"lr": 0.02, "nesterov": False, "momentum": 0.8, "weight_decay": 0.5, "ns_steps": 3},
    "Muon adamw": {"lr": 0.02, "adjust_lr_fn": "match_rms_adamw"},
    "Adafactor": {"lr": 0.05},
    "Adafactor decay": {"lr": 0.5, "weight_decay": 0.2, "maximize": True, "beta2_decay": -0.5},
    "Adafactor large": {"lr": 0.05, "eps": (1e-6, 2.0), "d": 3.0},
}
N = 12


def muon_step(p, buffer, g, o):
    """The documented pseudo code, with the momentum that torch uses: an average."""
    buffer = (1 - o["momentum"]) * g + (0 if buffer is None else o["momentum"] * buffer)
    x = (1 - o["momentum"]) * g + o["momentum"] * buffer if o["nesterov"] else buffer
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum().sqrt()
    a, b, c = o["ns_coefficients"]
    for _ in range(o["ns_steps"]):
        s = a * s + b * s**3 + c * s**5
    scale = sqrt(max(1, p.shape[0] / p.shape[1])) if o["adjust_lr_fn"] is None else 0.2 * sqrt(max(p.shape))
    return p * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * scale * (u * s) @ v, buffer


def adafactor_step(p, state, g, o):
    """The documented pseudo code."""
    t, kept = (1, None) if state is None else (state[0] + 1, state[1])
    g = -g if o["maximize"] else g
    beta = 1 - t ** o["beta2_decay"]
    eps = torch.finfo(p.dtype).eps if o["eps"][0] is None else o["eps"][0]

    def mix(old, new):
        return new * (1 - beta) if old is None else beta * old + (1 - beta) * new

    if p.ndim == 2:
        rows, columns = kept or (None, None)
        kept = mix(rows, (g**2).mean(1)), mix(columns, (g**2).mean(0))
        v = torch.outer(*kept) / kept[0].mean()
    else:
        v = kept = mix(kept, g**2)
    u = g / v.sqrt().clamp(min=eps)
    rms_u, rms_p = u.square().mean().sqrt(), p.square().mean().sqrt()
    u = u / torch.maximum(rms_u / o["d"], torch.ones_like(rms_u))
    alpha = torch.maximum(rms_p, torch.full_like(rms_p, o["eps"][1])) * min(o["lr"], t**-0.5)
    return p * (1 - o["lr"] * o["weight_decay"]) - alpha * u, (t, kept)


def build(bias):
    return nn.Sequential(nn.Linear(4, 6, bias=bias), nn.Tanh(), nn.Linear(6, 3, bias=bias))


def losses(f, batch):
    return nn.functional.cross_entropy(f(batch[0]), batch[1], reduction="none")


@dataclass
class Training:
    """A recorded training with what the naive reference needs."""

    run: MemoryRun
    task: Task
    model: nn.Module
    start: dict
    data: tuple
    test: tuple
    plan: reference.Plan

    def target(self, params):
        return losses(lambda x: functional_call(self.model, params, (x,)), self.test)

    def reference(self):
        params = {k: v.clone().requires_grad_() for k, v in self.start.items()}
        args = self.data, losses, self.plan, N, self.target
        return reference.contributions(self.model, params, *args).numpy()

    def value(self, eps):
        params = {k: v.clone().requires_grad_() for k, v in self.start.items()}
        return self.target(reference.train(self.model, params, self.data, losses, self.plan, eps)).detach()


def train(name, dtype=torch.float64, dead=False, epochs=2, seed=0, **extra):
    torch.manual_seed(seed)
    kind, options = name.split()[0], CASES[name] | extra
    data = (torch.randn(N, 4, dtype=dtype), torch.randint(0, 3, (N,)))
    test = (torch.randn(5, 4, dtype=dtype), torch.randint(0, 3, (5,)))
    if dead:
        data[0][:, 1] = 0.0
    model = build(kind == "Adafactor").to(dtype)
    start = {k: v.detach().clone() for k, v in model.named_parameters()}
    optimizer = getattr(torch.optim, kind)(model.parameters(), **options)
    loader, sink, rates = DataLoader(TensorDataset(*data), 5, shuffle=True), MemorySink(interval=3), []
    with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x), y).backward()
                rates.append([dict(optimizer.param_groups[0])])
                optimizer.step()
                optimizer.param_groups[0]["lr"] *= 0.9
    batches = [torch.as_tensor(r.ids) for r in sink.records[1:]]
    step = muon_step if kind == "Muon" else adafactor_step
    plan = reference.Plan(batches, rates, [list(start)], step=step)
    task = Task.supervised(lambda: build(kind == "Adafactor").to(dtype), TensorDataset(*data), TensorDataset(*test))
    return Training(MemoryRun(sink), task, model, start, data, test, plan)


@pytest.fixture
def unrounded(monkeypatch):
    """torch's own Muon, with its bfloat16 left out."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())


@pytest.mark.parametrize("name", CASES)
def test_both_directions_equal_naive_autograd_and_finite_differences(name, unrounded):
    t = train(name)
    a, f = (contributions(t.run, t.task, targets="each", exact=True, mode=mode) for mode in ("adjoint", "tangent"))
    expected, scale = t.reference(), np.abs(a.values).max()
    assert np.abs(a.values - f.values).max() < 1e-9 * scale
    assert np.abs(a.values - expected).max() < 1e-7 * scale
    direction = torch.randn(N, generator=torch.Generator().manual_seed(5), dtype=torch.float64) / N
    h = 1e-5
    slope = (t.value(h * direction) - t.value(-h * direction)) / (2 * h)
    predicted = -N * direction.numpy() @ a.values
    assert np.abs(slope.numpy() - predicted).max() < 1e-5 * np.abs(predicted).max()
    assert a.certificate.verdict == f.certificate.verdict == "bit-exact"


def rounded_muon_step(p, buffer, g, o):
    """Muon in bfloat16, by torch's own function, with the derivative of the polynomials."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    following, buffer = muon_step(p, buffer, g, o)
    x = g.lerp(buffer, o["momentum"]).detach()
    update = _zeropower_via_newtonschulz(x, o["ns_coefficients"], o["ns_steps"], o["eps"]).double()
    value = p.detach() * (1 - o["lr"] * o["weight_decay"]) - o["lr"] * sqrt(max(1, p.shape[0] / p.shape[1])) * update
    return value + following - following.detach(), buffer


def test_muon_steps_in_bfloat16_and_its_derivative_is_that_of_the_polynomials():
    t = train("Muon")
    t.plan.step = rounded_muon_step
    expected = t.reference()
    for mode in ("adjoint", "tangent"):
        c = contributions(t.run, t.task, targets="each", exact=True, mode=mode)
        assert c.certificate.verdict == "bit-exact"
        assert np.abs(c.values - expected).max() < 1e-6 * np.abs(expected).max()


def test_the_derivative_of_muon_is_the_slope_of_the_staircase_over_many_stairs():
    """Differences of torch's own bfloat16 iteration, averaged over shifted points."""
    from torch.optim._muon import _zeropower_via_newtonschulz

    from trajrec.rules.matrix.muon import orthogonal

    torch.manual_seed(0)
    o = CASES["Muon"] | {"c": (3.4445, -4.7750, 2.0315)}
    x, d = torch.randn(2, 16, 8, dtype=torch.float64)
    slope, h = torch.zeros_like(x), 0.02
    for _ in range(300):
        at = x + 0.004 * torch.randn_like(x)
        ahead, behind = (_zeropower_via_newtonschulz((at + s * d).float(), o["c"], 5, 1e-7).double() for s in (h, -h))
        slope += (ahead - behind) / (600 * h)
    derivative = torch.func.jvp(lambda v: orthogonal(v, o["c"], 5, 1e-7), (x,), (d,))[1]
    assert torch.cosine_similarity(slope.flatten(), derivative.flatten(), 0) > 0.98


class OwnMuon(torch.optim.Muon):
    """Somebody's own class that rounds inside."""


def test_a_users_class_that_rounds_on_purpose_is_followed_as_torchs_is(monkeypatch):
    """Two ways to one result: torch's code with nothing rounded, and the formula."""
    monkeypatch.setattr(registry, "_registered", {})
    trajrec.register_rule(OwnMuon, RoundedRule)
    t = train("Muon")
    expected = contributions(t.run, t.task, targets="each", exact=True).values
    t.run.spec = replace(t.run.spec, optimizer="OwnMuon", optimizer_module="somewhere")
    for mode in ("adjoint", "tangent"):
        c = contributions(t.run, t.task, targets="each", exact=True, mode=mode)
        assert c.certificate.verdict == "bit-exact"
        np.testing.assert_allclose(c.values, expected, rtol=1e-7, atol=1e-12)
    trajrec.register_rule(OwnMuon)
    with pytest.raises(UnsupportedOptimizerError, match=r"rounds to bfloat16 .* trajrec\.rules\.RoundedRule"):
        contributions(t.run, t.task)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_made_again_bit_for_bit(name, dtype):
    t = train(name, dtype)
    for mode in ("adjoint", "tangent"):
        certificate = contributions(t.run, t.task, mode=mode, exact=True).certificate
        assert (certificate.verdict, certificate.steps_checked) == ("bit-exact", t.run.steps)


@pytest.mark.parametrize(("name", "tolerance"), [("Muon", 0.1), ("Adafactor", 1e-4)])
def test_a_training_in_float32_is_replayed_in_float64(name, tolerance):
    t = train(name, torch.float32)
    single, double = (contributions(t.run, t.task, targets="each", exact=True, dtype=d) for d in ("float32", "float64"))
    assert double.certificate.verdict == "within rounding"
    assert double.certificate.max_drift < tolerance
    assert np.abs(single.values - double.values).max() < 1e-3 * np.abs(double.values).max()


@pytest.mark.parametrize("name", CASES)
def test_an_input_that_is_always_zero_does_no_harm(name, unrounded):
    """Rows and columns without a gradient, and the first step of all: second moments of zero."""
    t = train(name, dead=True)
    values = {
        m: contributions(t.run, t.task, targets="each", exact=True, mode=m).values for m in ("adjoint", "tangent")
    }
    np.testing.assert_allclose(values["adjoint"], values["tangent"], rtol=1e-7, atol=1e-12)
    eps, h = torch.zeros(N, dtype=torch.float64), 1e-5
    eps[3] = h
    slope = (t.value(eps) - t.value(-eps)) / (2 * h)
    assert np.abs(-slope.numpy() / N - values["adjoint"][3]).max() < 1e-5 * np.abs(values["adjoint"]).max()


def test_without_a_gradient_a_step_of_muon_is_smooth_and_steep(unrounded):
    model = nn.Linear(3, 4, bias=False).double()
    rule, w, state, g, hyper = rule_of(torch.optim.Muon(model.parameters(), nesterov=False), model, [torch.zeros(4, 3)])
    k = torch.randn(1, 12, dtype=torch.float64)
    pushed = rule.push(w, state, g, hyper, torch.zeros(1, 12, dtype=torch.float64), {}, k)[0][0]
    h = 1e-12  # far inside the ball of radius eps, 1e-7
    ahead, behind = (rule.step(w, state, s * h * k[0], hyper)[0] for s in (1, -1))
    assert torch.isfinite(pushed).all()
    torch.testing.assert_close((ahead - behind) / (2 * h), pushed, rtol=1e-3, atol=1e-3)
    lam = torch.randn(1, 12, dtype=torch.float64)
    gamma = rule.pull(w, state, g, hyper, lam, {})[2]
    assert float((gamma * k).sum()) == pytest.approx(float((lam * pushed).sum()), rel=1e-9)


def test_weights_of_zero_and_ties_of_adafactor_have_a_finite_derivative():
    """rms(w) at w = 0; rms(u) = d at the first step of a vector, where u is a vector of signs."""
    model = nn.Linear(3, 4).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    g = [torch.randn(4, 3), torch.randn(4)]
    rule, w, state, g, hyper = rule_of(torch.optim.Adafactor(model.parameters(), eps=(None, 0.0)), model, g)
    lam = torch.randn(1, 16, dtype=torch.float64)
    pulled, _, gamma = rule.pull(w, state, g, hyper, lam, {})
    torch.testing.assert_close(pulled, lam)
    assert (gamma == 0).all()  # steps are as long as the weights are large: none at all
    model.bias.data.fill_(0.5)
    rule, w, state, g, hyper = rule_of(torch.optim.Adafactor(model.parameters()), model, [torch.zeros(4, 3), g[12:]])
    gamma = rule.pull(w, state, g, hyper, lam, {})[2]
    assert gamma[0, 12:].abs().max() < 1e-12


def test_the_epsilon_of_adafactor_is_that_of_the_training_where_a_replay_computes_in_another_dtype():
    """Gradients so small that it counts."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    optimizer = torch.optim.Adafactor(model.parameters())
    rule, w, state, g, hyper = rule_of(optimizer, model, [1e-5 * torch.randn(4, 3), 1e-9 * torch.randn(4)])
    double = rule.step(w.double(), {k: v.double() for k, v in state.items()}, g.double(), hyper)[0] - w
    optimizer.step()
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - w
    torch.testing.assert_close(double, moved.double(), rtol=1e-3, atol=1e-7)


class WrongPolynomial(MuonRule):
    """A formula with another coefficient."""

    def formula(self, weights, state, gradient, options):
        a, b, c = options["ns_coefficients"]
        return super().formula(weights, state, gradient, options | {"ns_coefficients": (a, 1.001 * b, c)})


def test_a_formula_that_is_not_that_of_the_class_fails_its_self_test():
    torch.manual_seed(0)
    model = nn.Linear(3, 4, bias=False)
    rule, *point = rule_of(torch.optim.Muon(model.parameters()), model, [torch.randn(4, 3)])
    self_test(rule, *point)
    rule.__class__ = WrongPolynomial
    with pytest.raises(UnsupportedOptimizerError, match="Muon failed its self-test"):
        self_test(rule, *point)


@pytest.mark.parametrize("left_out", ["w", "g", "row_var"])
def test_adafactor_with_a_cut_in_its_graph_fails_its_self_test(left_out, monkeypatch):
    """The norms that torch takes out of the graph, and a moment."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    rule, *point = rule_of(torch.optim.Adafactor(model.parameters()), model, [torch.randn(4, 3), torch.randn(4)])
    self_test(rule, *point)
    formula = rule.formula

    def cut(w, s, g, o):
        s = {k: v.detach() if k == left_out else v for k, v in s.items()}
        return formula(w, s, g, o) if left_out == "row_var" else formula(*cut_norms(w, s, g, o))

    def cut_norms(w, s, g, o):
        return (w.detach() if left_out == "w" else w), s, (g.detach() if left_out == "g" else g), o

    monkeypatch.setattr(rule, "formula", cut)
    with pytest.raises(UnsupportedOptimizerError, match="Adafactor failed its self-test"):
        self_test(rule, *point)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_states_rebuilt_within_little_memory_are_the_same(name):
    t = train(name)
    whole = contributions(t.run, t.task, targets="each", exact=True, mode="adjoint")
    little = contributions(t.run, t.task, targets="each", exact=True, mode="adjoint", memory=1)
    np.testing.assert_allclose(little.values, whole.values, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("name", ["Muon", "Adafactor"])
def test_a_wrong_task_is_refused(name):
    t = train(name)
    t.task.loss = lambda model, batch: losses(model, batch) + (model(batch[0]) ** 2).sum(1)
    with pytest.raises(DriftError, match="drifted at step 1"):
        contributions(t.run, t.task)
