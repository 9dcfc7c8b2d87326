"""The proof: every mode against naive autograd through the whole training and against finite differences."""

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.made import scenario
from trajrec.errors import NonFiniteError
from trajrec.replay import contributions, hypergradients

MODES = [(mode, exact) for mode in ("adjoint", "tangent") for exact in (True, False)]

SCENARIOS = {
    "momentum": {},
    "plain": {"groups": [{"lr": 0.2}]},
    "nesterov": {"groups": [{"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.02}]},
    "dampening": {"groups": [{"lr": 0.2, "momentum": 0.7, "dampening": 0.4, "weight_decay": 0.01}]},
    "maximize": {"groups": [{"lr": 0.03, "momentum": 0.5, "maximize": True, "weight_decay": 0.01}]},
    "groups": {"groups": [{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, {"lr": 0.3, "momentum": 0.0}]},
    "schedule": {"schedule": lambda t: 1.0 / (1 + t)},
    "warm-up from zero": {"schedule": lambda t: min(1.0, t / 3)},
    "batch norm": {"build": scenario.batch_norm},
    "dropout": {"build": scenario.dropout},
    "convolution": {"build": scenario.convolution},
    "repeats": {"sampler": [0, 3, 3, 5, 7, 1, 0, 0, 16, 9, 9, 2]},
}


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_mode_equals_autograd_through_the_whole_training(name):
    s = scenario.train(**SCENARIOS[name])
    for exact in (True, False):
        expected = s.reference(exact)
        assert np.abs(expected).max() > 1e-6
        for mode in ("adjoint", "tangent"):
            c = contributions(s.run, s.task, targets="each", exact=exact, mode=mode)
            assert relative(c.values, expected) < 1e-9
            assert c.certificate.steps_checked == s.run.steps
            assert c.certificate.verdict in ("bit-exact", "within rounding")


@pytest.mark.parametrize("name", ["momentum", "nesterov", "batch norm", "convolution", "groups", "repeats"])
def test_exact_equals_central_finite_differences_in_eps(name):
    s = scenario.train(**SCENARIOS[name])
    c = contributions(s.run, s.task, targets="each", exact=True)
    for sample in (0, 3, 9):
        e = torch.zeros(s.n, dtype=torch.float64)
        e[sample] = h = 1e-5
        slope = (s.value(e) - s.value(-e)).numpy() / (2 * h)
        assert relative(c.values[sample], -slope / s.n) < 1e-6


def test_taylor_remainder_of_the_exact_form_is_of_second_order():
    s = scenario.train()
    c = contributions(s.run, s.task, targets="each", exact=True)
    direction = torch.linspace(-1, 1, s.n, dtype=torch.float64)
    slope = -s.n * c.values.T @ direction.numpy()
    base = s.value(torch.zeros(s.n, dtype=torch.float64)).numpy()
    remainders = [np.abs(s.value(e * direction).numpy() - base - e * slope).max() for e in (0.02, 0.01, 0.005, 0.0025)]
    rates = np.log2(np.array(remainders[:-1]) / remainders[1:])
    assert rates.min() > 1.9


@settings(max_examples=12, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {
                "lr": st.sampled_from([0.01, 0.2]),
                "momentum": st.sampled_from([0.0, 0.5, 0.9]),
                "dampening": st.sampled_from([0.0, 0.3]),
                "weight_decay": st.sampled_from([0.0, 0.1]),
                "maximize": st.booleans(),
            }
        ),
        min_size=1,
        max_size=2,
    ),
    st.sampled_from([scenario.mlp, scenario.batch_norm, scenario.dropout]),
    st.sampled_from([3, 5, 6, 7, 9]),  # no batch of one sample, which BatchNorm refuses
    st.integers(0, 1000),
)
def test_adjoint_equals_tangent_equals_autograd_for_any_configuration(groups, build, batch_size, seed):
    s = scenario.train(build, groups, batch_size=batch_size, seed=seed)
    for exact in (True, False):
        a, t = (
            contributions(s.run, s.task, targets="each", exact=exact, mode=m).values for m in ("adjoint", "tangent")
        )
        assert relative(a, t) < 1e-9
        assert relative(a, s.reference(exact)) < 1e-8


def test_hessian_free_equals_its_closed_form_for_sgd_with_momentum():
    r"""dv_t = p dv_{t-1} + N/B grad l_i, D_t = D_{t-1} - eta dv_t: geometric sums of the momentum."""
    s = scenario.train()
    eta, p, steps = 0.1, 0.9, s.run.steps
    expected = {k: torch.zeros_like(v) for k, v in s.start.items()}
    sample = int(s.run.sample_ids(1)[0])
    for t in range(1, steps + 1):
        ids = s.run.sample_ids(t)
        if sample not in ids:
            continue
        row, offset = torch.as_tensor(s.run.row(t - 1)), 0
        at = {}
        for k, v in s.start.items():
            at[k] = row[offset : offset + v.numel()].reshape(v.shape).clone().requires_grad_()
            offset += v.numel()
        x, y = (values[[sample]] for values in s.data)
        loss = s.losses(lambda z, at=at: torch.func.functional_call(s.model, at, (z,)), (x, y))[0]
        factor = -eta * s.n / len(ids) * (1 - p ** (steps - t + 1)) / (1 - p)
        for k, g in zip(at, torch.autograd.grad(loss, list(at.values())), strict=True):
            expected[k] += factor * g
    with hypergradients(s.run, s.task, samples=[sample], exact=False) as h:
        for k, v in expected.items():
            torch.testing.assert_close(h[sample][k], v, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("exact", [True, False])
def test_hypergradients_give_the_contributions(exact):
    s = scenario.train()
    c = contributions(s.run, s.task, targets="each", samples=[4, 2], exact=exact, mode="adjoint")
    final = {k: v.detach().clone().requires_grad_() for k, v in s.model.named_parameters()}
    with hypergradients(s.run, s.task, samples=[4, 2], exact=exact) as h:
        for row, sample in zip(c.values, h.samples, strict=True):
            for j, loss in enumerate(s.target(final)):
                grads = torch.autograd.grad(loss, list(final.values()), retain_graph=True)
                product = sum((g * h[sample][k]).sum() for k, g in zip(final, grads, strict=True))
                assert row[j] == pytest.approx(-float(product) / s.n, rel=1e-9)


@pytest.mark.parametrize(("mode", "exact"), MODES)
def test_mean_class_and_chosen_targets_are_means_of_each(mode, exact):
    s = scenario.train()
    each = contributions(s.run, s.task, targets="each", exact=exact, mode=mode).values
    mean = contributions(s.run, s.task, targets="mean", exact=exact, mode=mode)
    assert mean.targets.tolist() == [-1]
    assert relative(mean.values[:, 0], each.mean(1)) < 1e-9
    classes = contributions(s.run, s.task, targets="class", exact=exact, mode=mode)
    labels = s.test[1].numpy()
    assert classes.targets.tolist() == sorted(set(labels.tolist()))
    for column, label in enumerate(classes.targets):
        assert relative(classes.values[:, column], each[:, labels == label].mean(1)) < 1e-9
    chosen = contributions(s.run, s.task, targets=[5, 0], samples=[3, 1], exact=exact, mode=mode)
    assert relative(chosen.values, each[[3, 1]][:, [5, 0]]) < 1e-9


def test_parts_by_epoch_sum_to_the_whole_and_are_the_windows_of_training():
    s = scenario.train(epochs=3)
    c = contributions(s.run, s.task, targets="each", exact=True, by_epoch=True)
    whole = contributions(s.run, s.task, targets="each", exact=True)
    assert c.epochs.tolist() == [0, 1, 2]
    assert relative(c.by_epoch.sum(0), whole.values) < 1e-12
    # Only the weights of the last epoch's steps changed: the naive training with eps in that epoch alone.
    first = [t for t in range(s.run.steps) if s.run.epochs[t] < 2]
    last = scenario.reference.Plan(s.plan.batches, s.plan.options, s.plan.groups)
    eps = torch.zeros(s.n, dtype=torch.float64, requires_grad=True)
    last.shares = [
        torch.full((len(ids),), 1 / len(ids), dtype=torch.float64) * (1 / (1 + s.n * eps[ids]) if t in first else 1.0)
        for t, ids in enumerate(last.batches)
    ]
    params = {k: v.clone().requires_grad_() for k, v in s.start.items()}
    values = s.target(scenario.reference.train(s.model, params, s.data, s.losses, last, eps))
    slopes = torch.stack([torch.autograd.grad(v, eps, retain_graph=True)[0] for v in values], 1)
    assert relative(c.by_epoch[2], -slopes.numpy() / s.n) < 1e-9


def test_float32_replay_is_close_to_float64():
    s = scenario.train(dtype=torch.float32)
    single = contributions(s.run, s.task, targets="each", exact=True)
    double = contributions(s.run, s.task, targets="each", exact=True, dtype="float64")
    assert relative(single.values, double.values) < 1e-4


def test_weights_that_diverged_are_refused_naming_the_step():
    s = scenario.train(groups=[{"lr": 1e60, "weight_decay": 1.0}])
    with pytest.raises(NonFiniteError, match=r"recorded weights after step \d+ are not finite: the training diverged"):
        contributions(s.run, s.task)


def test_a_loss_that_is_not_finite_is_refused_naming_the_step():
    s = scenario.train()
    inner = s.task.loss
    s.task.loss = lambda model, batch: inner(model, batch) / (batch[0][:, 0] != s.data[0][7, 0])
    step = max(t for t in range(1, s.run.steps + 1) if 7 in s.run.sample_ids(t))
    with pytest.raises(NonFiniteError, match=f"training loss at step {step} became NaN or infinite"):
        contributions(s.run, s.task)


def test_a_target_loss_that_is_not_finite_is_refused():
    s = scenario.train()
    s.task.measure = lambda model, batch: s.task.loss(model, batch) / 0
    with pytest.raises(NonFiniteError, match="target loss at the final weights is NaN or infinite"):
        contributions(s.run, s.task)


OVERFLOWS = {
    "adjoint": r"Going backwards, the adjoint of target 3 became NaN or infinite at step (\d+): .* --steps (\d+):\d+",
    "tangent": r"Going forwards, the hypergradient of sample 4 became NaN or infinite at step (\d+): ",
}


@pytest.mark.parametrize("mode", OVERFLOWS)
def test_exact_derivatives_that_overflow_are_reported_at_their_step(mode):
    """A training whose derivatives grow by a power of ten every twenty steps."""
    s = scenario.train(groups=[{"lr": 20.0}], epochs=200, dtype=torch.float32)
    # At such a rate a step shows in how a processor rounds: what is asked here is not whether it is the same run.
    asked = {"targets": [3], "exact": True, "mode": mode, "samples": [4], "allow_drift": True}
    with pytest.raises(NonFiniteError, match=OVERFLOWS[mode]) as refusal:
        contributions(s.run, s.task, **asked)
    for part in ("beyond the range of float32", "--dtype float64 has a wider range", "(--curvature ggn) is tamer"):
        assert part in str(refusal.value)
    assert np.isfinite(contributions(s.run, s.task, dtype="float64", **asked).values).all()
    if mode == "adjoint":
        later = int(re.search(OVERFLOWS[mode], str(refusal.value))[2])
        c = contributions(s.run, s.task, steps=(later, 800), **asked)
        assert np.isfinite(c.values).all()
        assert 1e19 < c.growth.max() < np.inf


@pytest.mark.parametrize("mode", OVERFLOWS)
def test_hessian_free_derivatives_that_overflow_are_reported_at_their_step(mode):
    s = scenario.train(groups=[{"lr": 1e-30, "momentum": 1.9}], epochs=30, dtype=torch.float32)
    inner = s.task.loss
    s.task.loss = lambda model, batch: 1e18 * inner(model, batch)
    s.task.measure = lambda model, batch: 1e18 * model(batch[0])[:, 0]
    with pytest.raises(NonFiniteError, match=OVERFLOWS[mode]):
        contributions(s.run, s.task, targets=[3], exact=False, mode=mode, samples=[4], allow_drift=True)


def test_samples_that_were_never_drawn_contribute_nothing():
    s = scenario.train(sampler=[0, 1, 2, 3])
    c = contributions(s.run, s.task, exact=True)
    assert (c.values[4:] == 0).all()
    assert (c.values[:4] != 0).all()
