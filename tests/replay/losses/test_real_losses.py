"""Losses and models that people really have: operators with one derivative only, shapes that differ, lazy layers,
weights that the forward pass changes, losses that take derivatives themselves.

The truth is central differences of whole retrainings; without the Hessian, where there is nothing to train again, the
recurrence for SGD with naive gradients of single samples.
"""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made.retrained import (
    Items,
    N,
    Training,
    assert_exact,
    assert_free,
    cross_entropy,
    distance,
    gradient,
    words,
)  # fmt: skip
from trajrec.errors import DataMismatchError, DerivativeError, ReplayError, TaskError
from trajrec.replay import contributions
from trajrec.replay.derivatives.gauss_newton import GaussNewton
from trajrec.replay.losses.watching import watch
from trajrec.replay.session import Session

# -- operators without a second derivative -----------------------------------------------------------------------------


class Words(nn.Module):
    """A bag of words, summed in one of the ways that there are."""

    def __init__(self, mode):
        super().__init__()
        self.words, self.out = nn.EmbeddingBag(7, 5, mode=mode), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.words(x)))


class Prototypes(nn.Module):
    """The classes are points, the scores distances to them."""

    def __init__(self):
        super().__init__()
        self.body, self.points = nn.Linear(4, 3), nn.Parameter(torch.randn(3, 3))

    def forward(self, x):
        return -torch.cdist(torch.tanh(self.body(x)), self.points)


class OnceOnly(torch.autograd.Function):
    """A square whose backward pass is not to be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class InNumpy(OnceOnly):
    """The same in numpy."""

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(2 * ctx.saved_tensors[0].numpy() * grad.numpy())


class Squared(nn.Module):
    """A layer made of one of these functions."""

    def __init__(self, function):
        super().__init__()
        self.body, self.out, self.function = nn.Linear(4, 3), nn.Linear(3, 3), function

    def forward(self, x):
        return self.out(self.function.apply(self.body(x)))


def ctc(model, batch):
    logs = model(batch[0]).view(-1, 6, 4).transpose(0, 1).log_softmax(-1)
    lengths = torch.full((2, len(batch[0])), 6)
    return F.ctc_loss(
        logs, torch.stack([batch[1] + 1, 3 - batch[1]], 1), lengths[0], lengths[1] * 0 + 2, reduction="none"
    )


def margins(model, batch):
    return F.multi_margin_loss(model(batch[0]), batch[1], reduction="none")


def gate(*between):
    return lambda: nn.Sequential(nn.Linear(4, 6), *(make() for make in between), nn.Hardsigmoid(), nn.Linear(6, 3))


def bags(mode):
    return Training(lambda: Words(mode), data=words(N, 1), test=words(5, 2))


OPERATORS = {
    "mean of words": (bags("mean"), r"EmbeddingBag \(embedding_bag; module 'words'\)"),
    "sum of words": (bags("sum"), "EmbeddingBag"),
    "largest of words": (bags("max"), "EmbeddingBag"),
    "distances": (Training(Prototypes), "cdist"),
    "CTC loss": (Training(lambda: nn.Linear(4, 24), loss=ctc), r"CTCLoss \(ctc_loss\)"),
    "margins": (Training(lambda: nn.Linear(4, 3), loss=margins), "MultiMarginLoss"),
    "once differentiable": (Training(lambda: Squared(OnceOnly)), "@once_differentiable"),
    "in numpy": (Training(lambda: Squared(InNumpy)), "numpy"),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_without_the_hessian_operators_need_one_derivative(name):
    training, operator = OPERATORS[name]
    run = training.fit()
    assert_free(training, run)
    with pytest.raises(DerivativeError, match=operator) as refusal:
        contributions(run, training.task(), targets="each", curvature="ggn")
    assert "--curvature none" in str(refusal.value)
    assert refusal.value.exit_code == 3


@pytest.mark.parametrize("name", OPERATORS)
def test_with_the_hessian_operators_need_one_derivative_and_its_differences(name):
    training, operator = OPERATORS[name]
    run = assert_exact(training)
    proof = contributions(run, training.task(), exact=True).certificate.derivative
    assert proof.verdict == "by differences"
    assert re.search(f"no second derivative of .*{operator}", proof.sentence)


@pytest.mark.parametrize("build", [gate(), gate(lambda: nn.BatchNorm1d(6))], ids=["alone", "of a norm"])
def test_a_hard_sigmoid_is_given_its_second_derivative(build):
    training = Training(build)
    assert_free(training, assert_exact(training))


def test_an_operator_that_has_a_second_derivative_is_exact():
    assert_exact(Training(lambda: nn.Sequential(nn.Linear(4, 6), nn.Hardswish(), nn.Linear(6, 3))))


# -- weights that the forward pass changes -----------------------------------------------------------------------------


class Changing(nn.Module):
    """An embedding whose weight is changed in the forward pass, by a function of the module."""

    def __init__(self, change=None, make=nn.Embedding, **options):
        super().__init__()
        self.words, self.out, self.change = make(7, 5, **options), nn.Linear(5, 3), change

    def forward(self, x):
        if self.change is not None:
            self.change(self.words)
        y = self.words(x)
        return self.out(torch.tanh(y if y.dim() == 2 else y.mean(1)))


def clamped(module):
    module.weight.data.clamp_(-9, 9)


def assigned(module):
    module.weight.data = torch.renorm(module.weight.data, 2, 0, 99.0)


@torch.no_grad()
def copied(module):
    module.weight.copy_(module.weight * 0.99)


CHANGES = {
    "rows shortened": (lambda: Changing(max_norm=1.0), r"Embedding 'words' has max_norm=1\.0"),
    "rows of bags shortened": (
        lambda: Changing(make=nn.EmbeddingBag, max_norm=1.0),
        "EmbeddingBag 'words' has max_norm",
    ),
    "data clamped": (lambda: Changing(clamped), "parameter words.weight in place:"),
    "data assigned": (lambda: Changing(assigned), "parameter words.weight in place:"),
    "copied into": (lambda: Changing(copied), "parameter words.weight in place:"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_weights_that_the_forward_pass_changes_are_refused_by_name(name):
    build, words_of_it = CHANGES[name]
    training = Training(build, data=words(N, 1), test=words(5, 2))
    run = training.fit()
    for options in ({"exact": True}, {"curvature": "none"}, {"curvature": "none", "mode": "tangent"}):
        with pytest.raises(DerivativeError, match=words_of_it):
            contributions(run, training.task(), **options)


def test_looking_for_writes_leaves_no_trace():
    training = Training(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3)))
    session = Session(training.fit(), training.task())
    step, before = session.step_at_start(), torch.get_rng_state()
    buffers = [buffer.clone() for buffer in session.function.model.buffers()]
    watch(session.function, session.train, step)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, session.function.model.buffers(), buffers))


# -- shapes that differ ------------------------------------------------------------------------------------------------


def images(n, seed):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(1, 6 + i % 3, 7 + i % 2, generator=g, dtype=torch.float64) for i in range(n)]
    return Items(made, torch.randint(0, 3, (n,), generator=g))


def seeing():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3))


class Reader(nn.Module):
    """A recurrent network over sequences of vectors."""

    def __init__(self):
        super().__init__()
        self.body, self.out = nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, x):
        return self.out(self.body(x)[1][0])


def sequences(n, seed):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(2 + i % 3, 2, generator=g, dtype=torch.float64) for i in range(n)]
    return Items(made, torch.randint(0, 3, (n,), generator=g))


SHAPES = {
    "images one by one": Training(seeing, data=images(N, 1), test=images(5, 2), batches=[[i] for i in range(N)]),
    "buckets of lengths": Training(
        Reader, data=sequences(N, 1), test=sequences(7, 2), batches=[[0, 3], [1, 4, 7], [2, 5], [6, 9], [8, 11], [10]]
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_samples_of_several_shapes(name):
    training = SHAPES[name]
    run = assert_exact(training)
    assert_free(training, run)
    by_class = contributions(run, training.task(), targets="mean", exact=True).values
    assert (
        distance(
            by_class, contributions(run, training.task(), targets="each", exact=True).values.mean(1, keepdims=True)
        )
        < 1e-9
    )


def test_samples_that_were_one_batch_and_make_none_now_are_named():
    training = SHAPES["buckets of lengths"]
    run = training.fit()
    training = Training(Reader, data=Items(training.data.x[::-1], training.data.y), test=training.test)
    training.data.x[4] = training.data.x[4][:1]
    with pytest.raises(DataMismatchError, match=r"The samples of step \d+ \(1, 4, 7\) were one batch in the training"):
        contributions(run, training.task(), exact=True, allow_drift=True)


# -- lazy layers -------------------------------------------------------------------------------------------------------


def lazy():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.LazyConv1d(4, 1), nn.LazyBatchNorm1d(),
        nn.LazyInstanceNorm1d(affine=True), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip


def ready():
    return nn.Sequential(
        nn.Unflatten(1, (2, 2)), nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def passed(model):
    with torch.no_grad():
        model(torch.ones(2, 4, dtype=torch.float64))
    return model


def test_lazy_layers_give_what_layers_with_shapes_give():
    training = Training(lazy, begin=passed)
    run = training.fit()
    before = torch.get_rng_state()
    found = contributions(run, training.task(), targets="each", exact=True, mode="tangent").values
    assert torch.equal(torch.get_rng_state(), before)
    assert (
        found == contributions(run, training.task(model=ready), targets="each", exact=True, mode="tangent").values
    ).all()


def test_lazy_layers_that_get_no_shapes_are_refused():
    training = Training(lazy, begin=passed)
    run = training.fit()
    for loss, why in (
        (lambda model, batch: batch[0].sum(1), "does not use them"),
        (lambda model, batch: cross_entropy(model, [batch[0][0]]), "failed with"),
    ):
        with pytest.raises(TaskError, match=f"The Task's model is lazy: 1.weight, 1.bias, .* {why}"):
            contributions(run, training.task(loss=loss))
    with pytest.raises(TaskError, match="cannot be copied"):
        contributions(run, training.task(model=lazy()))


# -- losses that take derivatives themselves ---------------------------------------------------------------------------


def curve(n, seed):
    x = torch.linspace(0, 3, n, dtype=torch.float64)[:, None] + 0.1 * seed
    return Items(x, x)


def physics(model, batch):
    x = batch[0].clone().requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    return ((ddu + torch.sin(x)) ** 2)[:, 0] + (u[:, 0] - torch.sin(x[:, 0])) ** 2


def fit_of_curve(model, batch):
    return (model(batch[0])[:, 0] - torch.sin(batch[0][:, 0])) ** 2


def penalised(model, batch):
    x = batch[0].clone().requires_grad_()
    losses = F.cross_entropy(model(x), batch[1], reduction="none")
    (slope,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + 0.3 * (slope.square().sum(1) - 1).clamp(min=0)


def bend():
    return nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))


class Critic(nn.Module):
    """A network with one of the norms, which torch differentiates wrongly three times."""

    def __init__(self, norm):
        super().__init__()
        self.into, self.norm, self.out = nn.Linear(4, 6), norm(), nn.Linear(6, 3)

    def forward(self, x):
        x = self.into(x)
        x = self.norm(x.view(-1, 2, 3)).flatten(1) if isinstance(self.norm, nn.InstanceNorm1d) else self.norm(x)
        return self.out(torch.tanh(x))


def plainly_tested(model, batch):
    """A target that running statistics are not in."""
    return model.into(batch[0]).square().sum(1)


def slopes(model, batch):
    """Physics by torch.func."""
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    u = lambda x: torch.func.functional_call(model, weights, (x[None],))[0, 0]  # noqa: E731
    return (torch.vmap(torch.func.grad(u))(batch[0])[:, 0] - torch.cos(batch[0][:, 0])) ** 2


def penalty(norm=nn.Identity, measure=plainly_tested):
    return Training(lambda: Critic(norm), penalised, measure=measure)


OWN_DERIVATIVES = {
    "physics": Training(bend, physics, curve(N, 0), curve(5, 1), measure=fit_of_curve),
    "physics of targets": Training(bend, physics, curve(N, 0), curve(5, 1)),
    "physics by transforms": Training(bend, slopes, curve(N, 0), curve(5, 1), measure=fit_of_curve),
    "gradient penalty": penalty(measure=cross_entropy),
    "gradient penalty through batches": penalty(lambda: nn.BatchNorm1d(6)),
    "gradient penalty through layers": penalty(lambda: nn.LayerNorm(6), cross_entropy),
    "gradient penalty through instances": penalty(lambda: nn.InstanceNorm1d(2, affine=True), cross_entropy),
    "gradient penalty through groups": penalty(lambda: nn.GroupNorm(2, 6), cross_entropy),
}


@pytest.mark.parametrize("name", OWN_DERIVATIVES)
def test_losses_may_take_derivatives_themselves(name):
    training = OWN_DERIVATIVES[name]
    run = assert_exact(training)
    assert_free(training, run)


def test_the_gauss_newton_form_of_physics_has_the_derivatives_among_the_outputs():
    """With z = (u, u''), which the loss is a sum of squares of: G = 2 sum c (grad u grad u^T + grad u'' grad u''^T)."""
    training = OWN_DERIVATIVES["physics"]
    run = training.fit()
    session = Session(run, training.task())
    step = session.step_at_start()
    found = GaussNewton(session.function, session.train, step).products(torch.eye(session.layout.size).double())
    model = bend().double()
    nn.utils.vector_to_parameters(step.before, model.parameters())
    x = training.data.x[torch.as_tensor(step.ids)].requires_grad_()
    u = model(x)
    (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
    rows = torch.stack([gradient(v, list(model.parameters())) for v in (*u.flatten(), *ddu.flatten())])
    torch.testing.assert_close(found, 2 * rows.T @ rows / len(x), rtol=1e-9, atol=1e-12)
    values = [
        contributions(run, training.task(), targets="each", curvature="ggn", mode=m).values
        for m in ("adjoint", "tangent")
    ]
    assert distance(*values) < 1e-9


@pytest.mark.parametrize("name", ["gradient penalty", "physics by transforms"])
def test_no_gauss_newton_form_of_slopes_of_the_loss_itself(name):
    training = OWN_DERIVATIVES[name]
    with pytest.raises(ReplayError, match="curvature='ggn' is not defined for this loss"):
        contributions(training.fit(), training.task(), curvature="ggn")
