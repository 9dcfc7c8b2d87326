"""How a recording ends: why before the training did, which steps went unrecorded, and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from trajrec.runfile.folder import Folder
from trajrec.runfile.ring import Control, Ring, Status
from trajrec.runfile.trainer.fulldisk import LIMIT
from trajrec.sink import Summary

logger = logging.getLogger("trajrec")

_WHY_UNPACKED = {
    Status.DISK_FULL: "The disk is full; make room",
    Status.FILE_TOO_LARGE: f"{LIMIT}; raise it",
}


@dataclass(slots=True)
class Ending:
    """The ending of one recording.

    Attributes:
        reason: why recording has stopped; None as long as it has not.
        gap: first and last step that went unrecorded.
    """

    reason: str | None = None
    gap: tuple[int, int] | None = None

    def stop(self, reason: str) -> None:
        """Notes why recording stops; the first reason counts."""
        if self.reason is None:
            self.reason = reason

    def note_gap(self, step: int, first: int, ring: Ring | None) -> None:
        """Notes that the steps from `first` up to this one go unrecorded, in the ring too if there is one."""
        self.stop(f"Step {step} was not recorded.")
        if step < first:
            return
        self.gap = first, step if self.gap is None else max(step, self.gap[1])
        if ring is not None:
            ring.set(Control.GAP_FIRST, self.gap[0])
            ring.set(Control.GAP_LAST, self.gap[1])

    def summary(self, path: Path | None = None, steps: int = 0, size: int = 0) -> Summary:
        """What was written."""
        return Summary(path, steps, size, () if self.gap is None else (self.gap,), self.reason)

    def unpacked(self, folder: Folder, steps: int, status: Status, reason: str) -> Summary:
        """What lies in a folder that was not packed, and why, which is said."""
        logger.error(
            "%s was NOT PACKED: %s. What was recorded is safe in %s, and is read like a packed run; "
            "`trajrec pack %s` packs it once the cause is gone.",
            *(folder.output, _WHY_UNPACKED.get(status, reason).rstrip("."), folder.path, folder.path),
        )
        return self.summary(folder.path, steps, folder.size())
