"""Progress of a replay: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

_EVERY_SECONDS = 5.0


class ReplayProgress:
    """Shows how many steps are done, the rate and the time left, on standard error; a context manager."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._what, self._total, self._done = "", 0, 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> ReplayProgress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def start(self, what: str, total: int) -> None:
        """A piece of work of `total` steps begins."""
        self._what, self._total, self._done = what, total, 0
        self._began = self._said = time.monotonic()
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, rate="")

    def advance(self, count: int) -> None:
        """So many steps are done."""
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._began, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, advance=count, rate=f"{rate:,.0f} steps/s")
        elif now - self._said >= _EVERY_SECONDS:
            self._said = now
            left = (self._total - self._done) / rate
            line = f"{self._what}: {self._done:,} of {self._total:,} steps, {rate:,.0f} steps/s, {left:,.0f} s left"
            print(line, file=sys.stderr, flush=True)
