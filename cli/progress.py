"""Progress of a replay: a bar on a terminal, a plain line every few seconds elsewhere.

The rate is that of the steps made here: what an earlier replay had done already counts as done, and not as fast. Where
no step has been made yet nothing is said of the time left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

_EVERY_SECONDS = 5.0


class ReplayProgress:
    """Shows how many steps are done, the rate and the time left, on standard error; a context manager.

    Args:
        clock: the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._bar: Any = None
        self._task: Any = None
        self._clock = clock
        self._what, self._total, self._done, self._before = "", 0, 0, 0
        self._began = self._said = clock()

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

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A piece of work of `total` steps begins, of which so many were done by an earlier replay."""
        self._what, self._total, self._done, self._before = what, total, done, done
        self._began = self._said = self._clock()
        if self._bar is not None:
            self._task = self._bar.add_task(what, total=total, completed=done, rate="")

    def advance(self, count: int) -> None:
        """So many more steps are done."""
        self._done += count
        now = self._clock()
        if self._bar is not None:
            self._bar.update(self._task, advance=count, rate=_per_second(self._rate(now)))
        elif now - self._said >= _EVERY_SECONDS:
            self._said = now
            print(self._line(now), file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """Prints a sentence of its own, above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def _rate(self, now: float) -> float:
        return (self._done - self._before) / max(now - self._began, 1e-9)

    def _line(self, now: float) -> str:
        line, rate = f"{self._what}: {self._done:,} of {self._total:,} steps", self._rate(now)
        if rate <= 0:
            return line
        return f"{line}, {_per_second(rate)}, {max(0, self._total - self._done) / rate:,.0f} s left"


def _per_second(rate: float) -> str:
    return f"{rate:,.0f} steps/s" if rate >= 10 else f"{rate:.2g} steps/s"
