"""Every rule is the optimizer itself: stepped against torch.optim, and its derivatives against each other."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tests.made.rule_point import keyframe_of
from trajrec.errors import UnsupportedOptimizerError
from trajrec.rules import FlatLayout, check_recordable, rule_for
from trajrec.rules.selftest import self_test
from trajrec.rules.sgd import SGDRule
from trajrec.snapshot.model import Snapshot

CASES = [
    {"momentum": m, "dampening": d, "nesterov": n, "weight_decay": w, "maximize": x}
    for m, d, n, w, x in itertools.product((0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.05), (False, True))
    if not n or (m > 0 and d == 0)
]


def setup(options, dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).to(dtype)
    groups = [{"params": [p for k, p in model.named_parameters() if "bias" in k], "lr": 0.3}]
    groups.insert(0, {"params": [p for k, p in model.named_parameters() if "weight" in k]})
    optimizer = torch.optim.SGD(groups, lr=0.1, **options)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    snapshot = Snapshot(model, optimizer)
    spec = snapshot.spec({"samples": 1})
    layout = FlatLayout(spec)
    return model, optimizer, snapshot, layout, rule_for(spec, layout)


def flat(layout, model, what=lambda p: p.detach()):
    return layout.join({k: what(p) for k, p in model.named_parameters()})


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_steps_like_torch_optim_bit_for_bit(options, dtype):
    model, optimizer, snapshot, layout, rule = setup(options, dtype)
    state, weights = {}, flat(layout, model)
    for _ in range(4):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        gradient = flat(layout, model, lambda p: p.grad)
        weights, state = rule.step(weights, state, gradient, snapshot.hyper())
        optimizer.step()
        assert torch.equal(weights, flat(layout, model))
        for group in optimizer.param_groups:
            group["lr"] *= 0.7


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("fresh", [True, False])
def test_pull_is_the_transpose_of_push_and_push_a_finite_difference(options, fresh):
    model, _, snapshot, layout, rule = setup(options, torch.float64)
    w, g = flat(layout, model), torch.randn(layout.size, dtype=torch.float64)
    state = {} if fresh else {"momentum_buffer": torch.randn_like(w)}
    d, k = torch.randn(2, 3, layout.size, dtype=torch.float64)
    r = {name: torch.randn_like(d) for name in state}
    hyper = snapshot.hyper()
    d1, r1 = rule.push(w, state, g, hyper, d, r, k)
    lam = torch.randn_like(d)
    sigma = {name: torch.randn_like(d) for name in r1}
    lam1, sigma1, gamma = rule.pull(w, state, g, hyper, lam, sigma)
    left = (lam * d1).sum() + sum((sigma[n] * r1[n]).sum() for n in r1)
    right = (lam1 * d).sum() + (gamma * k).sum() + sum((sigma1[n] * r[n]).sum() for n in state)
    assert left == pytest.approx(float(right), rel=1e-12)
    h = 1e-6
    ahead, behind = (
        rule.step(w + s * d[0], {n: v + s * r[n][0] for n, v in state.items()}, g + s * k[0], hyper)[0] for s in (h, -h)
    )
    torch.testing.assert_close((ahead - behind) / (2 * h), d1[0], rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("options", [c for c in CASES if c["momentum"]], ids=str)
def test_the_state_implied_by_the_weights_is_the_state(options):
    """The fast path of the certificate against the general one: a momentum buffer that was carried along."""
    model, _, snapshot, layout, rule = setup(options, torch.float64)
    hyper, state, w = snapshot.hyper(), {}, flat(layout, model)
    for _ in range(3):
        g = torch.randn_like(w)
        before, (w, state) = w, rule.step(w, state, g, hyper)
        implied = rule.implied_state(before, w, g, hyper)
        torch.testing.assert_close(implied["momentum_buffer"], state["momentum_buffer"], rtol=1e-10, atol=1e-12)


def test_a_rate_of_zero_hides_the_state():
    model, optimizer, snapshot, layout, rule = setup({"momentum": 0.9}, torch.float64)
    optimizer.param_groups[1]["lr"] = 0.0
    w = flat(layout, model)
    assert rule.implied_state(w, w, w, snapshot.hyper()) is None


def test_state_of_a_keyframe_is_that_of_the_optimizer():
    model, optimizer, snapshot, layout, rule = setup({"momentum": 0.9}, torch.float32)
    there = snapshot.hyper(), torch.float32, torch.device("cpu")
    assert rule.initial_state(keyframe_of(snapshot), *there) == {}
    optimizer.step()
    state = rule.initial_state(keyframe_of(snapshot, 1), *there)
    expected = flat(layout, model, lambda p: optimizer.state[p]["momentum_buffer"])
    assert torch.equal(state["momentum_buffer"], expected)


def test_layout_orders_by_group_and_selects_trainable_weights():
    model, optimizer, _, layout, _ = setup({}, torch.float32)
    assert [p.name for p in layout.params] == ["0.weight", "1.weight", "0.bias", "1.bias"]
    row = np.concatenate([p.detach().numpy().ravel() for p in model.parameters()])
    assert torch.equal(torch.from_numpy(layout.select(row)), flat(layout, model))
    model[0].weight.grad = None
    spec = Snapshot(model, optimizer).spec({"samples": 1})
    assert [p.name for p in FlatLayout(spec).params] == ["1.weight", "0.bias", "1.bias"]


@pytest.mark.parametrize("optimizer", [torch.optim.LBFGS, torch.optim.SparseAdam])
def test_optimizers_without_a_rule_are_refused_with_a_reason(optimizer):
    with pytest.raises(UnsupportedOptimizerError, match=f"{optimizer.__name__} cannot be recorded"):
        check_recordable(optimizer([nn.Parameter(torch.zeros(2))]))


def test_own_optimizer_classes_are_refused_by_name():
    class SGD(torch.optim.SGD):
        pass

    with pytest.raises(UnsupportedOptimizerError, match="no rule for the optimizer SGD"):
        check_recordable(SGD([nn.Parameter(torch.zeros(2))], lr=0.1))


class Cut(SGDRule):
    """An optimizer that cuts the graph, as one that works on `.data` does."""

    def step(self, weights, state, gradient, hyper):
        return super().step(weights, state, gradient.detach(), hyper)


class Rounded(SGDRule):
    """One that rounds inside: its derivative is right, but of another function."""

    def step(self, weights, state, gradient, hyper):
        return super().step(weights, state, gradient.bfloat16().to(gradient.dtype), hyper)


@pytest.mark.parametrize("fault", [Cut, Rounded])
def test_a_rule_with_a_planted_fault_fails_its_self_test(fault):
    model, _, snapshot, layout, rule = setup({"momentum": 0.9, "nesterov": True}, torch.float32)
    w, g = flat(layout, model), flat(layout, model, lambda p: p.grad)
    self_test(rule, w, {}, g, snapshot.hyper())
    bad = fault(snapshot.spec({"samples": 1}), layout)
    with pytest.raises(UnsupportedOptimizerError, match="SGD failed its self-test"):
        self_test(bad, w, {"momentum_buffer": torch.randn_like(w)}, g, snapshot.hyper())
