"""Adam and its kin: stepped against torch.optim, differentiated against finite differences of real trainings."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.made.memory_run import MemoryRun
from tests.made.rule_point import rule_of
from trajrec.capture.recorder import Recorder
from trajrec.replay import contributions
from trajrec.rules import RULES
from trajrec.rules.adaptive import KEPT
from trajrec.sink import MemorySink
from trajrec.task.task import Task

CASES = {
    "Adam": {"lr": 0.01},
    "Adam amsgrad": {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1},
    "Adam maximize": {"lr": 0.01, "maximize": True, "betas": (0.8, 0.9)},
    "AdamW": {"lr": 0.01, "weight_decay": 0.3},
    "NAdam": {"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1},
    "RAdam": {"lr": 0.01},
    "Adamax": {"lr": 0.01},
    "RMSprop": {"lr": 0.01, "momentum": 0.5},
    "RMSprop centered": {"lr": 0.01, "centered": True},
    "Adagrad": {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 1.0},
    "ASGD": {"lr": 0.05, "lambd": 1e-2},
    "Rprop": {"lr": 0.01},
}
N = 20


def build():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def per_sample(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(name, eps, sink=None, dtype=torch.float64, epochs=3, dead=False):
    """A real training with torch.optim and sample weights 1 + N eps. Returns test losses and the task."""
    torch.manual_seed(0)
    x, tx = torch.randn(N, 4, dtype=dtype), torch.randn(5, 4, dtype=dtype)
    if dead:
        x[:, 2] = 0.0  # the weights of this input never get a gradient
    y, ty = torch.randint(0, 3, (N,)), torch.randint(0, 3, (5,))
    data, test = TensorDataset(x, y, torch.arange(N)), TensorDataset(tx, ty, torch.arange(5))
    model = build().to(dtype)
    biases = [p for k, p in model.named_parameters() if "bias" in k]
    weights = [p for k, p in model.named_parameters() if "weight" in k]
    options = {"lr": CASES[name]["lr"] * 2}
    optimizer = getattr(torch.optim, name.split()[0])(
        [{"params": weights}, {"params": biases, **options}], **CASES[name]
    )
    loader = DataLoader(data, 6, shuffle=True)

    def loop():
        for _ in range(epochs):
            for xs, ys, ids in loader:
                optimizer.zero_grad()
                ((1 + N * eps[ids]) * per_sample(model, (xs, ys)) / len(ids)).sum().backward()
                optimizer.step()

    if sink is None:
        loop()
    else:
        with Recorder(sink, model=model, optimizer=optimizer, loader=loader):
            loop()
    with torch.no_grad():
        return per_sample(model, (tx, ty)).numpy(), Task(lambda: build().to(dtype), data, test, loss=per_sample)


def recorded(name, dtype=torch.float64, **options):
    sink = MemorySink(interval=5)
    _, task = train(name, torch.zeros(N, dtype=dtype), sink, dtype, **options)
    return MemoryRun(sink), task


def test_every_class_has_its_case():
    assert {name.split()[0] for name in CASES} | {"SGD", "Muon", "Adafactor"} == set(RULES)


@pytest.mark.parametrize("name", CASES)
def test_both_directions_equal_each_other_and_finite_differences_of_the_training(name):
    run, task = recorded(name)
    a, t = (contributions(run, task, targets="each", exact=True, mode=mode) for mode in ("adjoint", "tangent"))
    if name == "Rprop":  # sees signs only: its training is piecewise constant in eps
        assert (a.values == 0).all()
        assert (t.values == 0).all()
        return
    scale = np.abs(a.values).max()
    assert np.abs(a.values - t.values).max() < 1e-9 * scale
    for sample in (0, 7):
        e = torch.zeros(N, dtype=torch.float64)
        e[sample] = h = 1e-5
        slope = (train(name, e)[0] - train(name, -e)[0]) / (2 * h)
        assert np.abs(-slope / N - a.values[sample]).max() < 1e-6 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_steps_are_made_again_bit_for_bit_or_to_rounding(name, dtype):
    run, task = recorded(name, dtype)
    for mode in ("adjoint", "tangent"):
        certificate = contributions(run, task, mode=mode).certificate
        assert certificate.steps_checked == run.steps
        if name in ("Adam amsgrad", "NAdam"):
            assert certificate.max_drift < (1e-12 if "amsgrad" in name and dtype is torch.float64 else 1e-5)
        else:
            assert certificate.verdict == "bit-exact"


@pytest.mark.parametrize("name", CASES)
def test_weights_that_never_had_a_gradient_do_no_harm(name):
    """sqrt(v) at v = 0: finite, and the contributions are those of the living weights."""
    run, task = recorded(name, dead=True)
    values = {
        mode: contributions(run, task, targets="each", exact=True, mode=mode).values for mode in ("adjoint", "tangent")
    }
    assert np.isfinite(values["adjoint"]).all()
    np.testing.assert_allclose(values["adjoint"], values["tangent"], rtol=1e-7, atol=1e-12)
    if name != "Rprop":
        e = torch.zeros(N, dtype=torch.float64)
        e[3] = h = 1e-5
        slope = (train(name, e, dead=True)[0] - train(name, -e, dead=True)[0]) / (2 * h)
        assert np.abs(-slope / N - values["adjoint"][3]).max() < 1e-6 * np.abs(values["adjoint"]).max()


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_states_rebuilt_within_little_memory_are_the_same(name):
    run, task = recorded(name)
    whole = contributions(run, task, targets="each", exact=True, mode="adjoint")
    little = contributions(run, task, targets="each", exact=True, mode="adjoint", memory=1)
    np.testing.assert_allclose(little.values, whole.values, rtol=1e-5, atol=1e-12)


def test_a_wrong_task_is_refused_for_adam_too():
    from trajrec.errors import DriftError

    run, task = recorded("Adam")
    task.loss = lambda model, batch: per_sample(model, batch) + (model(batch[0]) ** 2).sum(1)
    with pytest.raises(DriftError, match="drifted at step 1"):
        contributions(run, task)


def one_weight(optimizer, gradient, state=None, **options):
    """A rule at one weight of 0.5, with a state other than the optimizer's own."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.5)
    rule, w, first, g, hyper = rule_of(optimizer(model.parameters(), **options), model, [torch.tensor([[gradient]])])
    changed = {k: torch.tensor([v], dtype=torch.float64) for k, v in (state or {}).items()}
    return rule, w, first | changed, g, hyper


def along(point, d=0.0, k=0.0, **r):
    """Tangents (w, s) of a step along a direction of weight, gradient and state."""
    rule, w, state, g, hyper = point
    d, k = torch.tensor([[d]], dtype=torch.float64), torch.tensor([[k]], dtype=torch.float64)
    moved, s = rule.push(w, state, g, hyper, d, {n: torch.tensor([[v]], dtype=torch.float64) for n, v in r.items()}, k)
    pulled = rule.pull(w, state, g, hyper, torch.ones_like(d), {})
    back = float(pulled[0] * d + pulled[2] * k + sum(pulled[1][n][0] * v for n, v in r.items()))
    assert float(moved) == pytest.approx(back, rel=1e-12, abs=1e-300)
    return float(moved), {n: float(v) for n, v in s.items()}


def test_radam_switches_by_its_step_count_and_only_then_sees_second_moments():
    """rho_t > 5 from step 6 on: the count is a constant, so nothing is differentiated through the switch."""
    state = {"exp_avg": 0.2, "exp_avg_sq": 0.3}
    before, after = (one_weight(torch.optim.RAdam, 0.1, state | {"step": t - 1.0}, lr=0.1) for t in (5, 6))
    assert along(before, exp_avg_sq=1.0)[0] == 0
    moved = along(after, exp_avg_sq=1.0)[0]
    rule, w, s, g, hyper = after
    ahead, behind = (rule.step(w, s | {"exp_avg_sq": s["exp_avg_sq"] + h}, g, hyper)[0] for h in (1e-6, -1e-6))
    assert moved == pytest.approx(float(ahead - behind) / 2e-6, rel=1e-6) != 0
    assert recorded("RAdam")[0].steps > 6


@pytest.mark.parametrize(("held", "share"), [(0.2, 1.0), (0.4, 0.0), (None, 0.5)])
def test_amsgrad_at_a_tie_gives_half_to_each_side(held, share):
    """max(held, v): all to v where it is larger, nothing where the held one is, half of each at a tie."""
    v, g = 0.3, 0.1
    tie = 0.999 * v + (1 - 0.999) * g * g
    state = {"exp_avg": 0.2, "exp_avg_sq": v, "max_exp_avg_sq": tie if held is None else held, "step": 3.0}
    point = one_weight(torch.optim.Adam, g, state, lr=0.1, amsgrad=True)
    # In double precision, as torch adds it up.
    if held is None:
        point[2]["max_exp_avg_sq"] = point[0].step(*point[1:3], *point[3:])[1]["exp_avg_sq"]
    assert along(point, exp_avg_sq=1.0)[1]["max_exp_avg_sq"] == pytest.approx(0.999 * share)
    assert along(point, max_exp_avg_sq=1.0)[1]["max_exp_avg_sq"] == pytest.approx(1 - share)


def test_adamax_at_a_tie_gives_half_to_each_side():
    """max(beta_2 u, |g| + eps), in numbers that binary fractions hold."""
    state = {"exp_avg": 0.25, "exp_inf": 1.0, "step": 3.0}
    point = one_weight(torch.optim.Adamax, 0.25, state, lr=0.1, betas=(0.5, 0.5), eps=0.25)
    assert along(point, k=1.0)[1]["exp_inf"] == 0.5
    assert along(point, exp_inf=1.0)[1]["exp_inf"] == 0.25


@pytest.mark.parametrize(("gradient", "prev"), [(0.1, 0.2), (0.1, -0.2), (0.0, 0.2), (0.1, 0.0)])
def test_rprop_sees_signs_and_their_derivative_is_zero(gradient, prev):
    point = one_weight(torch.optim.Rprop, gradient, {"prev": prev, "step_size": 0.1, "step": 3.0}, lr=0.1)
    moved, state = along(point, k=1.0, prev=1.0)
    assert (moved, state["step_size"]) == (0.0, 0.0)
    assert along(point, d=1.0)[0] == 1.0


@pytest.mark.parametrize("name", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
def test_second_moments_of_zero_have_the_derivative_of_a_step_without_them(name):
    """m / (sqrt(v) + eps) at m = v = 0: dm / eps, whatever dv."""
    kept = [n for n in ("exp_avg_sq", "square_avg", "sum") if n in KEPT[name].vectors]
    point = one_weight(getattr(torch.optim, name), 0.0, lr=0.1, eps=1e-3, weight_decay=0.0)
    moved, _ = along(point, k=1e-9)
    rule, w, s, _, hyper = point
    tiny = torch.tensor([1e-12], dtype=torch.float64)
    slope = float(rule.step(w, s, tiny, hyper)[0] - rule.step(w, s, -tiny, hyper)[0]) / 2e-12
    assert moved == pytest.approx(1e-9 * slope, rel=1e-3)
    assert along(point, **dict.fromkeys(kept, 1.0))[0] == 0.0
