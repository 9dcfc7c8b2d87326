"""How well the Hessian-free form agrees with the exact one, epoch by epoch, and what both find: the demo's training.

    python benchmarks/agreement.py [--epochs 5] [--out benchmarks/results/agreement.json]

For every number of epochs the run is cut there: a new recording of so many epochs (same seed), both replays of all
4,000 samples against the mean loss of the 1,000 test images, then Spearman, sign error, and how many of the 200 wrong
labels are among the 200 most harmful. Times are ratios to the same run's training time without the recorder.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from scipy.stats import spearmanr
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import trajrec
from trajrec.replay import contributions

EXAMPLE = Path(trajrec.__file__).parent / "cli" / "mnist"
sys.path.insert(0, str(EXAMPLE))

from model import LeNet5  # noqa: E402
from task import task, train  # noqa: E402


def training(epochs):
    """A model, its optimizer and loader, and the function that trains it: the example's own loop."""
    torch.manual_seed(0)
    model = LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(train, batch_size=64, shuffle=True)

    def loop():
        for _ in range(epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                cross_entropy(model(images), labels).backward()
                optimizer.step()

    return model, optimizer, loader, loop


def seconds(work):
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(epochs, folder):
    plain, _ = seconds(training(epochs)[3])
    model, optimizer, loader, loop = training(epochs)
    with trajrec.record(folder / f"{epochs}.h5", model=model, optimizer=optimizer, loader=loader):
        loop()
    with trajrec.open(folder / f"{epochs}.h5") as run:
        free_time, free = seconds(lambda: contributions(run, task, exact=False))
        exact_time, exact = seconds(lambda: contributions(run, task, exact=True))
    a, b = free.values[:, 0], exact.values[:, 0]
    wrong = train.noisy
    found = {name: int(wrong[v.argsort()[: wrong.sum()]].sum()) for name, v in (("hessian_free", a), ("exact", b))}
    return {
        "epochs": epochs,
        "steps": exact.certificate.steps,
        "spearman": round(float(spearmanr(a, b).statistic), 4),
        "sign_error": round(float(((a > 0) != (b > 0)).mean()), 4),
        "wrong_labels": int(wrong.sum()),
        "wrong_labels_among_as_many_most_harmful": found,
        "time_over_training": {"hessian_free": round(free_time / plain, 2), "exact": round(exact_time / plain, 2)},
        "certificate": exact.certificate.sentence,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "agreement.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(epochs, Path(folder)) for epochs in range(1, options.epochs + 1)]
    result = {"training": "LeNet-5, 4,000 MNIST images, batch 64, SGD lr .01 momentum .9", "threads": options.threads}
    result |= {"torch": str(torch.__version__), "rows": rows}
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
