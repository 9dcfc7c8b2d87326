"""Writes a file while training goes on: one at a time, on a thread of its own.

For keyframes that come every so many steps. No step depends on one: where it is missing, because training was killed
while it was being written, the steps since the keyframe before are recomputed. So the training thread copies the state
and another one makes the file, which takes a step of a small model twice as long as the copy.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from trajrec.records import Inputs, Keyframe
from trajrec.runfile.folder import is_disk_full
from trajrec.runfile.keyfile import write_arrays


class LaterWrite:
    """At most one file on its way.

    Args:
        again: writes a file for which there was no room, when that has been seen.
    """

    def __init__(self, again: Callable[[Path, Keyframe | Inputs], object]) -> None:
        self._again = again
        self._pool = ThreadPoolExecutor(1, "trajrec-keyframe")
        self._pending: tuple[Future[int], Path, Keyframe] | None = None

    def begin(self, path: Path, keyframe: Keyframe) -> None:
        """Begins to write a keyframe; its arrays must stay as they are. Waits for the one before.

        Raises:
            OSError: the one before could not be written; or as `again` raises.
        """
        self.settle()
        self._pending = self._pool.submit(write_arrays, path, keyframe), path, keyframe

    def settle(self) -> None:
        """Waits until nothing is on its way.

        Raises:
            OSError: it could not be written; or as `again` raises.
        """
        if self._pending is None:
            return
        (future, path, keyframe), self._pending = self._pending, None
        try:
            future.result()
        except OSError as error:
            if not is_disk_full(error):
                raise
            self._again(path, keyframe)

    def end(self) -> None:
        """Ends the thread."""
        self._pool.shutdown()
