"""Planted faults: a Task that does not do what the loop did is refused, and the message names what is missing."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from tests.made import loops
from tests.made.loops import Loop, Objective, mlp, sgd
from trajrec.errors import DriftError
from trajrec.replay import contributions
from trajrec.task.task import Task


def dropout():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, loops.CLASSES))


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.02)


def by_norm(model, limit):
    """What `clip_grad_norm_` does, written by hand: the recorder does not see it."""
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    for p in model.parameters():
        p.grad *= (limit / (norm + 1e-6)).clamp(max=1.0)
    return float(norm)


def clips(limit, by):
    def clip(model, optimizer):
        if by == "norm":
            by_norm(model, limit)
        else:
            for p in model.parameters():
                p.grad.clamp_(-limit, limit)

    return clip


def penalised(factor, norm):
    def objective(model, batch, eps):
        return Objective()(model, batch, eps) + factor * sum(norm(p) for p in model.parameters())

    return objective


def matrices_decayed(model, batch, eps):
    return Objective()(model, batch, eps) + 0.05 * sum(p.square().sum() for p in model.parameters() if p.dim() > 1)


def tripled(model, batch, eps):
    return 3 * Objective()(model, batch, eps)


def eval_in_the_loss(model, batch):
    model.eval()
    try:
        return loops.per_sample(model, batch)
    finally:
        model.train()


class Noisy(nn.Sequential):
    """A model with dropout where the training had none."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.2, self.training))


def noisy():
    return Noisy(*mlp())


class OwnNoise(nn.Module):
    """Draws from a generator that nobody records."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, loops.CLASSES)
        self.generator = torch.Generator()

    def forward(self, x):
        return self.layer(x + 0.3 * torch.randn(x.shape, generator=self.generator, dtype=x.dtype))


# name: (loop, what the faulty Task is told, what the message must say)
FAULTS = {
    "clipping by norm": (Loop(before_step=clips(0.2, "norm")), {}, r"clipped by its norm.*trajrec\.clip_norm\(0\.2\)"),
    "clipping by value": (Loop(before_step=clips(0.04, "value")), {}, r"trajrec\.clip_value\(0\.04\)"),
    "clipping where there was none": (Loop(), {"gradient": trajrec.clip_norm(0.1)}, "the training left it as it was"),
    "loss scale": (Loop(objective=tripled), {}, "gradient is 3 times the Task's.*Another loss scale"),
    "reduction": (Loop(), {"reduction": "sum"}, r"gradient is 0\.1667 times the Task's"),
    "weight decay": (
        Loop(objective=penalised(0.05, lambda p: p.square().sum())),
        {},
        r"holds 0\.1 times the weights more.*penalty=lambda model: 0\.05 \* sum\(p\.square",
    ),
    "weight decay of matrices": (Loop(objective=matrices_decayed), {}, r"holds 0\.1 times the weights.*p\.dim\(\) > 1"),
    "L1 penalty": (Loop(objective=penalised(0.02, lambda p: p.abs().sum())), {}, r"L1 penalty of 0\.02"),
    "eval mode in the loop": (
        Loop(build=dropout, objective=Objective(eval_in_the_loss)),
        {},
        "made in eval mode and the Task's in train mode",
    ),
    "eval mode in the Task": (Loop(build=dropout), {"loss": eval_in_the_loss}, "The training step drew random numbers"),
    "dropout in the Task": (Loop(), {"model": noisy}, "or by a model without its dropout"),
    "a generator of its own": (Loop(build=OwnNoise), {}, "generator of its own"),
}


def faulty(made, loop, told):
    options = {**loop.task, **told}
    loss = options.pop("loss", loop.loss)
    model = options.pop("model", loop.build)
    return Task(model, made.task.train, made.task.test, loss=loss, **options)


@pytest.mark.parametrize("name", FAULTS)
@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_a_fault_is_named(name, optimizer):
    loop, told, words = FAULTS[name]
    loop.optimizer = optimizer
    made = loops.train(loop)
    with pytest.raises(DriftError, match=rf"(?s)drifted at step \d+: .*{words}"):
        contributions(made.run, faulty(made, loop, told), exact=True)


def test_clipping_that_only_some_steps_need_is_named_at_the_first_that_does():
    norms = []

    def clip(limit):
        return lambda model, _: norms.append(by_norm(model, limit))

    loops.train(Loop(before_step=clip(1e9)))
    first = next(t for t, norm in enumerate(norms, 1) if norm > norms[0])
    limit = round((norms[0] + norms[first - 1]) / 2, 3)
    loop = Loop(before_step=clip(limit))
    made = loops.train(loop)
    with pytest.raises(DriftError, match=rf"drifted at step {first}:.*trajrec\.clip_norm\({limit}\)"):
        contributions(made.run, faulty(made, loop, {}), exact=True)


@pytest.mark.parametrize("optimizer", [sgd, adam])
def test_ids_that_are_shifted_are_named(optimizer):
    loop = Loop(optimizer=optimizer)
    made = loops.train(loop)
    records = made.run.sink.records
    late = [records[-1].ids, *(r.ids for r in records[1:-1])]
    records[1:] = [replace(r, ids=ids, digests=r.digests[:0]) for r, ids in zip(records[1:], late, strict=True)]
    made.run.spec.data.clear()
    with pytest.raises(DriftError, match=r"made with another batch: that of step \d+ gives the recorded weights"):
        contributions(made.run, faulty(made, loop, {}), exact=True)


@pytest.mark.parametrize("keep", ["steps", 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_faults_are_named_in_single_precision_and_between_keyframes(tmp_path, keep, dtype):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(30, 4), torch.randint(0, 3, (30,)))
    model = mlp()
    optimizer = sgd(model)
    loader = DataLoader(data, 6, shuffle=True)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer, loader=loader, keep=keep):
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            by_norm(model, 0.2)
            optimizer.step()
    with trajrec.open(tmp_path / "run.h5") as run:
        told = r"drifted at step 1:.*clipped by its norm.*trajrec\.clip_norm\(0\.2\)"
        if keep == 4:
            told = "drifted at step 1.*keyframe of step 4"
        with pytest.raises(DriftError, match=told):
            contributions(run, Task.supervised(mlp, data, data), dtype=dtype)
        right = Task.supervised(mlp, data, data, gradient=trajrec.clip_norm(0.2))
        assert contributions(run, right, dtype=dtype).certificate.first_bad_step is None


def test_a_penalty_is_named_between_keyframes(tmp_path):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(30, 4), torch.randint(0, 3, (30,)))
    model = mlp()
    optimizer = adam(model)
    loader = DataLoader(data, 6, shuffle=True)
    with trajrec.record(tmp_path / "run.h5", model=model, optimizer=optimizer, loader=loader, keep=3):
        for x, y in loader:
            optimizer.zero_grad()
            penalty = 0.05 * sum(p.square().sum() for p in model.parameters())
            (nn.functional.cross_entropy(model(x), y) + penalty).backward()
            optimizer.step()
    with trajrec.open(tmp_path / "run.h5") as run, pytest.raises(DriftError, match=r"holds 0\.1 times the weights"):
        contributions(run, Task.supervised(mlp, data, data))
