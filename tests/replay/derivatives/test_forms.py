"""Every form of computing a step's derivatives gives the same; the operators made for it are right one by one."""

from dataclasses import replace

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import nn
from torch.nn import functional

from tests.made import scenario
from tests.made.replays import solved
from trajrec.replay import contributions
from trajrec.replay.derivatives import choice
from trajrec.replay.derivatives.choice import FORMS, agree, fastest, right_forms
from trajrec.replay.derivatives.dual_rules import DualOperators, dual_of, parts_of
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.session import Session
from trajrec.replay.step import Part


class Attention(nn.Module):
    """Tokens of one number each, a causal self-attention, norm and GELU."""

    def __init__(self):
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(1, 12), nn.LayerNorm(4), nn.Linear(16, 3)

    def forward(self, x):
        q, k, v = self.into(x[..., None]).split(4, -1)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(functional.gelu(self.norm(y)).flatten(1))


def pooled():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 3, padding=3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(27, 3),
    )  # fmt: skip


def norms():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.BatchNorm1d(2, affine=False), nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), nn.Tanh(),
        nn.Flatten(), nn.LayerNorm(8, elementwise_affine=False), nn.GELU(), nn.Linear(8, 3), nn.LogSoftmax(1),
    )  # fmt: skip


MODELS = {
    "mlp": scenario.mlp,
    "convolution": scenario.convolution,
    "batch norm": scenario.batch_norm,
    "dropout": scenario.dropout,
    "attention": Attention,
    "pooling": pooled,
    "norms": norms,
}
COUPLED = ("batch norm", "norms")


def point(name, parts=1):
    """A session of a recorded run, and a step of it, cut into micro-batches."""
    s = scenario.train(MODELS[name])
    session = Session(s.run, s.task)
    step = next(iter(session.trajectory.backwards(3)))
    if parts == 2:
        rng = step.parts[0].rng
        step = replace(step, parts=(Part(slice(0, 3), rng), Part(slice(3, 5), rng)))
    return session, step


def derivatives(session, step, form, directions, hessian=True):
    made = FORMS[form](session.function, session.train, step, 2)
    return made.along(directions, hessian=hessian, gradient=True)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_form_gives_the_same_and_the_hessian_is_the_gradients_slope(name, parts):
    session, step = point(name, parts)
    directions = torch.randn(3, session.layout.size, dtype=torch.float64)
    found = {form: derivatives(session, step, form, directions) for form in ("reverse", "forward")}
    for other in found.values():
        torch.testing.assert_close(other.inner, found["reverse"].inner, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(other.hvp, found["reverse"].hvp, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(other.gradient, found["reverse"].gradient, rtol=1e-10, atol=1e-13)
    h = 1e-6
    ends = [
        gradient_of(session.function, session.train, replace(step, before=step.before + e * directions[0]))
        for e in (h, -h)
    ]
    torch.testing.assert_close(found["forward"].hvp[0], (ends[0] - ends[1]) / (2 * h), rtol=1e-5, atol=1e-7)
    forms = () if name in COUPLED else ("layers",) if name == "dropout" else ("samples", "layers")
    for form in forms:
        free = derivatives(session, step, form, directions, hessian=False)
        torch.testing.assert_close(free.inner, found["reverse"].inner, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(free.gradient, found["reverse"].gradient, rtol=1e-10, atol=1e-13)


def test_coupled_or_random_samples_are_not_taken_one_by_one():
    for name in (*COUPLED, "dropout"):
        session, step = point(name)
        directions = torch.randn(3, session.layout.size, dtype=torch.float64)

        def trial(form, session=session, step=step, directions=directions):
            return derivatives(session, step, form, directions, hessian=False)

        # Of random samples one pass over the batch as it was draws the same numbers.
        right = ["reverse", "layers", "forward"] if name == "dropout" else ["reverse", "forward"]
        assert list(right_forms(("samples", "layers", "forward"), trial)) == right


def test_a_form_that_is_wrong_is_not_used(monkeypatch):
    """torch's own forward derivative of BatchNorm cannot be differentiated again: the case that made this check."""
    session, step = point("batch norm")
    directions = torch.randn(1, session.layout.size, dtype=torch.float64)

    def trial(form):
        return derivatives(session, step, form, directions)

    assert list(right_forms(("forward",), trial)) == ["reverse", "forward"]
    monkeypatch.setattr("trajrec.replay.derivatives.dual_rules.HANDLERS", {})
    assert list(right_forms(("forward",), trial)) == ["reverse"]
    assert agree(trial("reverse"), trial("reverse"))


@pytest.mark.parametrize("form", ["forward", "reverse", "samples", "layers"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_replay_in_any_form_gives_the_same_contributions(form, exact):
    s = scenario.train()
    session = Session(s.run, s.task)
    expected = s.reference(exact)
    for targets in ("each", "mean"):
        c = solved(session, targets, exact=exact, mode="adjoint", form=form, block=4)
        of_mean = expected.mean(1, keepdims=True)
        assert abs(c.values - (expected if targets == "each" else of_mean)).max() < 1e-9 * abs(expected).max()


def test_the_fastest_of_the_right_forms_is_taken_once(monkeypatch):
    tried = []
    monkeypatch.setattr(choice, "fastest", lambda names, trial: tried.append(names) or names[0])
    s = scenario.train()
    contributions(s.run, s.task, exact=True)
    assert tried == [("forward", "reverse")] * 2  # whole batches, and the smaller one at the end of an epoch


def test_between_forms_that_are_about_as_fast_the_order_decides(monkeypatch):
    for seconds, expected in ((105, "forward"), (120, "reverse")):
        monkeypatch.setattr(choice, "right_forms", lambda *_, s=seconds: {"reverse": 100, "forward": s})
        assert fastest(("forward", "reverse"), None) == expected


# A padded place attends to nothing: torch makes it zero.
PADDED = torch.ones(6, 6).tril(-1).bool()
OPERATORS = {
    "log_softmax": lambda x: functional.log_softmax(x.flatten(1), -1),
    "softmax": lambda x: torch.softmax(x, 2),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "cross_entropy": lambda x: functional.cross_entropy(x.flatten(1), torch.arange(len(x)), reduction="none"),
    "cross_entropy of pixels": lambda x: functional.cross_entropy(x, torch.ones(4, 6, 6).long(), reduction="none"),
    "batch_norm": lambda x: functional.batch_norm(x, None, None, x[0, :, 0, 0], x[0, :, 1, 1], training=True),
    "layer_norm": lambda x: functional.layer_norm(x, (6, 6), x[0, 0], x[0, 1]),
    "gelu": functional.gelu,
    "gelu by tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "max_pool2d": lambda x: functional.max_pool2d(x * x, 2),
    "max_pool2d by three": lambda x: functional.max_pool2d(x * x, 3, 1, 1),
    "attention": lambda x: functional.scaled_dot_product_attention(x, x * x, x + 1, attn_mask=torch.eye(6).bool()),
    "attention with a bias": lambda x: functional.scaled_dot_product_attention(x[:1], x * x, x + 1, attn_mask=x[0, 0]),
    "attention to nothing": lambda x: functional.scaled_dot_product_attention(x, x * x, x + 1, attn_mask=PADDED),
    "attention to constants": lambda x: functional.scaled_dot_product_attention(x, torch.ones(6, 6).double(), x),
    "conv2d": lambda x: functional.conv2d(x, x[:2, :, :2, :3], x[0, 0, 0, :2], stride=(1, 2), padding=1),
    "conv2d of constants": lambda x: functional.conv2d(torch.ones(4, 3, 6, 6).double(), x[:2, :, :2, :3], dilation=2),
    "conv2d in groups": lambda x: functional.conv2d(x, x[:3, :1, :2, :3], groups=3),
    "linear": lambda x: functional.linear(x, x[0, 0], x[0, 1, 0]),
    "linear of a vector": lambda x: functional.linear(x[0, 0, 0], x[0, 1], x[0, 2, 1]),
    "linear of constants": lambda x: functional.linear(torch.ones(5, 6).double(), x[0, 0]),
}


def value_and_tangent(f, x, v):
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), fwd.dual_level():
        return parts_of(f(dual_of(x, v)))


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_carry_tangents_that_can_be_differentiated(name):
    """Value and tangent against torch's own; the gradient of a function of both against finite differences of these.

    Not against torch's double backward: that of BatchNorm is itself wrong once it is differentiated again.
    """
    torch.manual_seed(0)
    f = OPERATORS[name]
    x, v, d, e = (torch.randn(4, 3, 6, 6, dtype=torch.float64) for _ in range(4))
    expected = value_and_tangent(f, x, v)
    a, b = torch.randn_like(expected[0]), torch.randn_like(expected[1])

    def scalar(x, v):
        value, tangent = value_and_tangent(f, x, v)
        return (a * value).sum() + (b * tangent).sum()

    x, v = x.requires_grad_(), v.requires_grad_()
    with DualOperators():
        found = value_and_tangent(f, x, v)
        gradients = torch.autograd.grad(scalar(x, v), (x, v))
    torch.testing.assert_close(found, expected)
    if not name.startswith("attention"):
        assert torch.equal(found[0], expected[0])
    h = 1e-6
    with torch.no_grad():
        slope = (scalar(x + h * d, v + h * e) - scalar(x - h * d, v - h * e)) / (2 * h)
    along = (gradients[0] * d).sum() + (gradients[1] * e).sum()
    torch.testing.assert_close(along, slope, rtol=1e-6, atol=1e-6)
