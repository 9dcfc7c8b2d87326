"""What a replay of a small GPT takes of memory, over its training, by the number of weights: 1.1 M, 10 M and 50 M.

    python benchmarks/sizes.py [--models 1M 10M 50M] [--out FILE]

Every figure is of a process of its own, in one thread, with the same imports: its largest resident memory (VmHWM), and
what it held when these were done. The training runs once by itself and once recorded. A replay's memory is told as a
multiple of the training's own, which is what it held above its imports: weights, gradients, states, activations.
Seconds are those to the first step of the replay, from the start of the process.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BEGAN = time.perf_counter()
OUT = Path(__file__).parent / "results" / "sizes.json"
MODELS = {  # (vocabulary, length, width, blocks, heads, batch, steps)
    "1M": (2048, 64, 128, 4, 4, 16, 24),
    "10M": (2048, 64, 384, 5, 6, 16, 24),
    "50M": (8192, 64, 640, 9, 10, 16, 12),
}
QUESTIONS = {
    "exact": {},
    "hessian-free": {"exact": False},
    "each": {"targets": "each"},
    "tangent": {"samples": 4, "mode": "tangent"},
    "hypergradients": {"samples": 4},
}
PARTS = {
    "1M": ["exact", "hessian-free", "keyframes"],
    "10M": ["exact", "hessian-free", "keyframes", "each", "tangent", "hypergradients"],
    "50M": ["exact", "hessian-free"],
}
KEEP, TARGETS = 8, 32


def held(name="VmHWM"):
    """Bytes of memory of this process: the most it ever held (VmHWM), or holds (VmRSS)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


def made(size):
    """(model, loss, data, test data) of a language model whose first and last layer share their weights."""
    import torch
    from torch import nn
    from torch.nn import functional

    vocabulary, length, width, blocks, heads, batch, steps = MODELS[size]

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x):
            q, k, v = self.qkv(self.norm1(x)).view(*x.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
            ahead = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(-1, -2) / (width // heads) ** 0.5).masked_fill(ahead, -torch.inf)
            x = x + self.join((scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
            return x + self.down(functional.gelu(self.up(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.place = nn.Embedding(vocabulary, width), nn.Parameter(torch.randn(length, width))
            self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
            self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
            self.out.weight = self.embedding.weight
            for weight in self.parameters():
                if weight.dim() > 1:
                    nn.init.normal_(weight, std=0.02)

        def forward(self, x):
            return self.out(self.norm(self.blocks(self.embedding(x) + self.place)))

    def loss(model, items):
        found = functional.cross_entropy(model(items[0]).transpose(1, 2), items[1], reduction="none")
        return found.mean(1)

    torch.manual_seed(0)
    # Words as frequent as in a language: the k-th has a share of about 1/k.
    text = (vocabulary ** torch.rand(batch * steps + TARGETS, length + 1)).long().clamp_max(vocabulary - 1)
    data = torch.utils.data.TensorDataset(text[:-TARGETS, :-1], text[:-TARGETS, 1:])
    return GPT, loss, data, torch.utils.data.TensorDataset(text[-TARGETS:, :-1], text[-TARGETS:, 1:])


def train(size, path=None, **options):
    import torch

    import trajrec

    build, loss, data, _ = made(size)
    model = build()
    loader = torch.utils.data.DataLoader(data, MODELS[size][5], shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def loop():
        for items in loader:
            optimizer.zero_grad()
            loss(model, items).mean().backward()
            optimizer.step()

    began = time.perf_counter()
    if path is None:
        loop()
    else:
        with trajrec.record(path, model=model, optimizer=optimizer, loader=loader, force=True, **options):
            loop()
    return {"seconds": time.perf_counter() - began, "weights": sum(p.numel() for p in model.parameters())}


def replay(size, path, question):
    from trajrec import Task
    from trajrec import open as open_run
    from trajrec.replay import hypergradients
    from trajrec.replay.methods.contributions import contributions
    from trajrec.replay.progress import Silent

    marks = []

    class Marks(Silent):
        def advance(self, count):
            marks.append(time.perf_counter())

    build, loss, data, test = made(size)
    task, asked = Task(build, data, test, loss=loss), dict(QUESTIONS[question])
    if "samples" in asked:
        asked["samples"] = list(range(asked["samples"]))
    began = time.perf_counter()
    with open_run(path) as run:
        if question == "hypergradients":
            hypergradients(run, task, **asked, progress=Marks())
        else:
            contributions(run, task, **asked, progress=Marks())
    return {"to_first_step": marks[0] - began, "first": marks[0] - BEGAN, "seconds": time.perf_counter() - began}


def child(size, part, path):
    import torch

    import trajrec.replay  # noqa: F401

    torch.set_num_threads(1)
    imports = held("VmRSS")
    if part == "training":
        found = train(size)
    elif part == "recorded":
        found = train(size, path)
    elif part == "keyframed":
        found = train(size, path, keep=KEEP)
    else:
        found = replay(size, path, "exact" if part == "keyframes" else part)
    print(json.dumps(found | {"peak": held(), "imports": imports}))


def measured(size, part, path):
    """What a process of its own finds."""
    command = [sys.executable, __file__, "--child", size, part, str(path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    found["own"] = found["peak"] - found["imports"]
    return found


def size_of(size, folder, parts):
    path, result = Path(folder) / "run.h5", {}
    result["training"] = training = measured(size, "training", path)
    for kept, wanted in (("recorded", [p for p in parts if p != "keyframes"]), ("keyframed", ["keyframes"])):
        if not set(wanted) & set(parts):
            continue
        result[kept] = measured(size, kept, path) | {"bytes": path.stat().st_size}
        for part in [part for part in wanted if part in parts]:
            result[part] = found = measured(size, part, path)
            found["times"], found["added"] = found["own"] / training["own"], found["peak"] - training["peak"]
            print(size, part, f"{found['times']:.2f} x, +{found['added'] / 1e6:.0f} MB", found, flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS))
    parser.add_argument("--parts", nargs="*")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(*options.child)
    import torch

    with tempfile.TemporaryDirectory() as folder:
        result = {"torch": torch.__version__, "machine": platform.machine()}
        for size in options.models:
            result[size] = size_of(size, folder, options.parts or PARTS[size])
    options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
