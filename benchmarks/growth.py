"""How time and memory of a replay grow: with parameters, tracked samples, targets and steps (supplement, figure 1).

    python benchmarks/growth.py [--out benchmarks/results/growth.json]

Random data, batch 64. Parameters: LeNet-5, DenseNet-40 and MobileNetV2 (2,236,682 for ten classes), exact contributions
of all samples to one target. Tracked samples: 400, 2,000 and 10,000 hypergradients of LeNet-5, Hessian-free. Targets: 1
to 256 of LeNet-5, exact. Steps: LeNet-5, exact. Every measurement is a process of its own; memory is its peak over that
of the process before the replay. Slopes are those of least squares in log-log: 1 is linear, 0 is constant.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import DenseNet40, LeNet5
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay.contribution import solve
from trajrec.replay.session import Session

SERIES = {
    "parameters": [("lenet", 6), ("densenet", 6), ("mobilenet", 6)],
    "samples": [("400", 20), ("2000", 20), ("10000", 20)],
    "targets": [("1", 12), ("4", 12), ("16", 12), ("64", 12)],
    "steps": [("20", 20), ("200", 200), ("2000", 2000)],
}


def mobilenet():
    from trajrec.vision import import_torchvision

    return import_torchvision().models.mobilenet_v2(num_classes=10)


MODELS = {"lenet": (LeNet5, (1, 28, 28)), "densenet": (DenseNet40, (3, 32, 32)), "mobilenet": (mobilenet, (3, 32, 32))}


def task_of(name, samples):
    build, shape = MODELS[name]
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(samples, *shape), torch.randint(10, (samples,)))
    test = TensorDataset(torch.randn(256, *shape), torch.randint(10, (256,)))
    return trajrec.Task.supervised(build, data, test, torch.nn.CrossEntropyLoss(reduction="none"))


def record(task, steps, run):
    torch.manual_seed(0)
    model, done = task.build_model(), 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    loader = DataLoader(task.train, batch_size=64, shuffle=True, drop_last=True)
    with trajrec.record(run, model=model, optimizer=optimizer, loader=loader, force=True):
        while done < steps:
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    break


def trial(series, point, steps, run):
    """One measurement; prints it as JSON."""
    torch.set_num_threads(1)
    name = point if series == "parameters" else "lenet"
    task = task_of(name, 10_000 if series == "samples" else 640)
    record(task, steps, run)
    options = {
        "samples": {"samples": np.arange(int(point)), "mode": "tangent"} if series == "samples" else {},
        "targets": {"targets": np.arange(int(point)), "exact": True} if series == "targets" else {},
    }.get(series) or {"exact": True}
    with trajrec.open(run) as recorded:
        session = Session(recorded, task, memory=2 << 30)
        before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        solve(session, **({"mode": "adjoint", "targets": [0]} | options))
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    x = {"parameters": session.layout.size, "steps": steps}.get(series) or int(point)
    print(json.dumps({"series": series, "point": point, "x": x, "steps": steps, "seconds": round(seconds, 2),
                      "peak_MB": round(peak / 1024, 1)}))  # fmt: skip


def slope(rows, key):
    """The slope in log-log; time of models is taken a step, and memory below a megabyte is noise."""
    x = np.log([row["x"] for row in rows])
    y = np.log([max(row[key], 1.0) if key == "peak_MB" else row[key] for row in rows])
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", nargs="+", default=list(SERIES))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    parser.add_argument("--trial", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial:
        series, point, steps, run = options.trial
        return trial(series, point, int(steps), Path(run))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for series in options.series:
            for point, steps in SERIES[series]:
                arguments = [series, point, str(steps), f"{folder}/run.h5"]
                command = [sys.executable, __file__, "--trial", *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                rows.append(json.loads(done.stdout.splitlines()[-1]))
                print(rows[-1], flush=True)
    slopes = {
        s: {key: slope([r for r in rows if r["series"] == s], key) for key in ("seconds", "peak_MB")}
        for s in options.series
    }
    about = {"load_average": round(os.getloadavg()[0], 1), "torch": str(torch.__version__), "threads": 1}
    options.out.write_text(json.dumps({"about": about, "slopes": slopes, "rows": rows}, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
