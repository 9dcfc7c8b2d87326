"""Who hears of the loop: the recorders of this process.

They are told in the thread in which it happens. What fails while they are told ends the recordings, not the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple, Protocol


class Handed(NamedTuple):
    """A batch as a loader handed it to the loop.

    Attributes:
        loader: the loader that made it.
        ids: what its sampler drew, or None if that is not known.
        content: as the loop received it.
        about: the pass over the loader that it came from.
        made: as the loader made it, where the loop received something else.
    """

    loader: Any
    ids: Any
    content: Any
    about: Any = None
    made: Any = None


class Listener(Protocol):
    """What a recorder hears of the loop; none of it may raise."""

    def begin_pass(self, loader: Any, around: Sequence[Any]) -> int | None:
        """A pass over a loader begins, which others draw from: its number, or None if the training has none of it."""

    def end_pass(self, serial: int) -> None:
        """Nothing more comes from the pass over a loader with this number."""

    def draw(self, handed: Handed, serial: int) -> None:
        """The loop has received a batch."""

    def stacked(self, pieces: Any, stacked: Any, frame: FrameType) -> None:
        """Tensors were stacked in this frame."""

    def wants_stacked(self) -> bool | None:
        """Whether that is of interest."""

    def backward(self, tensors: Any) -> None:
        """A backward pass begins."""

    def cleared(self, by: Any) -> None:
        """An optimizer or a module is about to set its gradients to zero."""

    def clipped(self, kind: str, limit: Any, order: Any, params: Sequence[Any]) -> None:
        """Gradients of parameters were clipped by "norm" or "value"."""

    def criterion(self, criterion: Any, output: Any) -> None:
        """A criterion of torch.nn has given a loss."""

    def give(self, ids: Any, weights: Any) -> None:
        """The user has named samples."""

    def failed(self, error: Exception) -> None:
        """The watching itself has failed."""

    def abandon(self) -> None:
        """This process is a forked child, which has no recorder."""


class Listeners:
    """Those that are told.

    Attributes:
        all: the listeners.
    """

    def __init__(self) -> None:
        self.all: tuple[Listener, ...] = ()

    def safely(self, call: Callable[..., Any], *args: Any) -> Any:
        """What the call returns; None, and all listeners know of it, where it fails."""
        try:
            return call(*args)
        except Exception as error:
            for listener in self.all:
                listener.failed(error)


listeners = Listeners()
