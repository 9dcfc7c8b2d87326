"""Loaders while they are recorded: the ids that their samplers draw, and the batches that the loop receives.

A stand-in for the loader's batch sampler remembers the ids it drew; the iterator hands them over when the loop receives
the batch. Loaders yield in the order drawn, so this also holds with worker processes that fetch ahead. What an outer
loader draws from an inner one waits, and is handed over when the loop receives it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from trajrec.capture.attribution.batches import as_ids
from trajrec.capture.observing.listeners import Handed, Listener, listeners
from trajrec.capture.observing.traces import holders_of, traces_of


class SamplerTap:
    """Stands in for a loader's (batch) sampler and remembers what it drew since the last `iter`.

    It does so only while the loader makes an iterator, which has then begun to draw from it: whoever looks for the
    sampler finds it. An iterator whose workers live on keeps it until the recording ends.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.drawn = deque()
        return self._draw(self.drawn)

    def _draw(self, drawn: deque[Any]) -> Iterator[Any]:
        for ids in self.sampler:
            drawn.append(as_ids(ids))  # now: samplers use their lists again
            yield ids

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


@dataclass(slots=True, weakref_slot=True)
class Pass:
    """One pass over a loader.

    Attributes:
        loader: the loader.
        heard: the listeners that hear of it, each with its number of the pass.
        outer: the iterator of another loader that draws from this one, if one does.
        is_over: whether it came to its end, or nobody can draw from it any more.
    """

    loader: Any
    heard: tuple[tuple[Listener, int], ...]
    outer: OuterIterator | None = None
    is_over: bool = False

    def end(self) -> None:
        """Nothing more comes from it."""
        if not self.is_over:
            self.is_over = True
            for listener, serial in self.heard:
                if listener in listeners.all:  # it may hear no more
                    listener.end_pass(serial)

    def hand_over(self, handed: Handed) -> None:
        """The loop has received a batch of it."""
        for listener, serial in self.heard:
            if listener in listeners.all:
                listener.draw(handed, serial)


class _Iterator:
    """Stands in for a loader's iterator."""

    def __init__(self, iterator: Any) -> None:
        self._iterator = iterator

    def __len__(self) -> int:
        return len(self._iterator)

    def __bool__(self) -> bool:
        return bool(self._iterator)

    def __getattr__(self, name: str) -> Any:
        if name == "_iterator":
            raise AttributeError(name)
        return getattr(self._iterator, name)


class WatchedIterator(_Iterator):
    """A loader's iterator that reports each batch when the loop receives it."""

    def __init__(self, iterator: Any, about: Pass, drawn: deque[Any] | None) -> None:
        super().__init__(iterator)
        self._next = iterator.__next__
        self._about = about
        self._drawn = drawn

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be on its way out
            self._about.end()

    def __iter__(self) -> WatchedIterator:
        return self

    def belongs_to(self, outer: OuterIterator) -> bool:
        """Whether what it draws waits in another iterator."""
        return self._about.outer is outer

    def is_received(self) -> None:
        """The loop draws from it itself."""
        self._about.outer = None

    def __next__(self) -> Any:
        try:
            content = self._next()
        except StopIteration:
            self._about.end()
            raise
        except Exception:
            self._drawn = None  # which batch has failed, and whether it will come again, cannot be told
            raise
        handed = Handed(self._about.loader, self._drawn.popleft() if self._drawn else None, content, self._about)
        outer = self._about.outer
        if outer is None or outer not in running():
            handed.about.hand_over(handed)
        else:
            outer.take(handed)
        return content


class OuterIterator(_Iterator):
    """The iterator of a loader that draws from another one.

    What it has drawn waits here until the loop receives it: as the batch itself, or a copy with the same values. Where
    only one batch waits, and no other was known by its values, it is that one. Else the ids are unknown.
    """

    def __init__(self, iterator: Any, loader: Any) -> None:
        super().__init__(iterator)
        self.loader = loader
        self._waiting: list[Handed] = []
        self._shows = False  # batches are known by their values, if at all

    def begin(self, iterator: Any) -> None:
        """Hands out from now on what this iterator does."""
        self._iterator = iterator

    def __iter__(self) -> OuterIterator:
        return self

    def __next__(self) -> Any:
        running().append(self)
        try:
            content = next(self._iterator)
        finally:
            running().pop()
        listeners.safely(self._hand_over, content)
        return content

    def take(self, handed: Handed) -> None:
        """An inner loader has handed out a batch, to be received by the loop later."""
        self._waiting.append(handed)

    def _hand_over(self, content: Any) -> None:
        waiting = self._waiting
        if not waiting:
            return  # made of nothing that was seen
        holders = holders_of([traces_of(handed.content) for handed in waiting], content)
        found = holders[0] if len(holders) == 1 else None
        if found is None and len(waiting) == 1 and not self._shows:
            found = 0
        else:
            self._shows = True
        if found is None:
            newest = waiting[-1]
            newest.about.hand_over(Handed(newest.loader, None, content, newest.about))
            waiting.clear()
            return
        handed = waiting[found]
        del waiting[: found + 1]  # what comes before it was passed over: loaders yield in the order drawn
        outer = running()[-1] if running() else None
        handed = Handed(handed.loader, handed.ids, content, handed.about, handed.content)
        if outer is None:
            handed.about.hand_over(handed)
        else:
            outer.take(handed)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.outer: list[OuterIterator] = []


_running = _Stack()


def running() -> list[OuterIterator]:
    """The outer iterators that are being asked for a batch in this thread."""
    return _running.outer


def begin_pass(loader: Any) -> tuple[Pass | None, SamplerTap | None]:
    """A pass over a loader begins: how it is known, and what remembers its ids. None if nobody wants to hear of it."""
    around_it = running()
    around = [outer.loader for outer in around_it]
    numbers = [(listener, listener.begin_pass(loader, around)) for listener in listeners.all]
    heard = tuple([(listener, number) for listener, number in numbers if number is not None])
    if not heard:
        return None, None
    return Pass(loader, heard, around_it[-1] if around_it else None), _tap(loader)


def _tap(loader: Any) -> SamplerTap | None:
    """The stand-in of this loader's sampler, put in place on the first pass."""
    if isinstance(loader.dataset, IterableDataset) or not getattr(loader, "in_order", True):
        return None
    attribute = "batch_sampler" if loader.batch_sampler is not None else "sampler"
    sampler = getattr(loader, attribute)
    if type(sampler) is SamplerTap:
        return sampler
    tap = SamplerTap(sampler)
    # DataLoader forbids to set its sampler later, to keep it consistent; a stand-in that draws the same is.
    object.__setattr__(loader, attribute, tap)
    if getattr(loader, "_iterator", None) is not None:  # workers that live on: their iterator has the sampler at hand
        object.__setattr__(loader._iterator, "_index_sampler", tap)
    return tap


def take_out(loader: Any, tap: SamplerTap) -> Any:
    """Puts the sampler back into the loader, which has made its iterator.

    Returns:
        The iterator that keeps the tap, if its workers live on.
    """
    for attribute in ("batch_sampler", "sampler"):
        if getattr(loader, attribute) is tap:
            object.__setattr__(loader, attribute, tap.sampler)
    kept = getattr(loader, "_iterator", None)
    if kept is not None and kept._index_sampler is tap:
        return kept
    return None
