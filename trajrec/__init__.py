"""trajrec: a flight recorder for PyTorch training, and the analyzer that reads the recording.

    with trajrec.record("run.h5", model=model, optimizer=optimizer, loader=loader):
        ...                                      # the training loop, unchanged

    with trajrec.open("run.h5") as run:
        c = trajrec.replay.contributions(run, task)

Public names are imported on first use, so that `import trajrec` and the command line start at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trajrec.version import __version__

_PUBLIC = {
    "Task": "trajrec.task.task",
    "Run": "trajrec.runfile.reader.run",
    "clip_norm": "trajrec.task.gradients",
    "clip_value": "trajrec.task.gradients",
    "next_tokens": "trajrec.task.criterion",
    "open": "trajrec.runfile.reader.run",
    "record": "trajrec.api",
    "register_rule": "trajrec.rules",
    "seeded": "trajrec.task.seeding",
    "unbatched": "trajrec.task.reading",
    "set_batch": "trajrec.capture.hooks",
    "start": "trajrec.api",
    "stop": "trajrec.api",
    "TrajrecError": "trajrec.errors",
    "replay": "",
}

__all__ = [
    "Run",
    "Task",
    "TrajrecError",
    "__version__",
    "clip_norm",
    "clip_value",
    "next_tokens",
    "open",
    "record",
    "register_rule",
    "replay",
    "seeded",
    "set_batch",
    "start",
    "stop",
    "unbatched",
]

if TYPE_CHECKING:
    from trajrec import replay as replay
    from trajrec.api import record as record
    from trajrec.api import start as start
    from trajrec.api import stop as stop
    from trajrec.capture.hooks import set_batch as set_batch
    from trajrec.errors import TrajrecError as TrajrecError
    from trajrec.rules import register_rule as register_rule
    from trajrec.runfile.reader.run import Run as Run
    from trajrec.runfile.reader.run import open as open
    from trajrec.task.criterion import next_tokens as next_tokens
    from trajrec.task.gradients import clip_norm as clip_norm
    from trajrec.task.gradients import clip_value as clip_value
    from trajrec.task.reading import unbatched as unbatched
    from trajrec.task.seeding import seeded as seeded
    from trajrec.task.task import Task as Task


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trajrec' has no attribute {name!r}")
    module = _PUBLIC[name]
    value = getattr(import_module(module), name) if module else import_module(f"trajrec.{name}")
    globals()[name] = value
    return value
