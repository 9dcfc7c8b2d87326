"""How time and memory of a replay grow: with parameters, tracked samples, targets and steps (supplement, figure 1).

    python benchmarks/growth.py [--merge] [--out benchmarks/results/growth.json]

Random data, batch 64, one thread. Parameters: LeNet-5, DenseNet-40 and MobileNetV2 (2,236,682 for ten classes), exact
contributions of all samples to one target. Tracked samples: 400, 2,000 and 10,000 of LeNet-5, forwards, Hessian-free,
each of them a hypergradient. Targets: 1 to 64 of LeNet-5, exact. Steps: LeNet-5, exact.

Every recording and every replay is a process of its own. Seconds are CPU time: of the whole replay, and of its steps
alone, without set-up and the trial of forms. Memory is the peak of the process over what it held before it opened the
run: torch and the data. Slopes are those of least squares in log-log, of the steps' time: 1 is linear, 0 is constant.
Ten minutes; the result is written after every row, and `--merge` goes on with one that was cut off.
"""

import argparse
import json
import os
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
from trajrec.replay.methods.blocks import Execution
from trajrec.replay.methods.contributions import solve
from trajrec.replay.progress import Silent
from trajrec.replay.question import Question
from trajrec.replay.session import Session

SERIES = {
    "parameters": [("lenet", 4), ("densenet", 4), ("mobilenet", 4)],
    "samples": [("400", 12), ("2000", 12), ("10000", 12)],
    "targets": [("1", 12), ("4", 12), ("16", 12), ("64", 12)],
    "steps": [("20", 20), ("200", 200), ("2000", 2000)],
}


def mobilenet():
    from trajrec.vision import import_torchvision

    return import_torchvision().models.mobilenet_v2(num_classes=10)


MODELS = {"lenet": (LeNet5, (1, 28, 28)), "densenet": (DenseNet40, (3, 32, 32)), "mobilenet": (mobilenet, (3, 32, 32))}


def task_of(series, point):
    build, shape = MODELS[point if series == "parameters" else "lenet"]
    count = 10_000 if series == "samples" else 640
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(count, *shape), torch.randint(10, (count,)))
    test = TensorDataset(torch.randn(256, *shape), torch.randint(10, (256,)))
    return trajrec.Task.supervised(build, data, test, torch.nn.CrossEntropyLoss(reduction="none"))


def record(series, point, steps, run):
    """Records a training and prints the CPU seconds of one of its steps."""
    task = task_of(series, point)
    torch.manual_seed(0)
    model, marks = task.build_model(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    loader = DataLoader(task.train, batch_size=64, shuffle=True, drop_last=True)
    with trajrec.record(run, model=model, optimizer=optimizer, loader=loader, force=True):
        while len(marks) < steps:
            for x, y in loader:
                optimizer.zero_grad()
                cross_entropy(model(x), y).backward()
                optimizer.step()
                marks.append(time.thread_time())
                if len(marks) == steps:
                    break
    print(json.dumps({"training_step_seconds": round(a_step(marks), 5)}))


class Marks(Silent):
    """The CPU time of every step of a replay."""

    def __init__(self):
        self.times = []

    def advance(self, count):
        if count == 1:
            self.times.append(time.process_time())


def a_step(times):
    return (times[-1] - times[0]) / (len(times) - 1)


def peak():
    """The largest resident size of this process so far, in megabytes."""
    # getrusage would tell that of the process that started this one, if that was larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def replay(series, point, steps, run):
    """Asks the series' question and prints what it took."""
    task, marks = task_of(series, point), Marks()
    options = {
        "samples": lambda: {
            "samples": np.arange(int(point)),
            "mode": "tangent",
            "targets": np.array([0]),
            "curvature": "none",
        },
        "targets": lambda: {"targets": np.arange(int(point)), "mode": "adjoint", "curvature": "hessian"},
    }.get(series, lambda: {"targets": np.array([0]), "mode": "adjoint", "curvature": "hessian"})()
    before, began = peak(), time.process_time()
    with trajrec.open(run) as recorded:
        session = Session(recorded, task, memory=4 << 30)
        solve(session, Question(**options), Execution(marks))
    steps_alone = a_step(marks.times) * len(marks.times)
    found = {"seconds": round(time.process_time() - began, 2), "steps_seconds": round(steps_alone, 4)}
    x = {"parameters": session.layout.size, "steps": steps}.get(series) or int(point)
    print(json.dumps({"x": x, "peak_MB": round(peak() - before, 1)} | found))


def measured(series, point, steps, run):
    """A row: a recording and a replay, each in a process of its own."""
    row = {"series": series, "point": point, "steps": steps}
    for part in ("record", "replay"):
        command = [sys.executable, __file__, "--part", part, series, point, str(steps), str(run)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row |= json.loads(done.stdout.splitlines()[-1])
    return row


def slope(rows, key, least):
    """The slope in log-log; what is below `least` is noise."""
    x, y = (np.log([max(row[k], least) for row in rows]) for k in ("x", key))
    return round(float(np.polyfit(x, y, 1)[0]), 2)


def slopes(rows):
    """By series, of those with two rows at least."""
    series = {name: [row for row in rows if row["series"] == name] for name in SERIES}
    return {
        name: {"time": slope(mine, "steps_seconds", 0), "memory": slope(mine, "peak_MB", 1)}
        for name, mine in series.items()
        if len(mine) > 1
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--series", nargs="+", default=list(SERIES))
    parser.add_argument("--merge", action="store_true", help="keep the rows that --out holds, measure the others")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "growth.json")
    parser.add_argument("--part", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        torch.set_num_threads(1)
        part, series, point, steps, run = options.part
        return {"record": record, "replay": replay}[part](series, point, int(steps), Path(run))
    rows = json.loads(options.out.read_text())["rows"] if options.merge and options.out.exists() else []
    known = {(row["series"], row["point"], row["steps"]) for row in rows}
    wanted = [(series, *at) for series in options.series for at in SERIES[series]]
    with tempfile.TemporaryDirectory() as folder:
        for series, point, steps in [at for at in wanted if at not in known]:
            rows.append(measured(series, point, steps, Path(folder) / "run.h5"))
            rows[-1]["load_average"] = round(os.getloadavg()[0], 1)
            print(rows[-1], flush=True)
            rows.sort(key=lambda row: (list(SERIES).index(row["series"]), row["x"]))
            about = {"torch": str(torch.__version__), "threads": 1, "cores": os.cpu_count()}
            result = {"about": about, "slopes": slopes(rows), "rows": rows}
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
