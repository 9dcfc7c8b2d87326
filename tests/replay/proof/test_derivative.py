"""The second proof: planted faults are found and named, and clean losses pass."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.made.retrained import Training, assert_exact, assert_free, cross_entropy, distance, vectors
from trajrec.errors import DerivativeError
from trajrec.replay import contributions, hypergradients
from trajrec.replay.derivatives.reverse import ReversePoint
from trajrec.replay.proof.derivative import proved_steps
from trajrec.replay.session import Session


def mlp(*between):
    return lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), *(make() for make in between), nn.Linear(6, 3))


# -- what is wrong and not seen through --------------------------------------------------------------------------------


def by_item(model, batch):
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1], reduction="none") * (1 + scores[:, 0].square().mean().item())


def by_numpy(model, batch):
    scores = model(batch[0])
    weights = torch.from_numpy(np.exp(-(scores.detach().numpy() ** 2)).mean(1))
    return F.cross_entropy(scores, batch[1], reduction="none") * weights


def in_place(model, batch):
    scores = model(batch[0])
    with torch.no_grad():
        scores.mul_(1 + scores.square())
    return F.cross_entropy(scores, batch[1], reduction="none")


class Cutting(torch.autograd.Function):
    """x sigmoid(x), whose backward pass holds the sigmoid for a constant."""

    @staticmethod
    def forward(ctx, x):
        ctx.y = x.detach().sigmoid()
        return x * ctx.y

    @staticmethod
    def backward(ctx, bar):
        return bar * ctx.y


def by_context(model, batch):
    return F.cross_entropy(Cutting.apply(model(batch[0])), batch[1], reduction="none")


def by_dlpack(model, batch):
    scores = model(batch[0])
    return F.cross_entropy(scores, batch[1], reduction="none") * (
        1 + torch.from_dlpack(scores.detach()).square().sum(1)
    )


def out(model, batch):
    scores = model(batch[0])
    with torch.no_grad():
        weights = torch.mul(scores, scores, out=torch.empty_like(scores))
    return F.cross_entropy(scores, batch[1], reduction="none") * (1 + weights.sum(1))


def only_a_constant(model, batch):
    scores = model(batch[0])
    weights = (2 * scores).detach()
    weights.requires_grad = False
    return F.cross_entropy(scores, batch[1], reduction="none") * (1 + weights.square().sum(1))


def backward_inside(model, batch):
    x = batch[0].clone().requires_grad_()
    F.cross_entropy(model(x), batch[1]).backward(inputs=[x])
    return cross_entropy(model, (x.detach() + 0.3 * x.grad / x.grad.norm(dim=1, keepdim=True), batch[1]))


HIDDEN = {
    "item": (by_item, r"by \.item\(\) in test_derivative\.py, line \d+"),
    "numpy": (by_numpy, r"by \.numpy\(\) in test_derivative\.py, line \d+"),
    "in place": (in_place, "changed in place under no_grad"),
    "dlpack": (by_dlpack, r"by dlpack in test_derivative\.py, line \d+"),
    "out=": (out, "not seen through"),
    "only a constant": (only_a_constant, "cuts off from its graph and uses as only a constant can be"),
    "backward inside": (backward_inside, r"calls backward\(\) itself"),
    "on a context": (by_context, "the backward pass of Cutting"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_derivative_sees_is_refused_backwards_by_name_and_differenced_forwards(name):
    loss, named = HIDDEN[name]
    training = Training(mlp(), loss=loss, measure=cross_entropy)
    run, truth = training.fit(), training.truth((0, 5, 11))
    with pytest.raises(DerivativeError, match=named) as refusal:
        contributions(run, training.task(), targets="mean", mode="adjoint")
    assert "--mode tangent" in str(refusal.value)
    assert "--hessian-free" in str(refusal.value)
    samples = np.array([0, 5, 11])
    found = contributions(run, training.task(), targets="each", samples=samples, mode="tangent")
    assert distance(found.values, truth) < 1e-6
    assert found.certificate.derivative.verdict == "by differences"
    with hypergradients(run, training.task(), samples=samples) as made:
        assert made.certificate.derivative.verdict == "by differences"
    assert_free(training, run)


def hook_of_a_node(model, batch):
    """Shows nowhere but in the gradient, which is not the sum of the samples' own."""
    scores = 1 * model(batch[0])
    if scores.grad_fn is not None:
        scores.grad_fn.register_prehook(lambda bars: tuple(torch.tanh(8 * bar) / 8 for bar in bars))
    return F.cross_entropy(scores, batch[1], reduction="none")


def test_a_hook_that_shows_nowhere_is_found_by_what_it_makes_of_the_samples_gradients():
    training = Training(mlp(), loss=hook_of_a_node, measure=cross_entropy)
    run, truth = training.fit(), training.truth((0, 5, 11))
    with pytest.raises(DerivativeError, match="a backward hook"):
        contributions(run, training.task(), targets="mean", mode="adjoint")
    found = contributions(run, training.task(), targets="each", samples=np.array([0, 5, 11]), mode="tangent")
    assert distance(found.values, truth) < 1e-6


def scaled(model, batch):
    """A factor by `.item()`: the derivative is the gradient's outer product with itself more, and symmetric."""
    losses = cross_entropy(model, batch)
    return losses * (1 + losses.mean().item())


def test_where_it_is_symmetric_differences_serve_backwards_as_well():
    training = Training(mlp(), loss=scaled, measure=cross_entropy)
    proof = contributions(assert_exact(training), training.task()).certificate.derivative
    assert proof.verdict == "by differences"
    assert ".item() in test_derivative.py" in proof.sentence


@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0])
def test_a_second_derivative_that_is_wrong_by_a_little_is_found(monkeypatch, size):
    training = Training(mlp())
    session = Session(training.fit(), training.task())
    along = ReversePoint.along

    def wrong(self, directions, **options):
        found = along(self, directions, **options)
        found.hvp[:, :4] *= 1 + size
        return found

    monkeypatch.setattr(ReversePoint, "along", wrong)
    session.prove_derivative(forwards=False)
    assert session.derivative.verdict == "by differences"


def noisy_gradient(model, batch):
    """A gradient that is no function of the weights: it has no derivative."""
    losses = cross_entropy(model, batch)
    losses.register_hook(lambda bar: bar * (1 + 0.1 * np.random.default_rng().random()))
    return losses


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_a_gradient_that_has_no_derivative_is_refused_in_both_directions(mode):
    training = Training(mlp(), loss=noisy_gradient, measure=cross_entropy)
    with pytest.raises(DerivativeError, match="backward hook"):
        contributions(training.fit(), training.task(), mode=mode, allow_drift=True)


# -- what is right -----------------------------------------------------------------------------------------------------


class Experts(nn.Module):
    """Two of four experts for every sample."""

    def __init__(self):
        super().__init__()
        self.gate, self.experts = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 3) for _ in range(4))

    def forward(self, x):
        weights, places = self.gate(x).softmax(1).topk(2, 1)
        out = x.new_zeros(len(x), 3)
        for k, expert in enumerate(self.experts):
            rows, columns = (places == k).nonzero(as_tuple=True)
            if len(rows):
                out = out.index_add(0, rows, expert(x[rows]) * weights[rows, columns][:, None])
        return out


def still():
    """Biases that begin as zeros before inputs of zeros: kinks are hit exactly. And a layer that is dead."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.bias.zero_()
        model[2].weight.zero_()
    return model


def mostly_zeros(n, seed):
    items = vectors(n, seed)
    items.x[::2] = 0
    return items


def mixed(model, batch):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = model(batch[0])
    return F.cross_entropy(scores.float(), batch[1], reduction="none")


def constants(model, batch):
    return F.cross_entropy(model(batch[0]) + torch.zeros(3, dtype=torch.float32), batch[1], reduction="none")


def logged(model, batch):
    losses = cross_entropy(model, batch)
    model.last = losses.mean().item()
    with torch.no_grad():
        model.right = (model(batch[0]).argmax(1) == batch[1]).float().mean().item()
    return losses


CLEAN = {
    "smooth": Training(mlp()),
    "ReLU": Training(lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))),
    "zeros and dead units": Training(still, data=mostly_zeros(12, 1)),
    "batch norm": Training(mlp(lambda: nn.BatchNorm1d(6))),
    "layer norm": Training(mlp(lambda: nn.LayerNorm(6))),
    "dropout": Training(mlp(lambda: nn.Dropout(0.5))),
    "experts": Training(Experts),
    "mixed precision": Training(mlp(), loss=mixed),
    "constants in float32": Training(mlp(), loss=constants),
    "logging": Training(mlp(), loss=logged),
    "a linear loss": Training(
        lambda: nn.Linear(4, 3), loss=lambda model, batch: model(batch[0]).gather(1, batch[1][:, None])[:, 0]
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CLEAN)
def test_clean_losses_pass(name, dtype):
    training = CLEAN[name]
    session = Session(training.fit(), training.task(), dtype=dtype, allow_drift=True)
    for forwards in (False, True):
        session.prove_derivative(forwards=forwards)
        assert session.derivative.verdict == "proved"
        assert session.derivative.worst < 1e-6


def test_a_loss_that_knows_the_size_of_its_batches_is_proved_on_the_whole():
    def loss(model, batch):
        return cross_entropy(model, batch).view(2, 2).flatten() + model(batch[0]).view(4, 3).sum(1) * 0.1

    training = Training(mlp(), loss=loss, measure=cross_entropy)
    run = training.fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trajrec.replay.proof.derivative._FEW", 3)
        found = contributions(run, training.task()).certificate.derivative
    assert found.verdict == "proved"


def test_where_float64_is_not_to_be_had_it_is_not_proved_and_said():
    class Narrow(nn.Module):
        """Computes through numbers of 32 bits."""

        def __init__(self):
            super().__init__()
            self.body = mlp()()

        def forward(self, x):
            return self.body(x).to(x.new_zeros(1).type(torch.FloatTensor)).to(x)

    training = Training(Narrow)
    session = Session(training.fit(), training.task(), allow_drift=True)
    session.prove_derivative(forwards=False)
    assert session.derivative.verdict == "not proved"
    assert "computes in float32 inside" in session.derivative.sentence


def test_a_loss_that_fails_in_float64_is_not_proved_and_said():
    def loss(model, batch):
        assert batch[0].dtype == torch.float32
        return cross_entropy(model, batch)

    training = Training(mlp(), loss=loss, measure=cross_entropy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.made.retrained.cross_entropy", cross_entropy)
        training.loss = cross_entropy
        run = training.fit()
    training.loss = loss
    found = contributions(run, training.task(), dtype="float32", allow_drift=True)
    assert found.certificate.derivative.verdict == "not proved"
    assert "cannot be computed in float64 (AssertionError" in found.certificate.derivative.sentence


def test_approximations_are_not_proved_against_a_derivative_that_they_leave_out():
    training = CLEAN["smooth"]
    run = training.fit()
    for curvature in ("none", "ggn", "kinks"):
        assert contributions(run, training.task(), curvature=curvature).certificate.derivative is None


# -- where -------------------------------------------------------------------------------------------------------------


class Long:
    """What the choice of steps looks at."""

    def __init__(self, steps, keyframes=None):
        self.run, self.is_keyframed = self, keyframes is not None
        self.steps, self.keyframe_steps = steps, keyframes


@pytest.mark.parametrize(
    ("session", "steps"),
    [
        (Long(1), (1,)),
        (Long(2), (1, 2)),
        (Long(500), (1, 251, 500)),
        (Long(2000), (1, 501, 1001, 1500, 2000)),
        (Long(500, (0, 200, 400, 500)), (1, 201, 401)),
    ],
)
def test_the_first_step_the_last_and_some_between_are_tried(session, steps):
    assert proved_steps(session) == steps
