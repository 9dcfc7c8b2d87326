"""What happens to a recording when there is no room for it: training waits, goes on unrecorded, or is told.

A full disk may be made room on, so "wait" waits. A limit on the size of files (`ulimit -f`) is there until training has
ended, so "wait" does not wait for it: recording stops.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from trajrec.errors import DiskFullError, RecordingError, is_disk_full, is_file_too_large
from trajrec.runfile.folder import Folder
from trajrec.runfile.trainer.options import OnFull

logger = logging.getLogger("trajrec")

LIMIT = "The limit on the size of files (`ulimit -f`) is reached"
_RETRY = 1.0


@dataclass(slots=True)
class Room:
    """The room that one recording has.

    Attributes:
        output: the run file to be.
        on_full: "wait", "stop-recording" or "raise".
    """

    output: Path
    on_full: OnFull
    _retried_at: int = -1

    @property
    def free(self) -> int:
        """Bytes that are free."""
        return shutil.disk_usage(self.output.parent).free

    def act(self, error: OSError, step: int, needed: int) -> str | None:
        """Does what there is to do about a file that could not be written, as the two calls below do."""
        if not is_disk_full(error):
            raise error
        return self.act_on_limit(step) if is_file_too_large(error) else self.act_on_full_disk(step, needed)

    def act_on_limit(self, step: int) -> str:
        """Why recording stops at a step for which a file would become too large.

        Raises:
            DiskFullError: that was asked for.
        """
        where = f"{LIMIT}: step {step} of {self.output} was not recorded."
        if self.on_full == "raise":
            raise DiskFullError(f"{where} Raise it; `trajrec pack {self.output}` keeps the steps before it.")
        return where

    def act_on_full_disk(self, step: int, needed: int) -> str | None:
        """Waits until there is room for `needed` bytes, or says why recording stops at a step.

        Raises:
            DiskFullError: that was asked for.
        """
        if self._retried_at != step and self.free >= 2 * needed:
            self._retried_at = step
            return None  # there is room again, it seems; a quota may see it otherwise, so only once a step
        where = f"The disk is full: step {step} of {self.output} cannot be recorded."
        if self.on_full == "raise":
            raise DiskFullError(f"{where} Make room; `trajrec pack {self.output}` keeps the steps before it.")
        if self.on_full == "stop-recording":
            return where
        self.wait(where, needed)
        return None

    def wait(self, where: str, needed: int) -> None:
        """Waits until there are `needed` bytes."""
        logger.warning("%s Training WAITS until there is room (about %d MB).", where, needed // 10**6 + 1)
        Folder.of(self.output).sweep()
        began = time.monotonic()
        time.sleep(_RETRY)
        while self.free < max(needed, 2**20):
            time.sleep(_RETRY)
        waited = time.monotonic() - began
        logger.warning("There is room again after %.0f s: recording of %s goes on.", waited, self.output)


def no_start(error: OSError, path: Path, size: int) -> RecordingError:
    """The error for a recording that cannot begin in a folder, where it needs `size` bytes to begin with."""
    if is_file_too_large(error):
        return DiskFullError(
            f"Recording needs a file of {size / 1e6:.0f} MB in {path} to begin with, and the limit on the size of "
            "files (`ulimit -f`) is below that. Raise it."
        )
    if is_disk_full(error):
        return DiskFullError(
            f"The disk is full: recording needs {size / 1e6:.0f} MB in {path} to begin with. Make room."
        )
    return RecordingError(f"Recording cannot begin in {path}: {error.strerror or error}.")
