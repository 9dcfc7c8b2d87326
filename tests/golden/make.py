"""How the golden files were made: `python -m tests.golden.make` in a checkout of the version that they are named after.

Never make one of a released version again: they show that files written then can be read now. Rows of run-1.0-none.h5
lie in chunks, as they did before those of an uncompressed run came to lie in one piece.
"""

from pathlib import Path

from tests.made.runfile_cases import MadeUpRun, spec
from trajrec.runfile.trainer.sink import RunFileSink

HERE = Path(__file__).parent
RUNS = {
    "run-1.0-zstd.h5": {"compression": "zstd", "keyframe_every": 16},
    "run-1.0-none.h5": {"compression": "none", "keyframe_every": 16},
    "run-1.0-keyframes.h5": {"keep": 10},
    "run-1.0-one-piece.h5": {"compression": "none", "keyframe_every": 16},
}
MADE = MadeUpRun(spec(100, rng=24))
LAST = 45

if __name__ == "__main__":
    for name, options in RUNS.items():
        if (HERE / name).exists():
            continue
        MADE.write(RunFileSink(HERE / name, **options), LAST)
