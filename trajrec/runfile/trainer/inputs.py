"""Raw inputs that training has written and no segment has taken in yet: how many bytes they are, and may be."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from trajrec.records import Inputs


@dataclass(slots=True)
class RawInputs:
    """The raw inputs of one recording.

    Attributes:
        most: bytes at a time; then training waits for the writer. The inputs of four steps are never too many.
        largest: bytes of the largest inputs of a step.
    """

    most: int
    largest: int = 0
    _files: deque[tuple[int, int]] = field(default_factory=deque)

    def announce(self, inputs: Inputs) -> bool:
        """Whether these are larger than all before."""
        size = sum(array.nbytes for array in inputs.arrays.values())
        grows, self.largest = size > self.largest, max(size, self.largest)
        return grows

    def written(self, step: int, size: int) -> None:
        """Notes a file."""
        self._files.append((step, size))

    def pending(self, tail: int) -> int:
        """Bytes that no segment has taken in, where the steps before `tail` are sealed."""
        while self._files and self._files[0][0] < tail:
            self._files.popleft()
        return sum(size for _, size in self._files)

    def are_many(self, tail: int) -> bool:
        """Whether the writer should take some in."""
        return self.pending(tail) > self.most // 2

    def are_too_many(self, tail: int) -> bool:
        """Whether training has to wait until it has."""
        return self.pending(tail) > max(self.most, 4 * self._files[-1][1] if self._files else 0)
