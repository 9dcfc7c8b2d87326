"""What a replay costs, beside the training itself, in one run.

    python benchmarks/replay_cost.py [--models lenet transformer densenet] [--threads 1 2] [--merge]

LeNet-5 on MNIST (batch 64), DenseNet-40 with BatchNorm on random 32 x 32 images (batch 64), a transformer of 0.9 M
parameters on random bytes (batch 32). Unit: a step of the plain training loop (DataLoader, forward, backward, SGD)
measured in turn with the replays; medians over the rounds. A replay's time a step is that between its second and its
last step: reading, certificate and bookkeeping are in it, its set-up and the trial of forms are not. "limit" is the
same ratio counted in floating-point operations of what must be computed: for the exact form tangents, the gradient, and
one Hessian-vector product. Times below it are possible where something else than these limits the training. "roofs" are
the times that arithmetic and memory take at least (`benchmarks/machine.py`). The Hessian-free form certifies every 32nd
step, as it does in runs of 1,024 steps and more.
With one thread the times are CPU times of the whole process, else wall times. The result is written after every model
and number of threads; `--merge` keeps what --out holds of the others. All of it takes a quarter of an hour.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy
import torch
from common import DenseNet40, LeNet5, Transformer, images
from machine import clock, counted, rates, roof
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset, TensorDataset

import trajrec
from trajrec.replay.derivatives.choice import FORMS
from trajrec.replay.machine import memory
from trajrec.replay.methods.adjoint import Adjoint
from trajrec.replay.methods.blocks import Execution, problem_of
from trajrec.replay.methods.contributions import answer, solve
from trajrec.replay.methods.hypergradients import Hypergradients, hypergradients
from trajrec.replay.methods.tangent import Tangent
from trajrec.replay.progress import Silent
from trajrec.replay.question import Question
from trajrec.replay.session import Session

ROOT = Path(__file__).parent.parent
STEPS = {"lenet": 96, "densenet": 6, "transformer": 16}
ROUNDS = {"lenet": 5, "densenet": 2, "transformer": 3}
BLOCKS = {"lenet": (4, 16, 64, 256), "densenet": (4,), "transformer": (4, 16)}
MANY, STRIDE = 1000, 32


def mean_loss(model, batch):
    return cross_entropy(model(batch[0]), batch[1], reduction="none")


def next_byte_loss(model, batch):
    return cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def setting(name, root):
    """(model, loss, data, batch size)."""
    torch.manual_seed(0)
    count = STEPS[name] * (32 if name == "transformer" else 64)
    if name == "lenet":
        return LeNet5, mean_loss, Subset(images(root), range(count)), 64
    if name == "densenet":
        return DenseNet40, mean_loss, TensorDataset(torch.randn(count, 3, 32, 32), torch.randint(10, (count,))), 64
    text = torch.randint(256, (count, 33))
    return Transformer, next_byte_loss, TensorDataset(text[:, :-1], text[:, 1:]), 32


def train(build, loss, data, batch, run=None):
    """Seconds a step of a plain epoch after its first step; recorded, if `run` is given."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(data, batch_size=batch, shuffle=True)
    marks = []

    def loop():
        for x in loader:
            optimizer.zero_grad()
            loss(model, x).mean().backward()
            optimizer.step()
            marks.append(clock())

    if run is None:
        loop()
    else:
        with trajrec.record(run, model=model, optimizer=optimizer, loader=loader, force=True):
            loop()
    return (marks[-1] - marks[0]) / (len(marks) - 1)


class Marks(Silent):
    """The time of every step of a replay, and the time inside the derivatives."""

    def __init__(self):
        self.times, self.derivatives = [], 0.0

    def advance(self, count):
        if count == 1:
            self.times.append(clock())

    @property
    def a_step(self):
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def timed_forms(marks):
    """The forms, each adding its time to the marks once two steps are done."""

    def timed(form):
        class Timed(form):
            def __init__(self, *a, **k):
                began = clock()
                super().__init__(*a, **k)
                self._note(began)

            def _note(self, began):
                if marks.times:
                    marks.derivatives += clock() - began

            def along(self, *a, **k):
                began = clock()
                found = super().along(*a, **k)
                self._note(began)
                return found

        return Timed

    return {name: timed(form) for name, form in FORMS.items()}


def replayed(session, sampled=False, **options):
    """Seconds a step of a replay for one target, and the share that is not derivatives."""
    marks = Marks()
    scope = Question(targets=numpy.array([0]), mode="adjoint", **options).scope(
        session.samples, session.run.steps, lambda: session.test
    )
    execution = Execution(marks, forms=timed_forms(marks))
    answer(session, replace(scope, stride=STRIDE if sampled else 1), execution)
    return marks.a_step, 1 - marks.derivatives / (marks.times[-1] - marks.times[0])


def block(session, count, curvature, steps):
    """Seconds a step of a replay of `count` targets at once (random ones), and the form."""
    marks, last = Marks(), session.run.steps
    problem = problem_of(session, curvature, Execution())
    targets = 1e-3 * torch.randn(count, session.layout.size)
    norms = session.function.statistics
    statistics = None if norms is None else 1e-3 * torch.randn(count, norms.size)
    with memory.kept():
        adjoint = Adjoint.begin(problem, targets, numpy.arange(count), last - steps, statistics)
        adjoint.go(None, lambda *_: None, marks.advance)
    return marks.a_step, sorted(set(problem.chosen.forms.values()))[0]


def forwards(session, count, curvature):
    """Seconds a step of a replay forwards with `count` samples."""
    marks = Marks()
    session.checks.stride = 1
    problem = problem_of(session, curvature, Execution())
    with memory.kept():
        tracked = numpy.arange(count)
        Tangent.begin(problem, tracked, session.samples, (1, session.run.steps)).go(session.checks, marks.advance)
    return marks.a_step


def set_up(run, task):
    """Seconds before the first step of an exact replay for one target: session, self-test, and the trial of forms."""
    began = clock()
    marks = Marks()
    session = Session(run, task)
    ready = clock()
    solve(session, Question(targets=numpy.array([0]), curvature="hessian", mode="adjoint"), Execution(marks))
    return {"session": round(ready - began, 3), "first_step": round(marks.times[0] - ready - marks.a_step, 3)}


def limits(session, build, loss, data, batch):
    """What a training step, an exact and a Hessian-free step, and one more target of a block must do at least."""
    x = next(iter(DataLoader(data, batch_size=batch)))
    model, rate = build(), rates()
    step = next(iter(session.trajectory.backwards()))
    gammas = torch.randn(2, session.layout.size)

    def along(form, count, **wanted):
        point = FORMS[form](session.function, session.train, step, 0)
        return counted(lambda: point.along(gammas[:count], **wanted))

    both = {"hessian": True, "gradient": True}
    work = {
        "training": counted(lambda: loss(model, x).mean().backward()),
        "exact": along("forward", 1, **both),
        "free": along("forward", 1, hessian=False, gradient=False),
    }
    work["target"] = along("reverse", 2, **both)[0] - along("reverse", 1, **both)[0], work["training"][1]
    plain = work["training"][0]
    return {
        "gflop": round(plain / 1e9, 3),
        "exact": round(work["exact"][0] / plain, 2),
        "free": round(work["free"][0] / plain, 2),
        "machine": rate,
        "roofs": {kind: roof(kind, *found, session.layout.size, rate) for kind, found in work.items()},
    }


def ratio(values, base):
    return round(statistics.median(values) / base, 3)


def measure(name, root, folder, rounds):
    build, loss, data, batch = setting(name, root)
    train(build, loss, data, batch, folder / f"{name}.h5")
    task = trajrec.Task(build, data, Subset(data, range(8)), loss=loss)
    times = {"training": [], "exact": [], "exact_sampled": [], "free": []}
    shares = {"exact": [], "free": []}
    with trajrec.open(folder / f"{name}.h5") as run:
        session = Session(run, task)
        for _ in range(rounds):
            times["training"].append(train(build, loss, data, batch))
            for key, options in (
                ("exact", {"curvature": "hessian"}),
                ("exact_sampled", {"curvature": "hessian", "sampled": True}),
                ("free", {"curvature": "none", "sampled": True}),
            ):
                session.checks = session.new_checks(False)
                seconds, share = replayed(session, **options)
                times[key].append(seconds)
                shares.get(key, []).append(share)
        base = statistics.median(times["training"])
        row = {
            "parameters": session.layout.size,
            "batch": batch,
            "steps": run.steps,
            "training_ms": round(1e3 * base, 3),
            "limit": limits(session, build, loss, data, batch),
            **{key: ratio(values, base) for key, values in times.items() if key != "training"},
            "rounds": {key: [round(1e3 * v, 2) for v in values] for key, values in times.items()},
            "certified_every": {"exact": 1, "free": STRIDE},
            "not_derivatives": {key: round(statistics.median(v), 3) for key, v in shares.items()},
            "set_up": [set_up(run, task) for _ in range(3)],
        }
        row["blocks"] = blocks_of(session, name, base)
        row["tangent"] = {
            curvature: ratio([forwards(session, 4, curvature) / 4], base) for curvature in ("hessian", "none")
        }
        if name == "lenet":
            row["many"] = many(session, base)
            row["streamed"] = streamed(run, task)
    return row


def blocks_of(session, name, base):
    rows = []
    for count in BLOCKS[name]:
        steps = 4 if name == "lenet" and count <= 64 else 2
        row = {"targets": count}
        for key, curvature in (("exact", "hessian"), ("free", "none")):
            seconds, form = block(session, count, curvature, steps)
            row |= {key: round(seconds / count / base, 3), f"{key}_form": form}
        rows.append(row)
    return rows


def many(session, base):
    """All contributions of a batch to 1,000 targets, beside the matrix product alone."""
    rows, targets = torch.randn(64, session.layout.size), torch.randn(MANY, session.layout.size)
    product = []
    for _ in range(5):
        began = clock()
        targets @ rows.T
        product.append(clock() - began)
    seconds, form = block(session, MANY, "none", 5)
    alone = statistics.median(product)
    return {
        "targets": MANY,
        "form": form,
        "over_product": round(seconds / alone, 2),
        "product_gflops": round(2 * 64 * session.layout.size * MANY / alone / 1e9, 1),
        "a_target": round(seconds / MANY / base, 4),
    }


def streamed(run, task, count=64):
    """What writing hypergradients to disk adds to computing them, Hessian-free."""
    plain, spent = Hypergradients.write, []

    def timed(self, *block):
        began = clock()
        plain(self, *block)
        spent.append(clock() - began)

    Hypergradients.write = timed
    began = clock()
    with hypergradients(run, task, samples=range(count), exact=False) as found:
        total, size = clock() - began, found.path.stat().st_size
    Hypergradients.write = plain
    return {"samples": count, "bytes": size, "over": round(sum(spent) / (total - sum(spent)), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=ROOT.parent / "shared" / "data" / "mnist")
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, help="default: 5 of LeNet-5, fewer of the others")
    parser.add_argument("--merge", action="store_true", help="keep the rows that are not measured anew")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replay_cost.json")
    options = parser.parse_args()
    about = {"torch": str(torch.__version__), "cores": os.cpu_count(), "machine": platform.machine()}
    kept = json.loads(options.out.read_text())["rows"] if options.merge and options.out.exists() else []
    rows = {(row["model"], row["threads"]): row for row in kept}
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            torch.set_num_threads(threads)
            for name in options.models:
                row = measure(name, options.data_root, Path(folder), options.rounds or ROUNDS[name])
                row = {"model": name, "threads": threads} | row | {"load_average": round(os.getloadavg()[0], 1)}
                print(json.dumps(row), flush=True)
                rows[name, threads] = row
                options.out.write_text(json.dumps({"about": about, "rows": list(rows.values())}, indent=1) + "\n")


if __name__ == "__main__":
    main()
