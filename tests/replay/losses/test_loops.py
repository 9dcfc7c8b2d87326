"""What training loops do: every feature is recorded, certified, and replayed exactly.

The independent route is the loop itself: central differences of whole trainings with one sample's weight moved a
little, in float64. Adjoint and tangent must both give that, exactly; without the Hessian they must agree.
"""

import copy
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import trajrec
from tests.made import loops
from tests.made.loops import CLASSES, Loop, N, Objective, cut, mlp, sgd
from trajrec.errors import DriftError
from trajrec.replay import contributions

H = 1e-5
SAMPLES = (0, 5, 11)


def differences(loop, samples=SAMPLES):
    """C(i, j) of some samples by central differences of whole trainings."""
    rows = []
    for sample in samples:
        e = torch.zeros(N, dtype=torch.float64)
        e[sample] = H
        slope = (loops.train(loop, e).values - loops.train(loop, -e).values) / (2 * H)
        rows.append(-slope / N)
    return torch.stack(rows).numpy()


def relative(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


def check(loop, tolerance=1e-6):
    made = loops.train(loop)
    expected = differences(loop)
    assert np.abs(expected).max() > 1e-6
    for mode in ("adjoint", "tangent"):
        asked = {"samples": np.array(SAMPLES), "exact": True, "mode": mode, "device": loop.device}
        c = contributions(made.run, made.task, targets="each", **asked)
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert c.certificate.steps_checked == made.run.steps
        assert relative(c.values, expected) < tolerance
    fast = [
        contributions(made.run, made.task, targets="each", exact=False, mode=mode).values
        for mode in ("adjoint", "tangent")
    ]
    assert relative(fast[0], fast[1]) < 1e-9
    assert relative(fast[0][list(SAMPLES)], expected) > 1e-3, "the Hessian would not matter here"
    return made


# -- schedules and hyperparameters -------------------------------------------------------------------------------------


class Scheduled:
    """Hooks that step a scheduler made at the first step."""

    def __init__(self, make, per_epoch=False, plateau=False):
        self.make, self.per_epoch, self.plateau, self.scheduler = make, per_epoch, plateau, None

    def optimizer(self, model):
        optimizer = sgd(model)
        self.scheduler = self.make(optimizer)
        return optimizer

    def after_step(self, *_):
        if not (self.per_epoch or self.plateau):
            self.scheduler.step()

    def after_epoch(self, model, optimizer, epoch, loss):
        if self.plateau:
            self.scheduler.step(loss)
        elif self.per_epoch:
            self.scheduler.step()

    def loop(self):
        return Loop(optimizer=self.optimizer, after_step=self.after_step, after_epoch=self.after_epoch)


lrs = torch.optim.lr_scheduler
SCHEDULES = {
    "step per epoch": (lambda o: lrs.StepLR(o, 1, 0.5), True, False),
    "one cycle per step": (lambda o: lrs.OneCycleLR(o, 0.3, total_steps=30), False, False),
    "cosine restarts": (lambda o: lrs.CosineAnnealingWarmRestarts(o, 4), False, False),
    "warm-up and decay": (
        lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o, 0.1, 1.0, 3), lrs.ExponentialLR(o, 0.9)], [3]),
        False,
        False,
    ),
    "cyclic momentum": (lambda o: lrs.CyclicLR(o, 0.05, 0.3, 2, base_momentum=0.5, max_momentum=0.9), False, False),
    "on plateau": (lambda o: lrs.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.5), False, True),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_schedules(name):
    made = check(Scheduled(*SCHEDULES[name]).loop())
    assert len({made.run.hyper(t).tobytes() for t in range(1, made.run.steps + 1)}) > 1


def test_hyperparameters_changed_by_hand():
    def change(model, optimizer, t):
        if t == 4:
            optimizer.param_groups[0].update(momentum=0.3, weight_decay=0.2, nesterov=True)

    check(Loop(after_step=change))


# -- which parameters --------------------------------------------------------------------------------------------------


def no_decay_on_biases(model):
    biases = [p for name, p in model.named_parameters() if "bias" in name]
    weights = [p for name, p in model.named_parameters() if "bias" not in name]
    return torch.optim.AdamW([{"params": weights, "weight_decay": 0.3}, {"params": biases}], lr=0.02, weight_decay=0.0)


def frozen_first_layer(model):
    model[0].requires_grad_(False)
    return sgd(model)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def toggles(steps, zero=False):
    """Freezes or unfreezes the first layer after these steps."""

    def change(model, optimizer, t):
        if t in steps:
            model[0].requires_grad_(steps[t])
            model.zeros = zero
        if getattr(model, "zeros", False):
            for p in model[0].parameters():
                p.grad = torch.zeros_like(p)

    return change


def added_group(model, optimizer, t):
    if t == 4:
        model[0].requires_grad_(True)
        optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.05})


def head_only(make):
    def optimizer(model):
        model[0].requires_grad_(False)
        return make(model[2])

    return optimizer


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


PARAMETERS = {
    "no decay on biases": Loop(optimizer=no_decay_on_biases),
    "frozen from the start": Loop(optimizer=frozen_first_layer),
    "frozen later": Loop(after_step=toggles({4: False})),
    "frozen later, gradients of zeros": Loop(after_step=toggles({4: False}, zero=True)),
    "frozen later, gradients of zeros, Adam": Loop(optimizer=adam, after_step=toggles({4: False}, zero=True)),
    "unfrozen later": Loop(optimizer=frozen_first_layer, after_step=toggles({4: True})),
    "unfrozen and frozen again, Adam": Loop(optimizer=adam, after_step=toggles({2: False, 5: True, 7: False})),
    "a group added later": Loop(optimizer=head_only(sgd), after_step=added_group),
    "a group added later, Adam": Loop(optimizer=head_only(adam), after_step=added_group),
    "tied": Loop(build=Tied),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_which_parameters_take_part(name):
    check(PARAMETERS[name])


# -- accumulation, clipping, scaling -----------------------------------------------------------------------------------


def batch_norm():
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, CLASSES)
    )


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, CLASSES))


class Shared(Objective):
    """A loss divided by the number of micro-batches."""

    def __init__(self, parts):
        super().__init__()
        self.parts = parts

    def __call__(self, model, batch, eps):
        return super().__call__(model, batch, eps) / self.parts


class OfTheWhole(Objective):
    """The sum of a micro-batch's losses over the size of the whole batch."""

    def __call__(self, model, batch, eps):
        return super().__call__(model, batch, eps) * len(batch[0]) / 6


ACCUMULATION = {
    "equal loader batches": Loop(batch_size=3, every=2, objective=Shared(2)),
    "the last step has fewer": Loop(batch_size=4, every=2, objective=Shared(2), epochs=2),
    "equal pieces of a batch": Loop(pieces=cut(3), objective=Shared(2)),
    "unequal pieces, mean of means": Loop(pieces=cut(2), objective=Shared(2)),
    "unequal pieces, mean": Loop(pieces=cut(1, 3), objective=OfTheWhole()),
    "unequal pieces, sum of means": Loop(pieces=cut(2)),
    "batch norm": Loop(build=batch_norm, pieces=cut(2), objective=Shared(2)),
    "dropout": Loop(build=dropout, batch_size=3, every=2, objective=Shared(2)),
    "Adam": Loop(optimizer=adam, batch_size=3, every=2, objective=Shared(2)),
}


@pytest.mark.parametrize("name", ACCUMULATION)
def test_gradient_accumulation(name):
    made = check(ACCUMULATION[name])
    assert len(made.run.parts(1)) > 1


def clips_norm(limit, norm_type=2.0):
    def clip(model, optimizer):
        torch.nn.utils.clip_grad_norm_(model.parameters(), limit, norm_type)

    return clip


def clips_value(model, optimizer):
    torch.nn.utils.clip_grad_value_(model.parameters(), 0.05)


def halves(model, optimizer):
    for p in model.parameters():
        p.grad.mul_(0.5)


GRADIENTS = {
    "clipped by norm": (clips_norm(0.3), trajrec.clip_norm(0.3)),
    "clipped by norm at some steps": (clips_norm(0.9), trajrec.clip_norm(0.9)),
    "clipped by largest value": (clips_norm(0.1, float("inf")), trajrec.clip_norm(0.1, float("inf"))),
    "clipped by value": (clips_value, trajrec.clip_value(0.05)),
    "scaled by hand": (halves, lambda gradients: {name: 0.5 * g for name, g in gradients.items()}),
}


@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_what_is_done_to_gradients(name, optimizer):
    before_step, gradient = GRADIENTS[name]
    check(Loop(optimizer=optimizer, before_step=before_step, task={"gradient": gradient}))


class Scaled:
    """Mixed precision's loss scaling."""

    def __init__(self):
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)

    def step(self, optimizer):
        self.scaler.step(optimizer)
        self.scaler.update()


def test_loss_scaling():
    def train_with_a_fresh_scaler():
        scaled = Scaled()
        return Loop(backward=lambda loss: scaled.scaler.scale(loss).backward(), step=scaled.step)

    made = loops.train(train_with_a_fresh_scaler())
    e = torch.zeros(N, dtype=torch.float64)
    e[5] = H
    values = [loops.train(train_with_a_fresh_scaler(), s * e).values for s in (1, -1)]
    expected = (-(values[0] - values[1]) / (2 * H * N)).numpy()
    c = contributions(made.run, made.task, targets="each", samples=[5], exact=True)
    assert relative(c.values[0], expected) < 1e-6


# -- losses ------------------------------------------------------------------------------------------------------------

CLASS_WEIGHTS = torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)


def class_weighted(model, batch, eps):
    """As F.cross_entropy(..., weight=) does it, with sample weights."""
    x, y, ids = batch
    w = CLASS_WEIGHTS.to(y.device, x.dtype)[y]
    losses = F.cross_entropy(model(x), y, reduction="none")
    value = (w * losses * (1 + N * eps[ids])).sum() / w.sum()
    if not eps.any():
        torch.testing.assert_close(value, F.cross_entropy(model(x), y, weight=CLASS_WEIGHTS.to(x)))
    return value


def sample_weighted(model, batch, eps):
    w = 1.0 + batch[2] % 3
    return (w * loops.per_sample(model, batch) * (1 + N * eps[batch[2]])).sum() / w.sum()


def smoothed(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.2)


def l1(model):
    return 0.01 * sum(p.abs().sum() for p in model.parameters())


def penalised(model, batch, eps):
    return Objective()(model, batch, eps) + l1(model)


def summed(model, batch, eps):
    return 0.2 * (loops.per_sample(model, batch) * (1 + N * eps[batch[2]])).sum()


def two_passes(model, batch):
    """R-drop: two passes with different masks, pulled together."""
    a, b = F.log_softmax(model(batch[0]), 1), F.log_softmax(model(batch[0]), 1)
    apart = F.kl_div(a, b, log_target=True, reduction="none").sum(1)
    return F.nll_loss(a, batch[1], reduction="none") + F.nll_loss(b, batch[1], reduction="none") + apart


class Tokens(nn.Module):
    """A language model in small: the next of 5 tokens; 0 is padding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)

    def forward(self, tokens):
        return self.head(torch.tanh(torch.cumsum(self.embedding(tokens), 1)))


def sequences(x, y):
    torch.manual_seed(len(x))
    tokens = torch.randint(1, 5, (len(x), 6))
    lengths = torch.randint(2, 7, (len(x), 1))
    return tokens.where(torch.arange(6) < lengths, 0), y


def token_losses(model, batch):
    """The mean over a sample's own tokens."""
    targets = batch[0][:, 1:]
    losses = F.cross_entropy(model(batch[0])[:, :-1].transpose(1, 2), targets, reduction="none", ignore_index=0)
    return losses.sum(1) / (targets != 0).sum(1)


def count_tokens(batch):
    return (batch[0][:, 1:] != 0).sum(1)


def mean_over_tokens(model, batch, eps):
    counts = count_tokens(batch)
    value = (token_losses(model, batch) * counts * (1 + N * eps[batch[2]])).sum() / counts.sum()
    if not eps.any():
        flat = model(batch[0])[:, :-1].reshape(-1, 5), batch[0][:, 1:].reshape(-1)
        torch.testing.assert_close(value, F.cross_entropy(*flat, ignore_index=0))
    return value


LOSSES = {
    "weights of classes": Loop(
        objective=class_weighted, task={"weight": lambda batch: CLASS_WEIGHTS.to(batch[1].device)[batch[1]]}
    ),
    "weights of samples": Loop(objective=sample_weighted, task={"weight": lambda batch: 1.0 + batch[2] % 3}),
    "label smoothing": Loop(loss=smoothed, objective=Objective(smoothed)),
    "mean over tokens": Loop(
        build=Tokens,
        data=sequences,
        loss=token_losses,
        objective=mean_over_tokens,
        task={"weight": count_tokens},
    ),
    "penalty": Loop(objective=penalised, task={"penalty": l1}),
    "penalty, micro-batches": Loop(
        objective=lambda *a: penalised(*a) / 2, pieces=cut(2), task={"penalty": l1, "reduction": "mean-of-means"}
    ),
    "a sum": Loop(objective=summed, loss=lambda *a: 0.2 * loops.per_sample(*a)),
    "several forward passes": Loop(
        build=dropout, loss=two_passes, objective=Objective(two_passes), test=loops.per_sample
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    check(LOSSES[name])


# -- models ------------------------------------------------------------------------------------------------------------


class Normalised(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 6), norm, nn.Tanh(), nn.Linear(6, CLASSES))

    def forward(self, x):
        return self.layers(x)


class Checkpointed(nn.Module):
    """Recomputes its first layer in the backward pass."""

    def __init__(self, checkpoint, reentrant):
        super().__init__()
        self.checkpoint, self.reentrant = checkpoint, reentrant
        self.first = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = x.requires_grad_()  # the reentrant form needs that
        run = checkpoint if self.checkpoint == "by name" else torch.utils.checkpoint.checkpoint
        return self.head(run(self.first, x, use_reentrant=self.reentrant))


def small_steps(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)


MODELS = {
    "batch norm": Loop(build=batch_norm),
    "dropout": Loop(build=dropout),
    "layer norm": Loop(build=lambda: Normalised(nn.LayerNorm(6))),
    # Small steps: over groups of three values the training is so rough that differences of it are not exact.
    "group norm": Loop(build=lambda: Normalised(nn.GroupNorm(2, 6)), optimizer=small_steps),
    "gradient checkpointing": Loop(build=lambda: Checkpointed("by name", reentrant=False)),
    "gradient checkpointing, reentrant": Loop(build=lambda: Checkpointed("in its module", reentrant=True)),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    check(MODELS[name])


def test_an_average_of_weights_is_left_alone():
    averages = []

    def average(model, optimizer, t):
        if t == 1:
            averages.append(torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda a, b, n: 0.9 * a + 0.1 * b))
        averages[-1].update_parameters(model)
        averages[-1](torch.zeros(2, 4, dtype=torch.float64)).sum()

    made = check(Loop(build=dropout, after_step=average))
    assert all(len(made.run.parts(t)) == 1 for t in range(1, made.run.steps + 1))


# -- data --------------------------------------------------------------------------------------------------------------


class Augmented(torch.utils.data.Dataset):
    """Draws from all three generators for every item."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        x, *rest = self.data[i]
        return x + 0.1 * torch.randn(4) + 0.1 * np.random.rand() + 0.1 * random.random(), *rest


def test_random_augmentation_that_is_seeded():
    check(Loop(set=lambda data: trajrec.seeded(Augmented(data)), build=dropout))


def test_a_wrapped_data_set_is_as_random_as_before_where_nothing_is_recorded():
    data = trajrec.seeded(Augmented([(torch.zeros(4), 1)]))
    assert not torch.equal(data[0][0], data[0][0])
    data.set_epoch(1)
    assert torch.equal(data[0][0], data[0][0])


def test_random_augmentation_that_is_not_seeded_is_refused():
    made = loops.train(Loop(set=Augmented))
    with pytest.raises(trajrec.TrajrecError, match=r"first batch has other contents.*trajrec\.seeded"):
        contributions(made.run, made.task)


def test_changed_data_are_caught_at_their_batch():
    made = loops.train(Loop())
    x = made.task.train.tensors[0]
    later = next(int(i) for t in (2, 3) for i in made.run.sample_ids(t) if i not in made.run.sample_ids(1))
    x[later, 0] += 1e-9
    first = next(t for t in range(1, 4) if later in made.run.sample_ids(t))
    for mode in ("adjoint", "tangent"):
        with pytest.raises(DriftError, match="the inputs of its batch are not those that the training loop") as caught:
            contributions(made.run, made.task, exact=True, mode=mode)
        assert f"at step {first}:" in str(caught.value)


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_labels_that_changed_are_named_where_they_come_first(mode):
    """Later epochs are not summed: there the weights drift, and the search for the first bad step meets the data."""
    made = loops.train(Loop(epochs=5))
    y = made.task.train.tensors[1]
    later = next(int(i) for t in (2, 3) for i in made.run.sample_ids(t) if i not in made.run.sample_ids(1))
    y[later] = (y[later] + 1) % 3
    first = next(t for t in range(1, 4) if later in made.run.sample_ids(t))
    with pytest.raises(DriftError, match=f"at step {first}: the inputs of its batch are not those"):
        contributions(made.run, made.task, exact=True, mode=mode)


# -- compiled models and mixed precision -------------------------------------------------------------------------------


def in_place(model):
    model.compile(backend="aot_eager")
    return model


@pytest.mark.parametrize("wrap", [lambda model: torch.compile(model, backend="aot_eager"), in_place])
def test_compiled_models(wrap):
    made = check(Loop(build=dropout, wrap=wrap, epochs=2))
    assert [p.name for p in made.run.spec.params] == [name for name, _ in dropout().named_parameters()]


@pytest.mark.long
def test_a_model_compiled_to_machine_code():
    made = loops.train(Loop(wrap=torch.compile))
    c = contributions(made.run, made.task, exact=True)
    assert c.certificate.verdict in ("bit-exact", "within rounding")


def autocast_loss(model, batch):
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(batch[0])
    return F.cross_entropy(outputs.float(), batch[1], reduction="none")


def test_autocast_in_half_precision_with_weights_in_single():
    """Against naive autograd through the whole training, in the same mixed precision."""
    loop = Loop(loss=autocast_loss, objective=Objective(autocast_loss), optimizer=plain_sgd, dtype=torch.float32)
    made = loops.train(loop)
    c = contributions(made.run, made.task, targets="each", exact=True)
    assert c.certificate.verdict in ("bit-exact", "within rounding")
    expected = through_the_training(made, autocast_loss)
    assert relative(c.values, expected) < 0.02
    assert (
        relative(contributions(made.run, made.task, targets="each", exact=True, mode="tangent").values, expected) < 0.02
    )


def plain_sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.8)


def through_the_training(made, loss):
    """C(i, j) by autograd through all steps of momentum SGD, lr 0.2, momentum 0.8."""
    eps = torch.zeros(N, requires_grad=True)
    names = [p.name for p in made.run.spec.params]
    row, model = torch.from_numpy(made.run.row(0).copy()), mlp()
    weights = {p.name: row[p.span].view(p.shape).requires_grad_() for p in made.run.spec.params}
    velocity = dict.fromkeys(names, 0.0)
    data = [torch.stack(column) for column in zip(*made.task.train, strict=True)]
    for t in range(1, made.run.steps + 1):
        ids = torch.as_tensor(made.run.sample_ids(t))
        batch = tuple(column[ids] for column in data)
        losses = torch.func.functional_call(LossOf(model, loss), {f"model.{k}": v for k, v in weights.items()}, batch)
        total = (losses * (1 + N * eps[ids])).mean()
        grads = torch.autograd.grad(total, list(weights.values()), create_graph=True)
        velocity = {n: 0.8 * velocity[n] + g for n, g in zip(names, grads, strict=True)}
        weights = {n: weights[n] - 0.2 * velocity[n] for n in names}
    test = tuple(torch.stack(column) for column in zip(*made.task.test, strict=True))
    values = torch.func.functional_call(LossOf(model, loss), {f"model.{k}": v for k, v in weights.items()}, test)
    rows = [torch.autograd.grad(v, eps, retain_graph=True)[0] for v in values]
    return -torch.stack(rows, 1).numpy() / N


class LossOf(nn.Module):
    def __init__(self, model, loss):
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, *batch):
        return self.loss(self.model, batch)


# -- what recording must leave alone -----------------------------------------------------------------------------------


def test_a_step_that_the_scaler_skips_is_no_step():
    """Its batch is dropped with its gradients, and does not count for the next step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    def step(optimizer):
        scaler.step(optimizer)
        scaler.update()

    def loud(model, batch):
        return 8 * loops.per_sample(model, batch)

    loop = Loop(
        loss=loud,
        objective=Objective(loud),
        backward=lambda loss: scaler.scale(loss).backward(),
        step=step,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        dtype=torch.float32,
        epochs=4,
    )
    made = loops.train(loop)
    assert made.run.steps < 12
    assert all(len(made.run.parts(t)) == 1 for t in range(1, made.run.steps + 1))
    assert contributions(made.run, made.task, exact=True).certificate.first_bad_step is None


def test_copies_and_pickles_of_the_model_are_free_of_the_recorder(tmp_path):
    copies = []

    def keep(model, optimizer, t):
        if t == 2:
            torch.save(model, tmp_path / "model.pt")
            copies.append(copy.deepcopy(model))

    made = loops.train(Loop(after_step=keep))
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.zeros(2, 4, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), copies[0](x))
    assert b"trajrec" not in (tmp_path / "model.pt").read_bytes()
    assert made.run.steps == 9


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_a_state_that_was_reset_on_the_way_is_refused(optimizer):
    def reset(model, optimizer, t):
        if t == 5:
            optimizer.state.clear()

    made = loops.train(Loop(optimizer=optimizer, after_step=reset))
    for mode in ("adjoint", "tangent"):
        with pytest.raises(DriftError, match=r"drifted at step (6|8)"):
            contributions(made.run, made.task, exact=True, mode=mode)


def test_a_keyframe_whose_state_does_not_follow_is_refused():
    made = loops.train(Loop(optimizer=adam))
    made.run.keyframe(8).arrays["optimizer/exp_avg"][:] *= 1.01
    with pytest.raises(DriftError, match=r"drifted at step 9: the optimizer's exp_avg, made again.*keyframe of step 8"):
        contributions(made.run, made.task, exact=True, mode="adjoint")
    assert contributions(made.run, made.task, exact=True, mode="adjoint", allow_drift=True).values.any()


# -- all of it in single precision, and on a GPU -----------------------------------------------------------------------

EVERYTHING = {
    **PARAMETERS,
    **ACCUMULATION,
    **LOSSES,
    **MODELS,
    **{name: Loop(before_step=hook, task={"gradient": change}) for name, (hook, change) in GRADIENTS.items()},
    **{f"schedule: {name}": Scheduled(*options).loop() for name, options in SCHEDULES.items()},
}


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", EVERYTHING)
def test_no_clean_run_is_refused_in_single_precision(name, exact):
    made = loops.train(replace(EVERYTHING[name], dtype=torch.float32))
    values = []
    for mode in ("adjoint", "tangent"):
        c = contributions(made.run, made.task, exact=exact, mode=mode, certify="all")
        assert c.certificate.verdict in ("bit-exact", "within rounding")
        assert c.certificate.steps_checked == made.run.steps
        values.append(c.values)
    assert relative(values[0], values[1]) < 1e-2


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["dropout", "batch norm", "layer norm", "Adam", "no decay on biases", "penalty"])
def test_training_on_a_gpu(name):
    check(replace(EVERYTHING[name], device="cuda"))


def test_a_training_in_tensor_float_32_is_given_room(monkeypatch):
    """As a GPU rounds: inputs of the first layer to ten bits."""
    made = loops.train(Loop(build=Rounding, dtype=torch.float32))
    monkeypatch.setattr(Rounding, "bits", 23)
    with pytest.raises(DriftError):
        contributions(made.run, made.task, exact=True)
    made.run.spec.data["tf32"] = True
    assert contributions(made.run, made.task, exact=True).certificate.verdict == "within rounding"


class Rounding(nn.Sequential):
    bits = 10

    def __init__(self):
        super().__init__(*mlp())

    def forward(self, x):
        scale = 2.0**self.bits
        return super().forward((x * scale).round() / scale)


# -- what rounding may and may not do ----------------------------------------------------------------------------------


def noisy_biases():
    """Biases before BatchNorm: their gradient is nothing but rounding, which Adam blows up to whole steps."""
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, CLASSES)
    )


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_steps_made_of_rounding_are_no_drift(mode, monkeypatch):
    """Another machine rounds differently: here by last-place changes of every gradient."""

    from trajrec.replay.proof import stepwise
    from trajrec.replay.proof.rounding import Rounding

    made = loops.train(Loop(build=noisy_biases, optimizer=adam, dtype=torch.float32))
    step = stepwise.StepwiseChecks._compare
    nudged = lambda self, at, g, w, *rest: step(self, at, g, nudge(self, at, g, *rest), *rest)  # noqa: E731

    def nudge(self, at, gradient, growth, state):
        other = gradient + 1e-7 * gradient.abs().max() * torch.randn(gradient.shape)
        return self.rule.step(at.before, state, other, at.hyper)[0]

    monkeypatch.setattr(stepwise.StepwiseChecks, "_compare", nudged)
    c = contributions(made.run, made.task, exact=True, mode=mode)
    assert c.certificate.verdict == "within rounding"
    monkeypatch.setattr(Rounding, "allowances", lambda self, step, *_, **__: [torch.zeros_like(step.before)])
    with pytest.raises(DriftError):
        contributions(made.run, made.task, exact=True, mode=mode)


def normalised():
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, CLASSES))


def test_steps_as_small_as_rounding_prove_nothing_and_hide_nothing():
    def creeping(model):
        return torch.optim.SGD(model.parameters(), lr=1e-5)

    made = loops.train(
        Loop(build=normalised, optimizer=creeping, dtype=torch.float32, loss=smoothed, objective=Objective(smoothed))
    )
    wrong = contributions_of(made, loops.per_sample)
    with pytest.raises(DriftError):
        wrong()
    assert contributions_of(made, smoothed)().certificate.first_bad_step is None


def contributions_of(made, loss):
    task = trajrec.Task(normalised, made.task.train, made.task.test, loss=loss)
    return lambda: contributions(made.run, task, exact=True)


def test_a_slow_group_does_not_hide_behind_a_fast_one():
    def optimizer(model):
        return torch.optim.SGD(
            [{"params": model[0].parameters(), "lr": 1e-6}, {"params": model[2].parameters()}], lr=0.1
        )

    def objective(model, batch, eps):
        return Objective()(model, batch, eps) + 5 * model[0](batch[0]).pow(2).mean()

    made = loops.train(Loop(optimizer=optimizer, objective=objective))
    with pytest.raises(DriftError):
        contributions(made.run, made.task, exact=True)
