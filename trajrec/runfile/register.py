"""The runs that this user recorded on this machine: whose Task may be called unnamed, and whose folder gone to.

A recording names its Task, and replay would import that file and run what is in it. A file from somebody else could
name anything, with a checksum that fits. So every recording is entered here when it begins, and the Task that a file
names is used only where this register has exactly that run, reference and checksum. So is the folder that it ran in.

    STATE/trajrec/runs/0f/0f3c...      one small file a run, named by its id:
                                       {"task": REFERENCE, "sha256": DIGEST, "folder": FOLDER}

STATE is $XDG_STATE_HOME, or where the system keeps such things (`state_folder`). A look-up opens one file, however many
there are; one is written whole and renamed, so that several processes may record at once. The register must never
disturb a training: a run that cannot be entered is recorded all the same, and asks for --task when it is replayed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from trajrec.records import RunSpec

_RUN_ID = re.compile(r"[0-9a-f]{8,64}")


def state_folder() -> Path:
    """Where this user's programs keep what they want to know the next time.

    Raises:
        RuntimeError: no home can be found.
    """
    given = Path(os.environ.get("XDG_STATE_HOME", ""))
    if given.is_absolute():
        return given
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path.home() / ".local" / "state"


def enter(spec: RunSpec) -> None:
    """Notes a run whose recording begins; one that names neither a Task nor a folder need not be known."""
    if spec.task is None and spec.folder is None:
        return
    with suppress(OSError, RuntimeError, ValueError):
        _write(_place(spec.run_id), {"task": spec.task, "sha256": spec.task_sha256, "folder": spec.folder})


def has(spec: RunSpec) -> bool:
    """Whether this user recorded this run here, with just this Task."""
    entry = _entry(spec.run_id)
    return entry is not None and (entry.get("task", ""), entry.get("sha256", "")) == (spec.task, spec.task_sha256)


def ran_in(spec: RunSpec, folder: str) -> bool:
    """Whether this user recorded this run here, in this folder."""
    entry = _entry(spec.run_id)
    return entry is not None and entry.get("folder") == folder


def _entry(run_id: str) -> dict[str, object] | None:
    try:
        entry: object = json.loads(_place(run_id).read_text(encoding="utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _place(run_id: str) -> Path:
    """The file of a run; its id may come from anywhere, and must not lead elsewhere."""
    if not _RUN_ID.fullmatch(run_id):
        raise ValueError(f"{run_id!r} is no run id")
    return state_folder() / "trajrec" / "runs" / run_id[:2] / run_id


def _write(path: Path, entry: dict[str, str | None]) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)  # readable by this user only
    try:
        with open(handle, "w", encoding="utf-8") as file:
            json.dump(entry, file)
        os.replace(name, path)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
