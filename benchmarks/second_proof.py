"""What the second proof costs and finds: the derivative of a training's gradient, held against central differences.

    python benchmarks/second_proof.py [--models lenet transformer densenet]

cost    the proof's CPU time at three steps, in one thread, over that of an exact replay of 500 steps, whose step is
        measured in the same run (`replay_cost.py` has its models; pictures and bytes are random here).
finds   small trainings in float64 that hide something from their gradient: by how much a central difference is off
        automatic differentiation (autograd of autograd), and off what the replay computes, which sees through; the
        largest of three steps. Clean ones beside them, in float32, as a user's would be. Of three networks with
        BatchNorm, how far off exact contributions are where the running statistics are taken for constants.
"""

import argparse
import contextlib
import json
import platform
import tempfile
import time
from pathlib import Path

import torch
from common import DenseNet40, LeNet5, Transformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay.losses.seen import Seen
from trajrec.replay.methods.blocks import Execution
from trajrec.replay.methods.contributions import answer
from trajrec.replay.progress import Silent
from trajrec.replay.proof.derivative import _beside, _Trial, proved_steps
from trajrec.replay.question import Question
from trajrec.replay.session import Session

OUT = Path(__file__).parent / "results" / "second_proof.json"
STEPS, RUN = {"lenet": 30, "transformer": 12, "densenet": 6}, 500


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_byte(model, batch):
    return F.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def setting(name):
    """(model, loss, data, batch size)."""
    torch.manual_seed(0)
    if name == "transformer":
        text = torch.randint(256, (32 * STEPS[name], 33))
        return Transformer, next_byte, TensorDataset(text[:, :-1], text[:, 1:]), 32
    build, shape = (LeNet5, (1, 28, 28)) if name == "lenet" else (DenseNet40, (3, 32, 32))
    count = 64 * STEPS[name]
    return build, cross_entropy, TensorDataset(torch.randn(count, *shape), torch.randint(10, (count,))), 64


def record(path, build, loss, data, batch, optimizer=None):
    torch.manual_seed(0)
    model = build()
    made = optimizer(model) if optimizer else torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(data, batch, shuffle=True)
    with trajrec.record(path, model=model, optimizer=made, loader=loader, force=True):
        for items in loader:
            made.zero_grad()
            loss(model, items).mean().backward()
            made.step()
    return trajrec.Task(build, data, data, loss=loss)


class Marks(Silent):
    """The CPU time of every step of a replay."""

    def __init__(self):
        self.times = []

    def advance(self, count):
        self.times.append(time.process_time())


def cost(name, path):
    build, loss, data, batch = setting(name)
    task = record(path, build, loss, data, batch)
    with trajrec.open(path) as run:
        session = Session(run, task)
        question = Question(targets=[0], curvature="hessian")
        scope = question.scope(session.samples, run.steps, lambda: session.test)
        marks = Marks()
        answer(session, scope, Execution(marks))
        step = (marks.times[-1] - marks.times[0]) / (len(marks.times) - 1)
        began = time.process_time()
        session.prove_derivative(forwards=False)
        proof = time.process_time() - began
    share = proof / (RUN * step)
    return {"proof_in_exact_steps": proof / step, "share_of_500_steps": share, "worst": session.derivative.worst}


# -- what it finds -----------------------------------------------------------------------------------------------------


def focal(model, batch):
    losses = cross_entropy(model, batch)
    return ((1 - torch.exp(-losses)) ** 2).detach() * losses


def branch(model, batch):
    return cross_entropy(model, batch) - F.cosine_similarity(model(batch[0]), model(batch[0] + 0.1).detach())


def importance(model, batch):
    losses = cross_entropy(model, batch)
    return losses * torch.softmax(losses.detach(), 0) * len(losses)


class Rounded(nn.Linear):
    def forward(self, x):
        weight = self.weight + (torch.round(self.weight * 8) / 8 - self.weight).detach()
        return F.linear(x, weight, self.bias)


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, bar):
        return -bar


class Domains(nn.Module):
    def __init__(self):
        super().__init__()
        self.features, self.classes, self.domains = nn.Linear(8, 24), nn.Linear(24, 10), nn.Linear(24, 10)

    def forward(self, x):
        features = torch.tanh(self.features(x))
        return self.classes(features) + self.domains(Reversal.apply(features))


def mlp(linear=nn.Linear, *between, activation=nn.Tanh):
    return lambda: nn.Sequential(linear(8, 24), *(make() for make in between), activation(), linear(24, 10))


def hooked():
    model = mlp()()
    model[1].register_full_backward_hook(lambda module, inner, outer: (inner[0] * 0.5,))
    return model


HIDDEN = {
    "a detached focal weight": (mlp(), focal),
    "a detached branch": (mlp(), branch),
    "detached importance weights": (mlp(), importance),
    "straight-through rounding": (mlp(Rounded), cross_entropy),
    "gradient reversal": (Domains, cross_entropy),
    "a backward hook": (hooked, cross_entropy),
    "weight normalisation": (mlp(lambda i, o: nn.utils.parametrizations.weight_norm(nn.Linear(i, o))), cross_entropy),
}
CLEAN = {
    "tanh": mlp(),
    "ReLU": mlp(activation=nn.ReLU),
    "BatchNorm": mlp(nn.Linear, lambda: nn.BatchNorm1d(24)),
    "LayerNorm": mlp(nn.Linear, lambda: nn.LayerNorm(24)),
    "dropout": mlp(nn.Linear, lambda: nn.Dropout(0.5)),
}


def off(session, forwards):
    """How far off the nearest central difference is, at the worst of the steps."""
    worst = 0.0
    for t in proved_steps(session):
        trial = _Trial(session.differences, _beside(session, t, 0, few=True), forwards)
        with contextlib.suppress(Exception):
            trial.error()
        worst = max(worst, trial.least)
    return worst


def finds(path, build, loss, dtype):
    torch.set_default_dtype(dtype)
    try:
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(64, 8), torch.randint(0, 10, (64,)))
        task = record(path, build, loss, data, 16, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        with trajrec.open(path) as run:
            session = Session(run, task)
            found = {"seen_through": max(off(session, forwards) for forwards in (False, True))}
            session.differences.function.seen = Seen()
            return found | {"autograd_of_autograd": off(session, True)}
    finally:
        torch.set_default_dtype(torch.float32)


NORMS = {
    "one BatchNorm": mlp(nn.Linear, lambda: nn.BatchNorm1d(24)),
    "two BatchNorms": lambda: nn.Sequential(
        nn.Linear(8, 24), nn.BatchNorm1d(24), nn.Tanh(), nn.Linear(24, 16), nn.BatchNorm1d(16), nn.Tanh(),
        nn.Linear(16, 10),
    ),
    "BatchNorm of pictures": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 6, 2, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(),
        nn.Linear(90, 10),
    ),
}  # fmt: skip


def statistics(path, build):
    """How much of the contributions goes through the running statistics: the part without them is off by it."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(1)
        data = TensorDataset(torch.randn(64, 8), torch.randint(0, 10, (64,)))
        task = record(path, build, cross_entropy, data, 16, lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        with trajrec.open(path) as run:
            found = []
            for through in (True, False):
                session = Session(run, task)
                session.function.statistics = session.function.statistics if through else None
                question = Question(targets="each", curvature="hessian", mode="adjoint")
                scope = question.scope(session.samples, run.steps, lambda session=session: session.test)
                found.append(torch.as_tensor(answer(session, scope, Execution()).values))
        return float((found[1] - found[0]).norm() / found[0].norm())
    finally:
        torch.set_default_dtype(torch.float32)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(STEPS))
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        result = {
            "torch": torch.__version__,
            "machine": platform.machine(),
            "cost": {name: cost(name, path) for name in options.models},
            "hidden": {name: finds(path, *made, torch.float64) for name, made in HIDDEN.items()},
            "statistics": {name: statistics(path, build) for name, build in NORMS.items()},
            "clean": {name: finds(path, build, cross_entropy, torch.float32) for name, build in CLEAN.items()},
        }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
