"""Who is told how far a replay is."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Is told how far a replay is; the command line draws it."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """A piece of work of `total` steps begins, of which so many were done by an earlier replay."""

    def advance(self, count: int) -> None:
        """So many steps are done."""


class Silent:
    """Draws nothing."""

    def start(self, what: str, total: int, done: int = 0) -> None:
        """Ignores it."""

    def advance(self, count: int) -> None:
        """Ignores it."""
