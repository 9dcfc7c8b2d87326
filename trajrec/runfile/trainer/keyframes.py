"""Which steps have a keyframe, and which keyframes go where a budget asks for it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from trajrec.runfile.folder import Folder


@dataclass(slots=True)
class Schedule:
    """The keyframes of one recording.

    Attributes:
        interval: steps between those that the sink asks for.
    """

    interval: int
    _needed: set[int] = field(default_factory=set)  # came unasked: replay cannot do without them
    _wanted: int = -1

    def know(self, steps: Iterable[int]) -> None:
        """Takes in the keyframes of an earlier part of the recording."""
        self._needed = {t for t in steps if t % self.interval}

    def wants(self, step: int) -> bool:
        """Whether the sink asks for the keyframe of a step."""
        wanted = step % self.interval == 0
        self._wanted = step if wanted else -1
        return wanted

    def given(self, step: int) -> None:
        """Notes that a keyframe has come, asked for or not."""
        if step != self._wanted:
            self._needed.add(step)
        self._wanted = -1

    def thin(self, folder: Folder) -> bool:
        """Drops every other keyframe but the needed ones, and doubles the interval; False if there are too few."""
        keyframes = folder.keyframes()
        dropped = [path for t, path in keyframes.items() if t % (2 * self.interval) and t not in self._needed]
        if len(keyframes) - len(dropped) < 2 or not dropped:
            return False
        for path in dropped:
            path.unlink()
        self.interval *= 2
        return True
