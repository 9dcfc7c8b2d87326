"""A trainer for the kill tests: commits made-up steps until it is killed, and says how far it is in a mapped file.

python -m tests.made.runfile_trainer RUN PROGRESS VALUES [KEEP [INPUTS]]

PROGRESS is a file of one int64: the last step whose commit returned (or -1). It is memory-mapped, so it tells the
truth about the moment of a kill -9. The environment variable COMPRESSION says how rows are compressed.
"""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import numpy as np

from tests.made.runfile_cases import MadeUpRun, spec
from trajrec.runfile.trainer.sink import RunFileSink

COMPRESSION = os.environ.get("COMPRESSION", "zstd")


def main(run: str, progress: str, values: str, keep: str = "steps", inputs: str = "digest") -> None:
    with Path(progress).open("r+b") as file:
        done = np.frombuffer(mmap.mmap(file.fileno(), 8), np.int64)
    made = MadeUpRun(spec(int(values), rng=100, inputs=inputs))
    sink = RunFileSink(run, keep=int(keep) if keep.isdigit() else "steps", compression=COMPRESSION)
    sink.open(made.spec)
    t = 0
    while True:
        made.feed(sink, t, first=t)
        done[0] = t
        t += 1


if __name__ == "__main__":
    main(*sys.argv[1:])
