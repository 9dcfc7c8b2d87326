"""How long a report of 100 million contributions takes, and how much memory.

Writes a contributions.parquet of S samples x M targets in pieces (never whole in memory), then runs each question in
a process of its own and prints seconds and the peak of its resident memory.

    python benchmarks/report_scale.py --samples 50000 --targets 2000 --folder /tmp/scale
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

QUESTIONS = ("top", "statistics", "matrix", "suspects", "by class", "by target", "why", "compare", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--targets", type=int, default=2_000)
    parser.add_argument("--epochs", type=int, default=0, help="rows by epoch too; 0: none")
    parser.add_argument("--folder", type=Path, default=Path("scale-replay"))
    parser.add_argument("--question", choices=[*QUESTIONS, "timeline"], help="run one question in this process")
    options = parser.parse_args()
    if options.question:
        print(json.dumps(measure(options.folder, options.question)))
        return
    if not (options.folder / "contributions.parquet").exists():
        write(options.folder, options.samples, options.targets, options.epochs)
    size = (options.folder / "contributions.parquet").stat().st_size
    rows = options.samples * options.targets * max(1, options.epochs)
    print(f"{rows:,} rows, {size / 1e6:,.0f} MB on disk")
    for question in (*QUESTIONS, *(["timeline"] if options.epochs else [])):
        command = [sys.executable, __file__, "--folder", str(options.folder), "--question", question]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{question:12} {found['seconds']:7.1f} s   peak {found['megabytes']:6,.0f} MB", flush=True)


def write(folder: Path, samples: int, targets: int, epochs: int) -> None:
    """Sample-major rows, as replay writes them, a piece at a time."""
    import numpy as np
    import polars as pl

    rng, labels = np.random.default_rng(0), np.arange(samples) % 10
    pieces = folder / "pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    size = max(1, 2_000_000 // targets)
    for epoch in range(max(1, epochs)):
        for start in range(0, samples, size):
            ids = np.arange(start, min(samples, start + size))
            same = labels[ids][:, None] == (np.arange(targets) % 10)[None]
            columns = {
                "sample": np.repeat(ids, targets),
                "target": np.tile(np.arange(targets), len(ids)),
                "contribution": (rng.standard_normal(same.shape) + same).ravel() * 1e-6,
            }
            frame = pl.DataFrame(columns | ({"epoch": np.full(same.size, epoch)} if epochs else {}))
            frame.write_parquet(pieces / f"{epoch:03}-{start:09}.parquet")
    metadata = {"targets": "each", "exact": "true", "sign": "positive = helpful", "samples_total": str(samples)}
    pl.scan_parquet(pieces / "*.parquet").sink_parquet(folder / "contributions.parquet", metadata=metadata)
    for piece in pieces.iterdir():
        piece.unlink()
    pieces.rmdir()
    noisy = rng.random(samples) < 0.1
    pl.DataFrame({"sample": range(samples), "label": labels, "noisy": noisy}).write_parquet(folder / "samples.parquet")
    pl.DataFrame({"target": range(targets), "label": np.arange(targets) % 10}).write_parquet(folder / "targets.parquet")


def measure(folder: Path, question: str) -> dict[str, float]:
    """Seconds and peak megabytes of one question."""
    from trajrec.replay.report.render.html import html
    from trajrec.replay.report.report import Ask, build

    asks = {
        "statistics": Ask(statistics=True),
        "matrix": Ask(matrix=True),
        "suspects": Ask(suspects=True),
        "by class": Ask(by="class"),
        "by target": Ask(by="target"),
        "why": Ask(why=(17,)),
        "compare": Ask(compare=folder),
        "timeline": Ask(timeline=True),
        "page": Ask(everything=True),
    }
    began = time.perf_counter()
    report = build(folder, 100 if question == "page" else 10, asks.get(question))
    if question == "page":
        html(report)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.perf_counter() - began, "megabytes": peak}


if __name__ == "__main__":
    main()
