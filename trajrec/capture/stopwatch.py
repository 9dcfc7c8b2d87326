"""What the recorder costs, without costing much: reading a thread's CPU clock takes as long as a hook does.

So the clock is read in one step out of thirteen, and what it shows then stands for all of them. Thirteen, because what
comes back every so many steps (waking the writer, say) comes back after a power of two. What happens rarely and takes
long (a keyframe) is timed whenever it happens.
"""

from __future__ import annotations

import time

EVERY = 13


class Stopwatch:
    """CPU seconds that hooks take from their thread."""

    def __init__(self) -> None:
        self._began = self._ended = 0.0
        self.reset()

    def reset(self) -> None:
        """Begins anew."""
        self._steps = 0
        self._looked = 0
        self._sum = 0.0
        self._rare = 0.0
        self.looks = True

    @property
    def seconds(self) -> float:
        """CPU seconds since the last reset."""
        return self._sum * (self._steps / self._looked if self._looked else 1.0) + self._rare

    @property
    def training_seconds(self) -> float:
        """CPU seconds of the thread since the last restart, hooks included."""
        return (self._ended or time.thread_time()) - self._began

    def restart(self) -> None:
        """Begins anew, and the clock of the thread with it."""
        self.reset()
        self._began = time.thread_time()

    def end(self) -> None:
        """The training has ended."""
        self._ended = time.thread_time()

    def next_step(self) -> None:
        """A step has ended."""
        self._steps += 1
        self._looked += self.looks
        self.looks = self._steps % EVERY == 0

    def start(self) -> float:
        """The beginning of a hook, to be given to `stop`."""
        return time.thread_time() if self.looks else 0.0

    def stop(self, began: float) -> None:
        """The end of a hook."""
        if self.looks:
            self._sum += time.thread_time() - began

    def rare(self, began: float) -> None:
        """The end of something rare, which began at a reading of `time.thread_time`."""
        taken = time.thread_time() - began
        self._rare += taken
        if self.looks:
            self._sum -= taken  # it happened within a hook that is being timed
