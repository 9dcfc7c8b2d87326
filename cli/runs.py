"""Where runs and replays lie: names, defaults and the newest one."""

from __future__ import annotations

import time
from pathlib import Path

from trajrec.errors import TrajrecError

RUNS = Path("runs")


def new_run(name: str) -> Path:
    """A path for a new run of a script, under ./runs, named after the script and the time."""
    return RUNS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.h5"


def find_run(run: Path | None) -> Path:
    """The given run, or the newest under ./runs (a run being recorded, or cut off, is a folder NAME.h5.rec).

    Raises:
        TrajrecError: if there is none.
    """
    if run is not None:
        if run.exists() or run.with_name(run.name + ".rec").exists():
            return run
        raise TrajrecError(f"There is no run {run}. `trajrec record SCRIPT.py` makes one under ./{RUNS}.")
    found = [*RUNS.glob("*.h5"), *RUNS.glob("*.h5.rec")]
    if not found:
        raise TrajrecError(f"There is no run under ./{RUNS}. Name one, or make one with `trajrec record SCRIPT.py`.")
    return max(found, key=lambda path: path.stat().st_mtime)


def shown(path: Path) -> Path:
    """A path as a person types it: from the folder they are in, where it lies below that."""
    try:
        return path.relative_to(Path.cwd())
    except (ValueError, OSError):
        return path


def replay_folder(run: Path) -> Path:
    """The default output folder of a run's replay, beside the run."""
    name = run.name.removesuffix(".rec").removesuffix(".h5")
    return run.with_name(f"{name}-replay")


def size_text(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
