"""How long training has waited for the writer, and what is said of it: once when it begins to, and at the end."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("trajrec")

_LONG = 1.0


@dataclass(slots=True)
class Waiting:
    """The waiting of one recording.

    Attributes:
        seconds: so far.
    """

    seconds: float = 0.0
    _is_said: bool = False

    @contextmanager
    def for_writer(self, output: Path) -> Iterator[None]:
        """A moment of it."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - began
            if self.seconds > _LONG and not self._is_said:
                self._is_said = True
                logger.warning(
                    "Training WAITS for the writer of %s: steps come faster than they can be compressed and written. "
                    "`--compression none` is quicker and larger, `--keep 64` (keyframes only) quicker and smaller.",
                    output,
                )

    def finish(self, output: Path) -> None:
        """Says at the end how long it was, if it was long."""
        if self._is_said:
            logger.warning("Training waited %.0f s in all for the writer of %s.", self.seconds, output)
