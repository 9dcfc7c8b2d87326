"""Rows of weights, read in blocks and checked: one at a time, or walked through with the next block on its way.

A chunk holds R neighbouring rows, so whatever reads one row decodes R. `walk` decodes every block once and
reads the next on a thread while the present one is in use; at most three blocks (of up to 64 MB) are in memory.
Every row handed out has been compared with the CRC-32 of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trajrec.checksum import crc32
from trajrec.errors import DamagedRunError
from trajrec.records import Row

Block = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RowReader:
    """Reads rows of a source.

    Attributes:
        block: step to the steps [first, stop) that are read together with it.
        rows: [first, stop) to rows [n, P].
        crc32: step to the checksum its row must have.
        width: step to the length of the row that has it.
        path: of the recording, for messages.
    """

    block: Callable[[int], Block]
    rows: Callable[[int, int], Row]
    crc32: Callable[[int], int]
    width: Callable[[int], int]
    path: Path

    def load(self, first: int, stop: int) -> Row:
        """Rows of steps [first, stop) [n, P], read-only, all checked; the steps lie in one block."""
        rows = self.rows(first, stop)
        for k, row in enumerate(rows):
            self.check(first + k, row)
        rows.flags.writeable = False
        return rows

    def check(self, step: int, row: Row) -> None:
        """Compares a row with the checksum of its step.

        Raises:
            DamagedRunError: they differ.
        """
        if crc32(row[: self.width(step)].data) != self.crc32(step):
            raise DamagedRunError(
                f"{self.path}: /weights, step {step}: the row does not match its checksum; the file is damaged. "
                "Restore it from a copy; `trajrec verify` lists everything that is damaged.",
                *(self.path, "/weights", (step, step)),
            )

    def walk(self, first: int, last: int) -> Iterator[tuple[int, Row]]:
        """Steps and rows from `first` to `last` inclusive, forwards or backwards."""
        plan, backwards = self.plan(first, last), first > last
        with ThreadPoolExecutor(1, "trajrec-prefetch") as pool:
            coming = pool.submit(self._load_next, plan)
            while (block := coming.result()) is not None:
                start, rows = block
                coming = pool.submit(self._load_next, plan)
                steps = range(start, start + len(rows))
                for step in reversed(steps) if backwards else steps:
                    yield step, rows[step - start]

    def _load_next(self, plan: Iterator[Block]) -> tuple[int, Row] | None:
        block = next(plan, None)
        return None if block is None else (block[0], self.load(*block))

    def plan(self, first: int, last: int) -> Iterator[Block]:
        """The blocks that a walk reads, in order, clipped to its steps."""
        low, high, step = min(first, last), max(first, last), first
        while low <= step <= high:
            start, stop = self.block(step)
            yield max(start, low), min(stop, high + 1)
            step = stop if first <= last else start - 1
