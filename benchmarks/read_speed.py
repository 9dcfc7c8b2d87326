"""How fast rows are read back from the page cache, beside a plain pread of the same bytes.

    python benchmarks/read_speed.py [--out benchmarks/results/read_speed.json]

A made-up trajectory of LeNet-5's size and one of 1.3 million weights, raw and compressed, walked through forwards and
backwards (`Run.walk`: decoded, checked against the CRC-32 of every step, prefetched). Values are noise around a slowly
moving point, so that they compress about as real weights do. MB/s are 10^6 bytes of float32 a second, median of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

import trajrec
from trajrec.records import ParamSpec, RunSpec, StepRecord
from trajrec.runfile.trainer.sink import RunFileSink

SIZES = {"lenet5": (61_706, 800), "cnn": (1_278_618, 80)}


def spec(values: int) -> RunSpec:
    return RunSpec(
        run_id="0" * 32,
        created="",
        params=(ParamSpec("w", (values,), "float32", 0, 0, True),),
        buffers=(),
        dtype="float32",
        optimizer="SGD",
        optimizer_module="torch.optim.sgd",
        defaults={},
        hyperparameters=("lr",),
        groups=1,
        samples=60_000,
    )


def write(path: Path, values: int, steps: int, compression: str) -> None:
    random = np.random.default_rng(0)
    row = random.normal(scale=0.05, size=values).astype(np.float32)
    drift = random.normal(scale=1e-4, size=values).astype(np.float32)
    sink = RunFileSink(path, compression=compression, keyframe_every=10**9, force=True)
    sink.open(spec(values))
    for t in range(steps + 1):
        drift = 0.9 * drift + random.normal(scale=1e-5, size=values).astype(np.float32)
        row = row + drift
        target = sink.reserve()
        target[:] = row
        ids = random.integers(0, 60_000, 64) if t else np.empty(0, np.int64)
        sink.commit(StepRecord(t, 0, 1.0, 0.0, zlib.crc32(row.data), np.array([[0.01]]), ids))
    sink.close(complete=True)


def timed(work: Callable[[], int], rounds: int) -> float:
    """Median MB/s of some rounds of `work`, which returns bytes."""
    work()
    speeds = []
    for _ in range(rounds):
        start = time.perf_counter()
        size = work()
        speeds.append(size / (time.perf_counter() - start) / 1e6)
    return round(statistics.median(speeds), 1)


def pread(path: Path) -> int:
    """Reads the whole file in pieces of 8 MB into one buffer."""
    buffer, done = bytearray(8 * 2**20), 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            done += count
    return done


def walk(path: Path, backwards: bool) -> int:
    with trajrec.open(path) as run:
        first, last = (run.steps, 0) if backwards else (0, run.steps)
        return sum(row.nbytes for _, row in run.walk(first, last))


def measure(folder: Path, name: str, compression: str, rounds: int) -> dict[str, object]:
    values, steps = SIZES[name]
    path = folder / f"{name}-{compression}.h5"
    write(path, values, steps, compression)
    raw = (steps + 1) * values * 4
    result = {
        "model": name,
        "compression": compression,
        "ratio": round(raw / path.stat().st_size, 2),
        "pread_file_MB_s": timed(lambda: pread(path), rounds),
        "forwards_MB_s": timed(lambda: walk(path, False), rounds),
        "backwards_MB_s": timed(lambda: walk(path, True), rounds),
    }
    path.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "read_speed.json")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = [
            measure(Path(folder), name, compression, arguments.rounds)
            for name in SIZES
            for compression in ("none", "zstd")
        ]
    about = {
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "machine": platform.machine(),
        "h5py": h5py.__version__,
        "python": platform.python_version(),
    }
    arguments.out.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")
    for line in found:
        print(json.dumps(line))


if __name__ == "__main__":
    main()
