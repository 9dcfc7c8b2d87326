"""Watches the training loop, without a line in it, for what tells which samples made a step.

Three things are watched while a recording is on:

    DataLoader.__iter__         a stand-in for the loader's batch sampler remembers the ids it drew; the iterator
                                hands them over when the loop receives the batch. Loaders yield in the order drawn,
                                so this also holds with worker processes that fetch ahead.
    the model's forward pass    marks the batch that it used; a pass without gradients is evaluation.
    torch.autograd.backward     batches that were used and led to a backward pass belong to the next step; the
                                loss is the tensor it was called on.

and `zero_grad`, which tells gradients that were thrown away from those that add up. What is seen is written down as
facts by `trajrec.capture.observing.observer`.

A class with an `__iter__` of its own that is a loader, or whose objects hold one (accelerate's are one batch ahead of
the loop), is watched there, too: what it draws from an inner loader waits, and is handed over when the loop receives it
(`OuterIterator`).

The watching is there once in a process, for all recorders: the first puts it in place, the last takes it out. Each of
them hears what its `Listener` says. A forked child has no recorder.
"""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from trajrec.capture.attribution.batches import as_ids
from trajrec.capture.observing.traces import holders_of, traces_of
from trajrec.errors import UnknownBatchError

_DEPTH = 8  # calls between the making of an object and that of its loader
_HEAP = 1 << 9  # of the flags of a type: made by a class statement


@dataclass(frozen=True, slots=True)
class Handed:
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

    def backward(self, tensors: Any) -> None:
        """A backward pass begins."""

    def cleared(self, by: Any) -> None:
        """An optimizer or a module is about to set its gradients to zero."""

    def give(self, ids: Any, weights: Any) -> None:
        """The user has named samples."""

    def failed(self, error: Exception) -> None:
        """The watching itself has failed."""

    def abandon(self) -> None:
        """This process is a forked child, which has no recorder."""


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
        serials: number of the pass, by the listener that hears of it.
        outer: the iterator of another loader that draws from this one, if one does.
        is_over: whether it came to its end, or nobody can draw from it any more.
    """

    loader: Any
    serials: dict[int, int]
    outer: OuterIterator | None = None
    is_over: bool = False

    def end(self) -> None:
        """Nothing more comes from it."""
        if not self.is_over:
            self.is_over = True
            for listener in _watching.listeners:
                serial = self.serials.get(id(listener))
                if serial is not None:
                    listener.end_pass(serial)


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
        if outer is None or outer not in _stack():
            _tell(handed)
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
        _stack().append(self)
        try:
            content = next(self._iterator)
        finally:
            _stack().pop()
        _safely(self._hand_over, content)
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
            _tell(Handed(waiting[-1].loader, None, content, waiting[-1].about))
            waiting.clear()
            return
        handed = waiting[found]
        del waiting[: found + 1]  # what comes before it was passed over: loaders yield in the order drawn
        outer = _stack()[-1] if _stack() else None
        handed = Handed(handed.loader, handed.ids, content, handed.about, handed.content)
        if outer is None:
            _tell(handed)
        else:
            outer.take(handed)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.outer: list[OuterIterator] = []


_running = _Stack()


def _stack() -> list[OuterIterator]:
    """The outer iterators that are being asked for a batch in this thread."""
    return _running.outer


class _Watching:
    """What is put in place of torch's own, and taken out again."""

    def __init__(self) -> None:
        self.listeners: tuple[Listener, ...] = ()
        self.taps: list[tuple[Any, str, SamplerTap]] = []
        self._undo: list[Callable[[], None]] = []

    def add(self, listener: Listener) -> None:
        """From now on the listener hears what happens."""
        if not self.listeners:
            self._install()
        self.listeners = (*self.listeners, listener)

    def remove(self, listener: Listener) -> None:
        """The listener hears no more; after the last one everything is as it was."""
        left = tuple(other for other in self.listeners if other is not listener)
        if self.listeners and not left:
            self._uninstall()
        self.listeners = left

    def _install(self) -> None:
        self._replace(torch.autograd, "backward", _watched_backward)
        for owner in (Optimizer, nn.Module):
            self._replace(owner, "zero_grad", _watched_clearing)
        self._replace(DataLoader, "__init__", _watched_making)
        self.watch_class(DataLoader)
        for kind in (*_subclasses(DataLoader), *_holders()):
            self.watch_class(kind)
        self._watch_new_classes()

    def _uninstall(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for owner, attribute, tap in self.taps:
            object.__setattr__(owner, attribute, tap.sampler)
        self.taps.clear()

    def _replace(self, owner: Any, name: str, watched: Callable[[Any], Any]) -> None:
        """Puts `watched(original)` in the place of an attribute."""
        own, original = name in vars(owner), getattr(owner, name)
        setattr(owner, name, watched(original))
        self._undo.append(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    def watch_class(self, kind: type) -> None:
        """Watches the `__iter__` that a class of loaders, or of what holds one, has of its own."""
        if kind is DataLoader:
            self._replace(kind, "__iter__", _watched_iter)
        elif not getattr(vars(kind).get("__iter__", getattr(kind, "__iter__", None)), "is_watched", False):
            self._replace(kind, "__iter__", _watched_outer_iter)

    def _watch_new_classes(self) -> None:
        """Watches classes of loaders that come into being while a recording is on."""
        before = DataLoader.__dict__.get("__init_subclass__")
        watching = self

        def made(kind: Any, /, **named: Any) -> None:
            super(DataLoader, kind).__init_subclass__(**named)  # type: ignore[misc]
            _safely(watching.watch_class, kind)

        DataLoader.__init_subclass__ = classmethod(made)  # type: ignore[method-assign, assignment]

        def undo() -> None:
            if before is None:
                del DataLoader.__init_subclass__
            else:
                DataLoader.__init_subclass__ = before  # type: ignore[method-assign]

        self._undo.append(undo)


_watching = _Watching()


class Watch:
    """Tells a listener what happens in the loop, until it is removed."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        _watching.add(listener)

    def remove(self) -> None:
        """Tells the listener no more."""
        _watching.remove(self._listener)


def watch(listener: Listener) -> Watch:
    """Tells the listener from now on what happens in the loop."""
    return Watch(listener)


def _in_child() -> None:
    """After a fork: the child trains, ends or loads data as if nothing were recorded."""
    for listener in _watching.listeners:
        listener.abandon()
        _watching.remove(listener)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _safely(call: Callable[..., Any], *args: Any) -> Any:
    """What the call returns; None, and all listeners know of it, where it fails."""
    try:
        return call(*args)
    except Exception as error:
        for listener in _watching.listeners:
            listener.failed(error)


def _tell(handed: Handed) -> None:
    """The loop has received a batch."""
    for listener in _watching.listeners:
        serial = handed.about.serials.get(id(listener))
        if serial is not None:
            listener.draw(handed, serial)


def _watched_backward(original: Any) -> Any:
    @wraps(original)
    def watched(tensors: Any, *args: Any, **named: Any) -> Any:
        for listener in _watching.listeners:
            listener.backward(tensors)
        return original(tensors, *args, **named)

    return watched


def _watched_clearing(original: Any) -> Any:
    @wraps(original)
    def watched(cleared: Any, *args: Any, **named: Any) -> Any:
        for listener in _watching.listeners:
            listener.cleared(cleared)
        return original(cleared, *args, **named)

    return watched


def _watched_iter(original: Any) -> Any:
    @wraps(original)
    def watched(loader: Any) -> Any:
        about, tap = _safely(_begin_pass, loader) or (None, None)
        try:
            iterator = original(loader)
        finally:
            if tap is not None:
                _safely(_take_out, loader, tap)
        if about is None:
            return iterator
        # Read after the iterator exists: making it is what starts the sampler anew.
        return WatchedIterator(iterator, about, tap.drawn if tap is not None else None)

    watched.is_watched = True  # type: ignore[attr-defined]
    return watched


def _watched_outer_iter(original: Any) -> Any:
    @wraps(original)
    def watched(loader: Any) -> Any:
        outer = OuterIterator(None, loader)
        _stack().append(outer)
        try:
            iterator = original(loader)
        finally:
            _stack().pop()
        if isinstance(iterator, WatchedIterator) and iterator.belongs_to(outer):
            iterator.is_received()  # the class only does something beside what DataLoader itself does
            return iterator
        outer.begin(iterator)
        return outer

    watched.is_watched = True  # type: ignore[attr-defined]
    return watched


def _watched_making(original: Any) -> Any:
    @wraps(original)
    def watched(loader: Any, *args: Any, **named: Any) -> None:
        original(loader, *args, **named)
        _safely(_watch_maker)

    return watched


def _watch_maker() -> None:
    """Watches the class of an object that is being made, and makes a loader for itself."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(_DEPTH):
        if frame is None:
            return
        kind = type(frame.f_locals.get("self"))
        if frame.f_code.co_name == "__init__" and _is_holder(kind):
            _watching.watch_class(kind)
        frame = frame.f_back


def _holders() -> set[type]:
    """The classes with an `__iter__` of their own of which an object holds a loader."""
    kinds: dict[type, bool] = {}
    found = set()
    for value in gc.get_objects():
        kind = type(value)
        if kind not in kinds:
            kinds[kind] = _is_holder(kind)
        if kinds[kind] and _holds_loader(value):
            found.add(kind)
    return found


def _holds_loader(value: Any) -> bool:
    try:
        held = object.__getattribute__(value, "__dict__")
    except Exception:  # an object as strange as it likes
        return False
    return type(held) is dict and any(issubclass(type(item), DataLoader) for item in held.values())


def _is_holder(kind: type) -> bool:
    """Whether a class is one that may hand out the batches of a loader."""
    if not kind.__flags__ & _HEAP or issubclass(kind, DataLoader | type):
        return False
    is_ours = str(vars(kind).get("__module__")).startswith(("torch.", "trajrec."))
    return not is_ours and any("__iter__" in vars(base) for base in kind.__mro__)


def _begin_pass(loader: Any) -> tuple[Pass | None, SamplerTap | None]:
    around = [outer.loader for outer in _stack()]
    numbers = {id(listener): listener.begin_pass(loader, around) for listener in _watching.listeners}
    serials = {key: number for key, number in numbers.items() if number is not None}
    if not serials:
        return None, None
    return Pass(loader, serials, _stack()[-1] if _stack() else None), _tap(loader)


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


def _take_out(loader: Any, tap: SamplerTap) -> None:
    """Puts the sampler back into the loader, which has made its iterator."""
    for attribute in ("batch_sampler", "sampler"):
        if getattr(loader, attribute) is tap:
            object.__setattr__(loader, attribute, tap.sampler)
    kept = getattr(loader, "_iterator", None)
    if kept is not None and kept._index_sampler is tap:
        _watching.taps.append((kept, "_index_sampler", tap))


def _subclasses(kind: type) -> list[type]:
    """All classes below a class, nearest first."""
    below: list[type] = kind.__subclasses__()
    return below + [deeper for child in below for deeper in _subclasses(child)]


def set_batch(ids: Any, weights: Any = None) -> None:
    """Names the samples of the coming optimizer step, where the recorder cannot tell them by itself.

    With gradient accumulation it is called for every micro-batch, before its backward pass. Does nothing while no
    recording is on, so a script that calls it also runs without trajrec's recorder.

    Args:
        ids: [B] integer sample ids, repeats allowed.
        weights: [B] the weight c of each sample's loss in the step's gradient; default 1/B (a mean loss).

    Raises:
        UnknownBatchError: if ids are not integers, or weights have another length.
    """
    named = as_ids(ids.reshape(-1).tolist() if hasattr(ids, "reshape") else ids)
    if named is None:
        raise UnknownBatchError("trajrec.set_batch needs integer sample ids.")
    shares = None if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if shares is not None and len(shares) != len(named):
        raise UnknownBatchError(f"trajrec.set_batch got {len(named)} ids but {len(shares)} weights.")
    for listener in _watching.listeners:
        listener.give(named, shares)
