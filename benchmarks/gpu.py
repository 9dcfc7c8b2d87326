"""Recording and replay on a GPU: what they cost beside the training, and whether they are right.

    benchmarks/gpu.sh                                          all of it, in at most eight minutes
    python benchmarks/gpu.py --device cpu --quick --out FILE   the same program on any machine, small

ResNet-18 on random 32 x 32 images (batch 128), a GPT of 10.8 M weights on random bytes (batch 32 of length 128).

* tests: `pytest -m cuda`.
* recording: two trainings from the same start, one of them recorded, take turns of some steps; the wall time of a turn,
  with the device waited for, recorded over unrecorded, median over the pairs. "none" records neither and shows the
  noise. Weights of every step, and keyframes every 64.
* replay: seconds between the second and the last step of a replay for one target, over those of the training, with the
  most memory that either takes on the device.
* equality: contributions of the GPU's replay against those of a CPU's replay of the same recording.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from common import Transformer
from torch import nn
from torch.nn.functional import cross_entropy, relu
from torch.utils.data import DataLoader, TensorDataset

import trajrec
from trajrec.replay import contributions
from trajrec.replay.progress import Silent

ROOT = Path(__file__).parent.parent


class _Residual(nn.Module):
    def __init__(self, before, after, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.short = nn.Identity()
        if before != after:
            self.short = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x):
        return relu(self.short(x) + self.norm2(self.conv2(relu(self.norm1(self.conv1(x))))))


class ResNet18(nn.Module):
    """The form for 32 x 32 images: 11.2 M weights of width 64."""

    def __init__(self, width=64):
        super().__init__()
        sizes = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = [_Residual(a, b, 1 + (a != b)) for a, b in pairwise(sizes)]
        blocks = [layer for block, b in zip(blocks, sizes[1:], strict=True) for layer in (block, _Residual(b, b, 1))]
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks, self.out = nn.Sequential(*blocks), nn.Linear(sizes[-1], 10)

    def forward(self, x):
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


class Setting:
    """A training: model, data, loss of every sample, optimizer."""

    def __init__(self, name, steps, quick):
        self.name, self.is_text = name, name == "gpt"
        self.width, self.batch = (8, 8) if quick else (64, 32 if self.is_text else 128)
        count = steps * self.batch
        generator = torch.Generator().manual_seed(0)
        if self.is_text:
            text = torch.randint(256, (count, 33 if quick else 129), generator=generator)
            self.data = TensorDataset(text[:, :-1], text[:, 1:])
            self.size = {"length": text.shape[1] - 1, "width": 32 if quick else 384, "blocks": 2 if quick else 6}
        else:
            x = torch.randn(count, 3, 32, 32, generator=generator)
            self.data = TensorDataset(x, torch.randint(10, (count,), generator=generator))

    def build(self):
        torch.manual_seed(0)
        return Transformer(**self.size) if self.is_text else ResNet18(self.width)

    def loss(self, model, batch):
        if self.is_text:
            return cross_entropy(model(batch[0]).transpose(1, 2), batch[1], reduction="none").mean(1)
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    def optimizer(self, model):
        if self.is_text:
            return torch.optim.AdamW(model.parameters(), lr=3e-4)
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)

    def task(self):
        few = TensorDataset(*(values[:8] for values in self.data.tensors))
        return trajrec.Task(self.build, self.data, few, loss=self.loss)


class Training:
    """A training that goes on step by step."""

    def __init__(self, setting, device):
        self.setting, self.device = setting, device
        self.model = setting.build().to(device)
        self.optimizer = setting.optimizer(self.model)
        self.loader = DataLoader(setting.data, setting.batch, shuffle=True, pin_memory=device.type == "cuda")
        self.batches = self._forever()

    def _forever(self):
        while True:
            yield from self.loader

    def turn(self, steps):
        """Seconds of so many steps."""
        finish(self.device)
        began = time.perf_counter()
        for _ in range(steps):
            batch = [values.to(self.device, non_blocking=True) for values in next(self.batches)]
            self.optimizer.zero_grad()
            self.setting.loss(self.model, batch).mean().backward()
            self.optimizer.step()
        finish(self.device)
        return time.perf_counter() - began


def finish(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def recorder(training, folder, **options):
    parts = {"model": training.model, "optimizer": training.optimizer, "loader": training.loader}
    return trajrec.record(folder / "run.h5", force=True, strict=True, **parts, **options)


def recording_cost(setting, device, pairs, turn):
    """Recorded over unrecorded, less one: median and range over the pairs of turns."""
    rows = {}
    for name, options in (("none", None), ("steps", {}), ("keyframes", {"keep": 64})):
        plain, recorded = Training(setting, device), Training(setting, device)
        with tempfile.TemporaryDirectory() as folder:
            recording = nullcontext() if options is None else recorder(recorded, Path(folder), **options)
            plain.turn(turn)
            with recording:
                recorded.turn(turn)
                found = []
                for k in range(pairs):
                    order = (plain, recorded) if k % 2 else (recorded, plain)
                    seconds = {id(training): training.turn(turn) for training in order}
                    found.append((seconds[id(recorded)], seconds[id(plain)]))
        ratios = [a / b - 1 for a, b in found]
        rows[name] = {
            "cost": round(statistics.median(ratios), 4),
            "range": [round(min(ratios), 4), round(max(ratios), 4)],
            "step_ms": round(1e3 * statistics.median(b for _, b in found) / turn, 3),
        }
    return rows


class Marks(Silent):
    """The time of every step of a replay."""

    def __init__(self, device):
        self.device, self.times = device, []

    def advance(self, count):
        finish(self.device)
        self.times.append(time.perf_counter())

    @property
    def a_step(self):
        return (self.times[-1] - self.times[1]) / (len(self.times) - 2)


def peak(device, work):
    """What the work returns, and the most memory in MB that it took on the device."""
    if device.type != "cuda":
        return work(), None
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    found = work()
    return found, round(torch.cuda.max_memory_allocated(device) / 1e6)


def replay_cost(setting, device, steps):
    with tempfile.TemporaryDirectory() as folder:
        training = Training(setting, device)
        with recorder(training, Path(folder)):
            training.turn(steps)
        seconds, taken = peak(device, lambda: Training(setting, device).turn(steps))
        row = {"steps": steps, "training_ms": round(1e3 * seconds / steps, 3), "training_MB": taken}
        del training
        with trajrec.open(Path(folder) / "run.h5") as run:
            for name, options in (("exact", {}), ("hessian_free", {"exact": False})):
                marks = Marks(device)
                options |= {"mode": "adjoint", "device": device, "progress": marks}
                found, memory = peak(device, lambda o=options: contributions(run, setting.task(), **o))
                row[name] = {
                    "over_training": round(marks.a_step * steps / seconds, 3),
                    "MB": memory,
                    "certificate": found.certificate.verdict,
                }
    return row


def equality(setting, device, steps):
    """Contributions of the device's replay against those of the CPU's, relative to their norm."""
    with tempfile.TemporaryDirectory() as folder:
        training = Training(setting, device)
        with recorder(training, Path(folder)):
            training.turn(steps)
        with trajrec.open(Path(folder) / "run.h5") as run:
            found = [contributions(run, setting.task(), device=d) for d in (device, "cpu")]
    a, b = (c.values for c in found)
    return {
        "relative": float(np.linalg.norm(a - b) / np.linalg.norm(b)),
        "certificates": [c.certificate.verdict for c in found],
    }


def tests(limit):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    except subprocess.TimeoutExpired:
        return {"summary": f"no end within {limit} s"}
    lines = done.stdout.splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"summary": lines[-1] if lines else done.stderr[-500:], "failed": failed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="small: only to see that it runs")
    parser.add_argument("--limit", type=int, default=450, help="seconds after which no further part begins")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    options = parser.parse_args()
    device, quick, began = torch.device(options.device), options.quick, time.monotonic()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result = {"device": name, "torch": str(torch.__version__), "quick": quick}
    parts = [("tests", lambda: tests(150))] if device.type == "cuda" else []
    for model in ("resnet18", "gpt"):
        many = Setting(model, 4 if quick else 32, quick)
        few = Setting(model, 3, quick=True)
        parts += [
            (f"{model}/equality", lambda s=few: equality(s, device, 3)),
            (f"{model}/recording", lambda s=many: recording_cost(s, device, 4 if quick else 12, 2 if quick else 16)),
            (f"{model}/replay", lambda s=many: replay_cost(s, device, 4 if quick else 24)),
        ]
    for part, work in parts:
        if time.monotonic() - began > options.limit:
            result[part] = "left out: no time"
            continue
        try:
            result[part] = work()
        except Exception as error:  # the other parts are worth having
            result[part] = {"failed": f"{type(error).__name__}: {error}"}
        print(part, json.dumps(result[part]), flush=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
