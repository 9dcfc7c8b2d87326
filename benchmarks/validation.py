"""What `trajrec validate` says of a training, beside what many more trainings say: does its verdict tell them apart?

    python benchmarks/validation.py [--sets 24] [--out benchmarks/results/validation.json]

Small networks on the digits of scikit-learn (8 x 8 pixels; 1,000 are trained on, 100 of them with a wrong label on
purpose), with smooth activations or ReLU, at gentle and large learning rates, 200 steps each. `validate` trains again
without 5 random sets of 1 % and gives its verdict. The truth is the linear datamodeling score on the recorded schedule:
24 other random sets of 1 %, and of 10 %, are taken out, and Spearman's correlation of predicted and real changes is
taken for each of 20 test samples. Also: leave-one-out of 12 samples, the growth of the adjoint, and what a training
again costs over a plain one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay import contributions, validate
from trajrec.replay.losses.targets import choose_targets
from trajrec.replay.session import Session
from trajrec.replay.validation.retrain import Retraining

TRAINED, WRONG, EPOCHS, BATCH = 1000, 100, 10, 50
TARGETS = np.arange(0, 400, 20)


def perceptron(activation):
    return lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(64, 48), activation(), nn.Linear(48, 48), activation(), nn.Linear(48, 10)
    )


def convolutional(activation, pool):
    return lambda: nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), activation(), pool(2), nn.Conv2d(8, 16, 3, padding=1), activation(), pool(2)),
        *(nn.Flatten(), nn.Linear(64, 10)),
    )


def sgd(rate):
    return lambda parameters: torch.optim.SGD(parameters, lr=rate, momentum=0.9)


def adam(rate):
    return lambda parameters: torch.optim.Adam(parameters, lr=rate)


CASES = {
    "SiLU perceptron, SGD lr .02": (perceptron(nn.SiLU), sgd(0.02)),
    "SiLU perceptron, SGD lr .2": (perceptron(nn.SiLU), sgd(0.2)),
    "SiLU perceptron, SGD lr .8": (perceptron(nn.SiLU), sgd(0.8)),
    "ReLU perceptron, SGD lr .005": (perceptron(nn.ReLU), sgd(0.005)),
    "ReLU perceptron, SGD lr .05": (perceptron(nn.ReLU), sgd(0.05)),
    "ReLU perceptron, SGD lr .2": (perceptron(nn.ReLU), sgd(0.2)),
    "GELU CNN, average pooling, Adam lr .003": (convolutional(nn.GELU, nn.AvgPool2d), adam(0.003)),
    "ReLU CNN, max pooling, Adam lr .003": (convolutional(nn.ReLU, nn.MaxPool2d), adam(0.003)),
    "ReLU CNN, max pooling, Adam lr .02": (convolutional(nn.ReLU, nn.MaxPool2d), adam(0.02)),
}


def data():
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.tensor(digits.images[order] / 16, dtype=torch.float32).unsqueeze(1)
    y = torch.tensor(digits.target[order])
    y[:WRONG] = (y[:WRONG] + torch.randint(1, 10, (WRONG,), generator=torch.Generator().manual_seed(0))) % 10
    return TensorDataset(x[:TRAINED], y[:TRAINED]), TensorDataset(
        x[TRAINED : TRAINED + 400], y[TRAINED : TRAINED + 400]
    )


def fit(model, optimizer, loader):
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()


def record(path, train, build, optimizer):
    """Returns the seconds of the same training, unrecorded."""
    torch.manual_seed(0)
    model = build()
    stepped, loader = optimizer(model.parameters()), DataLoader(train, BATCH, shuffle=True)
    with trajrec.record(path, model=model, optimizer=stepped, loader=loader, force=True):
        fit(model, stepped, loader)
    model = build()
    began = time.process_time()
    fit(model, optimizer(model.parameters()), DataLoader(train, BATCH, shuffle=True))
    return time.process_time() - began


def seconds_again(run, task):
    session = Session(run, task)
    again = Retraining(session, choose_targets("mean", session.test), lambda _: None)
    again.change(np.arange(10))
    began = time.process_time()
    again.change(np.arange(10))
    return time.process_time() - began


def measured(run, task, sets, plain):
    found = contributions(run, task, targets=TARGETS, exact=True)
    said = validate(run, task, contributions=found)
    truth = {
        share: validate(run, task, contributions=found, subsets=0, lds=sets, lds_fraction=share, seed=1).lds.score
        for share in (0.01, 0.1)
    }
    alone = validate(run, task, contributions=found, subsets=0, loo=12, seed=1).leave_one_out
    return {
        "loss": round(float(run.losses[-20:].mean()), 3),
        "growth": round(float(found.growth.max()), 2),
        "kinks": list(Session(run, task).function.kinks),
        "correlation": round(said.correlation, 3),
        "interval": [round(end, 3) for end in said.interval],
        "verdict": said.verdict,
        "lds_1": round(truth[0.01], 3),
        "lds_10": round(truth[0.1], 3),
        "leave_one_out": round(alone.spearman, 3),
        "again_over_plain": round(seconds_again(run, task) / plain, 2),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", type=int, default=24)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "validation.json")
    options = parser.parse_args()
    train, test = data()
    about = {"sets": options.sets, "targets": len(TARGETS), "torch": str(torch.__version__)}
    known = json.loads(options.out.read_text()) if options.out.is_file() else {}
    # What was cut off goes on; other settings begin anew.
    rows = known.pop("rows", [])
    rows = rows if known == about else []
    for name, (build, optimizer) in CASES.items():
        if any(row["training"] == name for row in rows):
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.h5"
            plain = record(path, train, build, optimizer)
            with trajrec.open(path) as run:
                task = trajrec.Task.supervised(build, train, test)
                rows.append({"training": name} | measured(run, task, options.sets, plain))
        print(json.dumps(rows[-1]), flush=True)
        options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
