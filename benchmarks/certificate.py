"""What the certificate lets through: wrong Tasks by kind and size, and right Tasks that are refused.

    python benchmarks/certificate.py [--out benchmarks/results/certificate.json]

Right: 17 trainings, each recorded in three places (here; with another number of threads; with another instruction set,
as another machine has it), each with all rows and with keyframes every five steps, and replayed here on one thread in
the recording's floating type, those in single precision in double as well.

Wrong: a training of a small network with LayerNorm and dropout, 24 steps, recorded here and on two threads. The Task
does a little more than the training did, by a size s that shrinks by half decades until it is let through. Told is the
smallest size that is refused. About twenty minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import Transformer
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay.session import Session

PLACES = {
    "here": {},
    "two threads": {"threads": 2},
    "another instruction set": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
    },
}
EVERY = 5
SIZES = [float(f"{m}e-{k}") for k in range(2, 16) for m in (10, 3)]


# -- trainings ---------------------------------------------------------------------------------------------------------


def vectors(count, seed, dtype=torch.float32):
    # Not by torch: another instruction set draws other numbers there.
    g = np.random.default_rng(seed)
    x = torch.from_numpy(g.standard_normal((count, 20))).float().to(dtype)
    return TensorDataset(x, torch.from_numpy(g.integers(0, 4, count)))


def pictures(count, seed, dtype=torch.float32):
    g = np.random.default_rng(seed)
    x = torch.from_numpy(g.standard_normal((count, 3, 12, 12))).float().to(dtype)
    return TensorDataset(x, torch.from_numpy(g.integers(0, 10, count)))


def text(count, seed, dtype=torch.float32):
    x = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (count, 31)))
    return TensorDataset(x[:, :-1].contiguous(), x[:, 1:].contiguous())


def mlp():
    return nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))


def dropping():
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 4))


def normalised():
    return nn.Sequential(nn.Linear(20, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4))


def convolutions():
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    last = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(
        first, nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), second, nn.BatchNorm2d(32), nn.ReLU(), *last
    )


def plain_convolutions():
    first, second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1)
    return nn.Sequential(first, nn.GELU(), nn.MaxPool2d(2), second, nn.GELU(), nn.Flatten(), nn.Linear(1152, 10))


def language():
    return Transformer(length=30, width=48, blocks=2)


def large_language():
    return Transformer(length=30)


def samples(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def tokens(model, batch):
    return functional.cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)


def loop_loss(model, batch):
    """As a loop takes it: a mean over all tokens at once, where the Task takes one over samples first."""
    scores = model(batch[0])
    return functional.cross_entropy(scores.flatten(0, -2), batch[1].flatten())


def stepping(name, **options):
    return lambda model: getattr(torch.optim, name)(model.parameters(), **options)


TRAININGS = {
    "MLP, SGD": (mlp, vectors, stepping("SGD", lr=0.05, momentum=0.9)),
    "MLP, fused SGD": (mlp, vectors, stepping("SGD", lr=0.05, momentum=0.9, fused=True)),
    "MLP, SGD at 1e-6": (mlp, vectors, stepping("SGD", lr=1e-6)),
    "MLP, Adam at 1e-7": (mlp, vectors, stepping("Adam", lr=1e-7)),
    "MLP, Adagrad": (mlp, vectors, stepping("Adagrad", lr=0.01)),
    "MLP in float64, Adam": (mlp, vectors, stepping("Adam", lr=1e-3)),
    "dropout, Nesterov": (dropping, vectors, stepping("SGD", lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-3)),
    "dropout, RMSprop": (dropping, vectors, stepping("RMSprop", lr=1e-3)),
    "BatchNorm, Adam": (normalised, vectors, stepping("Adam", lr=1e-3)),
    "BatchNorm in float64, Adam": (normalised, vectors, stepping("Adam", lr=1e-3)),
    "convolutions with BatchNorm, Adam": (convolutions, pictures, stepping("Adam", lr=1e-3)),
    "convolutions with BatchNorm, fused AdamW": (convolutions, pictures, stepping("AdamW", lr=1e-3, fused=True)),
    "convolutions, AdamW": (plain_convolutions, pictures, stepping("AdamW", lr=3e-4)),
    "convolutions, foreach NAdam": (plain_convolutions, pictures, stepping("NAdam", lr=3e-4, foreach=True)),
    "transformer, AdamW": (language, text, stepping("AdamW", lr=3e-4)),
    "transformer, SGD": (language, text, stepping("SGD", lr=0.05, momentum=0.9)),
    "transformer of 863,232 weights, AdamW": (large_language, text, stepping("AdamW", lr=3e-4)),
}


def data_of(name):
    _, data, _ = TRAININGS[name]
    dtype = torch.float64 if "float64" in name else torch.float32
    large = "863" in name
    return data(24 if large else 90, 0, dtype), data(8, 1, dtype), dtype


def record(name, path, **options):
    build, _, optimizer = TRAININGS[name]
    train, _, dtype = data_of(name)
    torch.manual_seed(0)
    model = build().to(dtype)
    made = optimizer(model)
    loader = DataLoader(train, 6 if "863" in name else 12, shuffle=True)
    with trajrec.record(path, model=model, optimizer=made, loader=loader, **options):
        for _ in range(2):
            for batch in loader:
                made.zero_grad()
                loop_loss(model, batch).backward()
                made.step()


def paths(folder, name):
    stem = "".join(c if c.isalnum() else "-" for c in name)
    return {"rows": (folder / f"{stem}-rows.h5", {}), "keyframes": (folder / f"{stem}-keys.h5", {"keep": EVERY})}


def record_all(folder, threads):
    torch.set_num_threads(threads)
    for name in TRAININGS:
        for path, options in paths(folder, name).values():
            record(name, path, **options)


# -- right Tasks -------------------------------------------------------------------------------------------------------


def certified(path, task, dtype=None):
    """The drift that a Task is refused for, or None; and the certificate of one that is not."""
    with trajrec.open(path) as run:
        session = Session(run, task, dtype=dtype)
        drifted = session.find_drift()
        if drifted is not None:
            return drifted.drift, None
        return None, Session(run, task, dtype=dtype).certify(Quiet())


class Quiet:
    def start(self, what, steps, done=0):
        pass

    def advance(self, count):
        pass


def right(folder):
    rows = []
    for place, settings in PLACES.items():
        where = folder / place.replace(" ", "-")
        where.mkdir()
        extra = {name: value for name, value in settings.items() if name != "threads"}
        threads = str(settings.get("threads", 1))
        command = [sys.executable, __file__, "--record", str(where), threads]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": threads, **extra})
        for name, (build, data, _) in TRAININGS.items():
            train, test, dtype = data_of(name)
            task = trajrec.Task(build, train, test, loss=tokens if data is text else samples)
            for keep, (path, _) in paths(where, name).items():
                for precision in ("float32", "float64") if dtype == torch.float32 and keep == "rows" else (None,):
                    refused, certificate = certified(path, task, precision)
                    rows.append(
                        {
                            "training": name,
                            "place": place,
                            "keep": keep,
                            "precision": precision or str(dtype).removeprefix("torch."),
                            "refused": refused,
                            "verdict": None if certificate is None else str(certificate.verdict),
                            "drift": None if certificate is None else certificate.max_drift,
                            "checked": None if certificate is None else certificate.steps_checked,
                            "steps": None if certificate is None else certificate.steps,
                        }
                    )
                    print(rows[-1], flush=True)
    return rows


# -- wrong Tasks -------------------------------------------------------------------------------------------------------


def small(rate=0.2, eps=1e-5):
    head = [nn.Linear(20, 24), nn.LayerNorm(24, eps=eps), nn.Tanh(), nn.Dropout(rate)]
    return nn.Sequential(*head, nn.Linear(24, 4))


def smoothed(s):
    return {
        "loss": lambda model, batch: functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none", label_smoothing=s
        )
    }


def penalty(of):
    return lambda s: {"penalty": lambda model: s * of(model)}


def one_heavier(s):
    """The loss of one sample in ninety."""

    def loss(model, batch):
        known = batch[0][:, 0] == vectors(90, 0).tensors[0][7, 0]
        return samples(model, batch) * (1 + s * known.to(batch[0].dtype))

    return {"loss": loss}


KINDS = {
    "label smoothing s": smoothed,
    "L2 penalty s * sum w^2": penalty(lambda model: sum(p.square().sum() for p in model.parameters())),
    "L1 penalty s * sum abs(w)": penalty(lambda model: sum(p.abs().sum() for p in model.parameters())),
    "loss times 1 + s": lambda s: {"loss": lambda model, batch: samples(model, batch) * (1 + s)},
    "one bias: s b_0 in the loss": penalty(lambda model: model[4].bias[0]),
    "one weight: s w_00 in the loss": penalty(lambda model: model[0].weight[0, 0]),
    "one sample of 90 counts 1 + s": one_heavier,
    "inputs times 1 + s": lambda s: {
        "loss": lambda model, batch: functional.cross_entropy(model(batch[0] * (1 + s)), batch[1], reduction="none")
    },
    "dropout rate .2 + s": lambda s: {"model": lambda: small(0.2 + s)},
    "LayerNorm eps 1e-5 + s": lambda s: {"model": lambda: small(eps=1e-5 + s)},
}


OPTIMIZERS = {"SGD": stepping("SGD", lr=0.05, momentum=0.9), "Adam": stepping("Adam", lr=1e-3)}


def record_small(path, optimizer, dtype, threads, **options):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = small().to(dtype)
    made = OPTIMIZERS[optimizer](model)
    loader = DataLoader(vectors(90, 0, dtype), 12, shuffle=True)
    with trajrec.record(path, model=model, optimizer=made, loader=loader, force=True, **options):
        for _ in range(3):
            for x, y in loader:
                made.zero_grad()
                functional.cross_entropy(model(x), y).backward()
                made.step()
    torch.set_num_threads(1)


def is_refused(path, dtype, told):
    told = {"model": small, "loss": samples, **told}
    data = vectors(90, 0, dtype), vectors(8, 1, dtype)
    with trajrec.open(path) as run:
        return Session(run, trajrec.Task(told.pop("model"), *data, **told)).find_drift() is not None


def smallest(path, dtype, kind):
    found = None
    for s in SIZES:
        if not is_refused(path, dtype, KINDS[kind](s)):
            break
        found = s
    return found


def wrong(folder):
    rows = []
    for optimizer in OPTIMIZERS:
        for dtype in (torch.float64, torch.float32):
            for threads in (1, 2):
                for keep, options in (("rows", {}), ("keyframes", {"keep": EVERY})):
                    path = folder / "wrong.h5"
                    record_small(path, optimizer, dtype, threads, **options)
                    at = {
                        "optimizer": optimizer,
                        "precision": str(dtype).removeprefix("torch."),
                        "place": "here" if threads == 1 else "two threads",
                        "keep": keep,
                    }
                    assert not is_refused(path, dtype, {}), at
                    rows.append(at | {"smallest": {kind: smallest(path, dtype, kind) for kind in KINDS}})
                    print(rows[-1], flush=True)
    return rows


def table(result):
    """The table of docs/certified.md: the smallest size found, under SGD / under Adam."""
    columns = [
        (p, k, w) for p in ("float64", "float32") for k in ("rows", "keyframes") for w in ("here", "two threads")
    ]
    lines = ["| the Task adds | " + " | ".join(f"{p}, {k}, {w}" for p, k, w in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for kind in KINDS:
        cells = []
        for at in columns:
            mine = [r for r in result["wrong"] if (r["precision"], r["keep"], r["place"]) == at]
            sizes = [row["smallest"][kind] for row in sorted(mine, key=lambda row: row["optimizer"], reverse=True)]
            cells.append(" / ".join("none" if s is None else f"{s:.0e}" for s in sizes))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "certificate.json")
    parser.add_argument("--record", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=["right", "wrong"], help="measure one of the two, and keep the other")
    parser.add_argument("--table", action="store_true", help="print the table of docs/certified.md from --out")
    options = parser.parse_args()
    if options.table:
        return print(table(json.loads(options.out.read_text())))
    if options.record:
        return record_all(Path(options.record[0]), int(options.record[1]))
    torch.set_num_threads(1)
    result = json.loads(options.out.read_text()) if options.only and options.out.exists() else {}
    result["about"] = {"torch": str(torch.__version__), "threads": 1, "trainings": len(TRAININGS) * len(PLACES)}
    with tempfile.TemporaryDirectory() as folder:
        if options.only != "wrong":
            result["right"] = right(Path(folder))
            result["about"]["refused"] = sum(row["refused"] is not None for row in result["right"])
            result["about"]["replays"] = len(result["right"])
        if options.only != "right":
            result["wrong"] = wrong(Path(folder))
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
