"""What a contribution means where samples touch each other: the weight of a loss term beside the removal of its sample.

    python benchmarks/coupled.py [--samples 40] [--out benchmarks/results/coupled.json]

A contribution is the derivative by the weight of a sample's own loss term. Where the losses of a batch see each other's
samples, a sample that is really gone is also missing there: among the negatives of a contrastive loss, in the
statistics of a batch normalisation. Three trainings on scikit-learn's digits, in float64: the upper half of an image
against the lower halves of its batch (InfoNCE), a classifier that normalises by the statistics of its batch (in test,
too), and the same without. For samples drawn at random the training is made again on the recorded schedule, once
without the sample's loss term and once with the sample out of its batches, which are still divided by their full size.
Slope: of what happened against the contribution, by least squares through zero.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay import contributions

TRAINED, TESTED, EPOCHS, BATCH, HIDDEN, TEMPERATURE = 320, 160, 8, 32, 24, 0.5


class Towers(nn.Module):
    """Two encoders, of the upper and the lower half of an image; gives their unit vectors."""

    def __init__(self):
        super().__init__()
        self.upper, self.lower = (nn.Sequential(nn.Linear(32, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 16)) for _ in "ab")

    def forward(self, x):
        halves = self.upper(x[:, :32]), self.lower(x[:, 32:])
        return [half / (half.square().sum(1, keepdim=True) + 1e-6).sqrt() for half in halves]


def contrastive(model, batch):
    """InfoNCE of every sample; the lower halves of the others are its negatives."""
    upper, lower = model(batch[0])
    return functional.cross_entropy(upper @ lower.T / TEMPERATURE, torch.arange(len(upper)), reduction="none")


def cross_entropy(model, batch):
    """Of every sample."""
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def classifier(norm):
    """A network that may normalise by the statistics of its batch, in training and test."""
    middle = [nn.BatchNorm1d(HIDDEN, track_running_stats=False)] if norm else []
    return nn.Sequential(nn.Linear(64, HIDDEN), *middle, nn.Tanh(), nn.Linear(HIDDEN, 10))


CASES = {
    "in-batch negatives": (Towers, contrastive, 0.01),
    "BatchNorm": (lambda: classifier(norm=True), cross_entropy, 0.01),
    "separate samples": (lambda: classifier(norm=False), cross_entropy, 0.01),
}


def data():
    """Digits for training and test."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))[: TRAINED + TESTED]
    x, y = torch.tensor(images[order] / 16), torch.tensor(labels[order])
    return TensorDataset(x[:TRAINED], y[:TRAINED]), TensorDataset(x[TRAINED:], y[TRAINED:])


def fit(case, sets, without=None, how="", record=None):
    """The mean test loss; recorded, or with a sample's term or the sample itself taken out."""
    build, loss, rate = CASES[case]
    torch.manual_seed(0)
    model = build().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    numbered = TensorDataset(*sets[0].tensors, torch.arange(TRAINED))
    loader = DataLoader(numbered, BATCH, shuffle=True)

    def loop():
        for _ in range(EPOCHS):
            for x, y, ids in loader:
                stays = ids != without if without is not None else torch.ones_like(ids, dtype=torch.bool)
                optimizer.zero_grad()
                losses = loss(model, (x[stays], y[stays])) if how == "sample" else loss(model, (x, y)) * stays
                (losses.sum() / len(ids)).backward()
                optimizer.step()

    if record:
        with trajrec.record(record, model=model, optimizer=optimizer, loader=loader):
            loop()
    else:
        loop()
    with torch.no_grad():
        return loss(model, sets[1].tensors).mean().item()


def measured(case, sets, samples):
    """One row: slopes and rank correlations of what happened against the contributions."""
    build, loss, _ = CASES[case]
    numbered = TensorDataset(*sets[0].tensors, torch.arange(TRAINED))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.h5"
        whole = fit(case, sets, record=path)
        with trajrec.open(path) as run:
            found = contributions(run, trajrec.Task(build, numbered, sets[1], loss=loss), samples=samples, exact=True)
    predicted = found.values[:, 0]
    row = {"training": case, "loss": round(whole, 4), "certificate": str(found.certificate.verdict)}
    for how in ("term", "sample"):
        happened = np.array([fit(case, sets, int(sample), how) - whole for sample in samples])
        row[how] = {
            "slope": round(float(predicted @ happened / (predicted @ predicted)), 3),
            "spearman": round(float(spearmanr(predicted, happened).statistic), 3),
        }
    return row


def main():
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=40, help="samples that are taken out (default 40)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "coupled.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sets = data()
    samples = np.sort(np.random.default_rng(1).permutation(TRAINED)[: options.samples])
    rows = []
    for case in CASES:
        rows.append(measured(case, sets, samples))
        print(rows[-1], flush=True)
    found = {"samples": options.samples, "torch": torch.__version__, "batch": BATCH, "epochs": EPOCHS, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
