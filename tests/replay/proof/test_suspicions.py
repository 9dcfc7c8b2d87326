"""Trainings that no Task describes, or not this one: a refusal names what they do, or what to look at, and no more."""

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made import loops
from tests.made.loops import Loop, Objective, mlp
from trajrec.errors import DerivativeError, DriftError, NonFiniteError
from trajrec.replay import contributions
from trajrec.task.task import Task


def refusal(loop, kind=DriftError, task=None, **options):
    made = loops.train(loop)
    with pytest.raises(kind) as refused:
        contributions(made.run, task(made) if task else made.task, exact=True, **options)
    return str(refused.value)


# -- weights that change between the steps -----------------------------------------------------------------------------


def rmsprop(model):
    return torch.optim.RMSprop(model.parameters(), lr=0.05)


def clip_all(model, optimizer, t):
    for p in model.parameters():
        p.data.clamp_(-0.3, 0.3)


def clip_first(model, optimizer, t):
    model[0].weight.data.clamp_(min=0)


def normalise_rows(model, optimizer, t):
    with torch.no_grad():
        model[0].weight.div_(model[0].weight.norm(dim=1, keepdim=True))


def move(model, optimizer, t):
    if t == 2:
        with torch.no_grad():
            model[2].bias.add_(torch.tensor([0.3, -0.1, 0.2]))


@pytest.mark.parametrize(
    ("after", "optimizer", "words"),
    [
        (clip_all, loops.sgd, r"between step 1 and step 2.* cut, .*0\.weight.* to \[-0\.3, 0\.3\]"),
        (clip_all, rmsprop, r"cut to \[-0\.3, 0\.3\]"),
        (clip_first, loops.sgd, r"cut, 0\.weight to \[0, inf\)"),
        (normalise_rows, loops.sgd, r"normalised, the rows of 0\.weight to a length of at most 1"),
        (move, loops.sgd, r"between step 2 and step 3, outside of the optimizer: 2\.bias"),
    ],
    ids=["clipped", "clipped under RMSprop", "kept positive", "normalised", "moved by hand"],
)
def test_weights_that_the_loop_changes_are_named_with_the_change(after, optimizer, words):
    found = refusal(Loop(after_step=after, optimizer=optimizer))
    assert re.search(words, found), found


@pytest.mark.parametrize("keep", ["steps", 4])
def test_clipped_weights_are_named_in_single_precision_and_between_keyframes(tmp_path, keep):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(30, 4), torch.randint(0, 3, (30,)))
    model = mlp()
    optimizer = loops.sgd(model)
    loader = DataLoader(data, 6, shuffle=True)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer, loader=loader, keep=keep):
        for x, y in loader:
            optimizer.zero_grad()
            clip_all(model, optimizer, 0)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    with trajrec.open(tmp_path / "run.h5") as run, pytest.raises(DriftError, match=r"cut.* to \[-0\.3, 0\.3\]"):
        contributions(run, Task.supervised(mlp, data, data), exact=True)


def test_weights_that_are_cut_before_they_are_recorded_are_named():
    def optimizer(model):
        made = torch.optim.SGD(model.parameters(), lr=0.2)
        made.register_step_post_hook(lambda *_: clip_all(model, None, 0))
        return made

    assert "cut after the optimizer's step" in refusal(Loop(optimizer=optimizer))


# -- random numbers ----------------------------------------------------------------------------------------------------


def noised(model, batch):
    return loops.per_sample(model, [batch[0] + 0.3 * torch.randn_like(batch[0]), *batch[1:]])


def plain(made):
    return Task(mlp, made.task.train, made.task.test, loss=loops.per_sample)


def mixed_up(model, batch, eps):
    x, y = batch[:2]
    share, order = np.random.beta(0.5, 0.5), torch.randperm(len(x))
    out = model(share * x + (1 - share) * x[order])
    return share * F.cross_entropy(out, y) + (1 - share) * F.cross_entropy(out, y[order])


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, loops.CLASSES))


@pytest.mark.parametrize("build", [mlp, dropout])
def test_noise_that_is_drawn_before_the_model_is_called_is_said_to_be(build):
    found = refusal(Loop(build=build, loss=noised, objective=Objective(noised)))
    assert "draws random numbers before the model is called" in found
    assert "inside of the model's forward()" in found
    assert "trajrec.seeded" in found


def test_random_numbers_of_the_loop_are_listed_where_the_task_draws_none():
    found = refusal(Loop(objective=Objective(noised)), task=plain)
    assert "drew random numbers of torch outside of the model's forward pass" in found
    found = refusal(Loop(objective=mixed_up), task=plain)
    assert "drew random numbers of numpy and torch outside of the model" in found
    assert "mixup" in found


def test_what_the_loaders_draw_is_not_held_against_the_loop():
    def tripled_and_bent(model, batch, eps):
        return Objective()(model, batch, eps) + 0.1 * model[0].weight.sin().sum()

    assert "random numbers" not in refusal(Loop(objective=tripled_and_bent, epochs=4))


# -- what is outside of the model --------------------------------------------------------------------------------------


class Taught(nn.Module):
    """A student, and a teacher that follows it."""

    def __init__(self):
        super().__init__()
        self.student = mlp()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)

    def forward(self, x):
        return self.student(x)


def consistent(model, batch):
    return loops.per_sample(model, batch) + (model.student(batch[0]) - model.teacher(batch[0])).square().mean(1)


def follow(model, optimizer, t):
    with torch.no_grad():
        for a, b in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            a.mul_(0.9).add_(0.1 * b)


def test_a_mean_teacher_in_the_model_is_named():
    found = refusal(Loop(build=Taught, loss=consistent, objective=Objective(consistent), after_step=follow))
    assert "teacher.0.weight is not in the optimizer and was changed by step 4" in found
    assert "a mean teacher that a loss compares with" in found


class Held(Taught):
    """With a teacher that the optimizer holds, and passes by: it has no gradient."""

    def __init__(self):
        super().__init__()
        self.teacher.requires_grad_(True)


def consistent_apart(model, batch):
    with torch.no_grad():
        taught = model.teacher(batch[0])
    return loops.per_sample(model, batch) + (model.student(batch[0]) - taught).square().mean(1)


def test_a_mean_teacher_whose_rows_are_stored_is_named_with_its_decay():
    objective = Objective(consistent_apart)
    found = refusal(Loop(build=Held, loss=consistent_apart, objective=objective, after_step=follow))
    assert "teacher.0.weight is not in the optimizer" in found
    assert "the exponential average of student.0.weight, with a decay of 0.9" in found


class Centers:
    """A loss with parameters of its own, which a second optimizer steps."""

    def __init__(self):
        self.points = nn.Parameter(torch.zeros(3, 3, dtype=torch.float64))
        self.optimizer = torch.optim.SGD([self.points], lr=0.5)

    def loss(self, model, batch):
        return loops.per_sample(model, batch) + (model(batch[0]) - self.points[batch[1]]).square().sum(1) / 2

    def step(self, model, optimizer, t):
        self.optimizer.step()
        self.optimizer.zero_grad()


def test_weights_of_the_loss_that_nobody_recorded_are_listed():
    trained, fresh = Centers(), Centers()
    loop = Loop(loss=trained.loss, objective=Objective(trained.loss), after_step=trained.step)
    found = refusal(loop, task=lambda made: Task(mlp, made.task.train, made.task.test, loss=fresh.loss))
    assert "uses weights outside of the model: points (Parameter)" in found
    assert "trajrec.record(optimizer=[...])" in found
    assert "Step 1 agrees" in found


def test_modules_that_the_loss_reaches_by_its_closure_are_listed():
    teacher = mlp().double()
    start = copy.deepcopy(teacher)

    def loss(model, batch, teacher=None):
        return loops.per_sample(model, batch) + (model(batch[0]) - guide(batch[0]).detach()).square().mean(1)

    guide = teacher

    def follow_outside(model, optimizer, t):
        with torch.no_grad():
            for a, b in zip(teacher.parameters(), model.parameters(), strict=True):
                a.mul_(0.9).add_(0.1 * b)

    made = loops.train(Loop(loss=loss, objective=Objective(loss), after_step=follow_outside))
    teacher.load_state_dict(start.state_dict())
    with pytest.raises(DriftError, match=r"step 2.*outside of the model: guide \(Sequential\).*mean teacher"):
        contributions(made.run, made.task, exact=True)


class Recurrent(nn.Module):
    """Takes and gives a state."""

    def __init__(self):
        super().__init__()
        self.rnn, self.out = nn.RNN(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, state=None):
        out, state = self.rnn(x[None], state)
        return self.out(out[0]), state


def test_a_hidden_state_of_the_loop_is_listed():
    kept = {"state": None}

    def carried(model, batch, eps):
        out, state = model(batch[0], kept["state"])
        kept["state"] = state.detach()
        return F.cross_entropy(out, batch[1])

    def anew(model, batch):
        return F.cross_entropy(model(batch[0])[0], batch[1], reduction="none")

    found = refusal(Loop(build=Recurrent, loss=anew, objective=carried))
    assert "Step 1 agrees: does the loop carry a hidden state from batch to batch?" in found


def test_outputs_that_the_loop_broadcast_are_named():
    def build():
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def broadcast(model, batch, eps):
        return F.mse_loss(model(batch[0]), batch[1])

    def right(model, batch):
        return F.mse_loss(model(batch[0]).squeeze(1), batch[1], reduction="none")

    loop = Loop(build=build, loss=right, objective=broadcast, data=lambda x, y: (x, x.sum(1)))
    with pytest.warns(UserWarning, match="different to the input size"):
        found = refusal(loop)
    assert "F.mse_loss of every output with the label of every sample" in found
    assert "outputs.squeeze(1)" in found


# -- 0/0 ---------------------------------------------------------------------------------------------------------------


def norm_of_zeros(model, batch):
    difference = model[0](batch[0]) - model[0](batch[0].clone())
    return loops.per_sample(model, batch) + 0.1 * difference.norm(dim=1)


@pytest.mark.parametrize("mode", ["adjoint", "tangent"])
def test_a_norm_of_zeros_is_named_with_its_line(mode):
    found = refusal(Loop(loss=norm_of_zeros, objective=Objective(norm_of_zeros)), DerivativeError, mode=mode)
    assert "no second derivative: 0/0 in the norm of a vector of zeros" in found
    assert "of test_suspicions.py" in found
    assert "eps" in found
    assert "sensitiv" not in found.replace("This is no sensitivity", "")


def test_a_target_without_a_gradient_is_named():
    def distance(model, batch):
        return (model(batch[0]) - model(batch[0].clone())).square().sum(1).sqrt()

    made = loops.train(Loop())
    task = Task(mlp, made.task.train, made.task.test, loss=loops.per_sample, measure=distance)
    with pytest.raises(NonFiniteError, match=r"loss of target 0 is finite .* its gradient is not: a root"):
        contributions(made.run, task, targets="each", exact=True)
