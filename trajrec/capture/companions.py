"""Several optimizers that make one recorded step together.

    backward()   a.step()   b.step()        one step: both have stepped once since the backward pass, in any order

What is recorded is the training of one model by one gradient. A step of one optimizer that comes after another backward
pass, or twice before the others have stepped, makes another training of it, and is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import FrameType

from torch.optim import Optimizer
from torch.optim import optimizer as library

from trajrec.errors import RecordingError


class Round:
    """Which optimizers have stepped since the last recorded step."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = tuple(optimizers)
        self._stepped: list[Optimizer] = []
        self._backwards = -1

    @property
    def is_open(self) -> bool:
        """Whether some have stepped, and others have not."""
        return bool(self._stepped)

    def begin(self, optimizer: Optimizer, backwards: int) -> bool:
        """Takes note that an optimizer is about to step, after so many backward passes. Whether it is the first to.

        Raises:
            RecordingError: if its step cannot be part of the same recorded step as those before.
        """
        if not self._stepped:
            self._backwards = backwards
            return True
        if any(optimizer is other for other in self._stepped):
            raise RecordingError(
                f"{type(optimizer).__name__} stepped twice while {self._missing()} did not step. {_RULE}"
            )
        if backwards != self._backwards:
            raise RecordingError(
                f"There was another backward pass between the steps of {type(self._stepped[-1]).__name__} and "
                f"{type(optimizer).__name__}. {_RULE}"
            )
        return False

    def end(self, optimizer: Optimizer) -> bool:
        """Takes note that an optimizer has stepped. Whether all have."""
        if len(self.optimizers) > 1:
            self._stepped.append(optimizer)
            if len(self._stepped) < len(self.optimizers):
                return False
            self._stepped = []
        return True

    def check_complete(self) -> None:
        """Checks that training did not end within a round.

        Raises:
            RecordingError: it did.
        """
        if self._stepped:
            raise RecordingError(f"The last step is not whole: {self._missing()} did not step. {_RULE}")

    def _missing(self) -> str:
        done = [id(optimizer) for optimizer in self._stepped]
        names = [type(o).__name__ for o in self.optimizers if id(o) not in done]
        return " and ".join(names)


_RULE = (
    "Several optimizers of one model are recorded where each of them steps once after every backward pass. If only one "
    "of them trains what is to be recorded, pass that one: trajrec.record(optimizer=...)."
)


def is_within_step(optimizer: Optimizer) -> bool:
    """Whether more than one `step` of the optimizer is being run; looks at the stack, so for rare use."""
    running = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == library.__file__:
            running += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return running > 1
