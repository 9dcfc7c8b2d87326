"""A limit on the disk space of a run whose length nobody knows.

A budgeted run starts by keeping every step. When that would outgrow the limit, the rows between keyframes are
dropped, once and for all; from then on, whenever the keyframes would outgrow it, every other one is dropped and the
interval doubles. So at any length the keyframes are evenly spread and, but for the last doubling, as dense as the
limit allows. The checksums, ids and hyperparameters of every step stay, and so do keyframes that the sink did not ask
for: replay cannot do without those.

What counts is everything in the folder, the ring included, and that all but the ring may be needed a second time, by
packing or, where rows are not compressed and packing leaves them where they are, by going on with the packed run:

    ring + 2 (rows + segments + keyframes + what is in the ring + what may come before the next look) <= limit
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from trajrec.errors import RecordingError
from trajrec.runfile.folder import Folder
from trajrec.runfile.format.geometry import Geometry
from trajrec.runfile.ring import ring_bytes

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_OVERHEAD = 256 * 1024


def parse_size(text: str | int) -> int:
    """Bytes of "20GB", "500 MB", "1.5e9" or a number; 1 kB is 1000 bytes.

    Raises:
        ValueError: it is none of these.
    """
    match = re.fullmatch(r"\s*([0-9.]+(?:e[0-9]+)?)\s*([kmgt]?)b?\s*", str(text).lower())
    if not match:
        raise ValueError(f'a size is given like "20GB" or "500 MB"; found {text!r}.')
    size = int(float(match[1]) * _UNITS[match[2]])
    if not size:
        raise ValueError(f"a size is at least one byte; found {text!r}.")
    return size


@dataclass(slots=True)
class Budget:
    """The limit of one recording, and what it uses.

    Attributes:
        limit: bytes.
        folder: of the recording.
    """

    limit: int
    folder: Folder
    _segments: dict[Path, int] = field(default_factory=dict)
    _keyframes: dict[Path, int] = field(default_factory=dict)

    def check_minimum(self, geometry: Geometry) -> None:
        """Refuses a limit that the ring alone nearly fills.

        Raises:
            RecordingError: it does.
        """
        if not self.suffices(geometry):
            needed = self._least(geometry)
            raise RecordingError(
                f"A budget of {self.limit / 1e6:.0f} MB is too small for this model: recording needs "
                f"{needed / 1e6:.0f} MB to begin with. Raise the budget, or pass keep=K instead."
            )

    def suffices(self, geometry: Geometry) -> bool:
        """Whether a recording can begin within the limit."""
        return self.limit >= self._least(geometry)

    @staticmethod
    def _least(geometry: Geometry) -> int:
        return ring_bytes(geometry) + 8 * geometry.chunk_rows * geometry.row_bytes + 4 * _OVERHEAD

    def exceeded(self, geometry: Geometry, pending: int) -> bool:
        """Whether what is on disk, `pending` bytes in the ring and the next few steps may pass the limit."""
        self._look()
        rows = self.folder.rows.stat().st_size if self.folder.rows.exists() else 0
        sealed = rows + sum(self._segments.values()) + sum(self._keyframes.values())
        coming = pending + geometry.chunk_rows * geometry.row_bytes + 2 * max(self._keyframes.values(), default=0)
        return ring_bytes(geometry) + 2 * (sealed + coming + _OVERHEAD) > self.limit

    def _look(self) -> None:
        """Looks at files that were not there at the last look; segments and keyframes never change once written."""
        for known, paths in (
            (self._segments, [s.path for s in self.folder.segments()]),
            (self._keyframes, list(self.folder.keyframes().values())),
        ):
            for gone in known.keys() - set(paths):
                del known[gone]
            for path in paths:
                if path not in known:
                    known[path] = path.stat().st_size

    def forget(self) -> None:
        """Looks at everything anew next time."""
        self._segments.clear()
        self._keyframes.clear()
