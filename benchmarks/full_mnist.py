"""The paper's MNIST run at full size: recorded, replayed exactly and Hessian-free, and the two held against each other.

    python benchmarks/full_mnist.py [--data-root ../shared/data/mnist] [--work DIR] [--threads 1] [--merge --epochs 1 2]

LeNet-5 with ReLU, 50,000 training images, batch 64, 20 epochs (15,640 steps), SGD with momentum .9, weight decay 2e-5,
learning rate .01, times .1 from epoch 5 on (supplement, table 3). Contributions of all 50,000 images to the mean loss
of the 10,000 test images. As in the paper's figures 3 to 5 the Hessian-free form is compared with the exact one after
several epochs; each of these is a question of its own about the weights at that epoch, so the training is recorded up
to there again (same seed: the recordings agree to the bit), at a small size on disk.

With one thread the times are CPU times of the process, which other work on the machine disturbs less; else wall times.
Not part of the tests: half an hour on one core, most of it for 20 epochs. What comes out is written as it is; `--merge`
keeps the rows of other epochs than those asked for, so that a row can be measured again by itself.
"""

import argparse
import json
import os
import platform
import shutil
from pathlib import Path

import numpy as np
import torch
from common import LeNet5, images
from machine import clock
from scipy.stats import pearsonr, spearmanr
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Subset

import trajrec
from trajrec.replay import contributions

ROOT = Path(__file__).parent.parent
TRAINED, EPOCHS, BATCH = 50_000, 20, 64
AT = (1, 2, 5, 20)


def training(train, epochs, run=None):
    """Trains, recorded if `run` is given. Returns the model and seconds."""
    torch.manual_seed(0)
    model = LeNet5()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=2e-5)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5], gamma=0.1)
    loader = DataLoader(train, batch_size=BATCH, shuffle=True)

    def loop():
        for _ in range(epochs):
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
            schedule.step()

    began = clock()
    if run is None:
        loop()
    else:
        with trajrec.record(run, model=model, optimizer=optimizer, loader=loader, force=True):
            loop()
    return model, clock() - began


def accuracy(model, test):
    model.eval()
    with torch.no_grad():
        return sum(int((model(x).argmax(1) == y).sum()) for x, y in DataLoader(test, 1000)) / len(test)


def replayed(run, task, exact):
    began = clock()
    with trajrec.open(run) as recorded:
        result = contributions(recorded, task, exact=exact)
    return result, clock() - began


def measure(epochs, data, work):
    train, test = data
    task = trajrec.Task.supervised(LeNet5, train, test, torch.nn.CrossEntropyLoss(reduction="none"))
    plain = training(train, epochs)[1]
    run = work / f"{epochs}.h5"
    model, recorded = training(train, epochs, run)
    size = run.stat().st_size
    free, free_seconds = replayed(run, task, exact=False)
    exact, exact_seconds = replayed(run, task, exact=True)
    run.unlink()
    a, b = free.values[:, 0], exact.values[:, 0]
    return {
        "epochs": epochs,
        "steps": exact.certificate.steps,
        "test_accuracy": round(accuracy(model, test), 4),
        "seconds": {
            "training": round(plain, 1),
            "recorded": round(recorded, 1),
            "hessian_free": round(free_seconds, 1),
            "exact": round(exact_seconds, 1),
        },
        "over_training": {"hessian_free": round(free_seconds / plain, 2), "exact": round(exact_seconds / plain, 2)},
        "run_bytes": size,
        "spearman": round(float(spearmanr(a, b).statistic), 4),
        "pearson": round(float(pearsonr(a, b).statistic), 4),
        "sign_error": round(float(((a > 0) != (b > 0)).mean()), 4),
        "relative_error": round(float(np.linalg.norm(a - b) / np.linalg.norm(b)), 4),
        "mean": {"hessian_free": float(a.mean()), "exact": float(b.mean())},
        "standard_deviation": {"hessian_free": float(a.std()), "exact": float(b.std())},
        "adjoint_growth": {"hessian_free": float(free.growth.max()), "exact": float(exact.growth.max())},
        "certificate": {"hessian_free": free.certificate.sentence, "exact": exact.certificate.sentence},
        "clock": "CPU" if torch.get_num_threads() == 1 else "wall",
        "load_average": os.getloadavg()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", type=Path, default=ROOT.parent / "shared" / "data" / "mnist")
    parser.add_argument("--work", type=Path, default=Path("/tmp/trajrec-full-mnist"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--epochs", type=int, nargs="+", default=list(AT))
    parser.add_argument("--merge", action="store_true", help="keep the rows of other epochs that --out holds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "full_mnist.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    data = Subset(images(options.data_root), range(TRAINED)), images(options.data_root, train=False)
    about = {"threads": options.threads, "torch": str(torch.__version__), "machine": platform.machine()}
    before = json.loads(options.out.read_text())["rows"] if options.merge else []
    rows = [row for row in before if row["epochs"] not in options.epochs]
    for epochs in options.epochs:
        rows.append(measure(epochs, data, options.work))
        print(json.dumps(rows[-1]), flush=True)
        rows.sort(key=lambda row: row["epochs"])
        options.out.write_text(json.dumps({"about": about | {"cores": os.cpu_count()}, "rows": rows}, indent=1) + "\n")
    shutil.rmtree(options.work)


if __name__ == "__main__":
    main()
