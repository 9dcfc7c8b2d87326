"""Watches the training loop, without a line in it, for what tells which samples made a step.

    DataLoader.__iter__        what the loop receives, and of which samples (`trajrec.capture.observing.loaders`)
    torch.autograd.backward    a backward pass, and what it is called on
    zero_grad                  gradients that were thrown away, which do not add up
    CrossEntropyLoss and such  how the losses are made (`trajrec.capture.observing.criteria`)
    clip_grad_norm_, _value_   gradients that were clipped, to what (`trajrec.capture.observing.clipping`)

A class with an `__iter__` of its own that is a loader, or whose objects hold one (accelerate's are one batch ahead of
the loop), is watched there, too. The model's forward passes are hooks of its own (`trajrec.capture.discovery`).

The watching is there once in a process, for all recorders: the first puts it in place, the last takes it out. Each of
them hears what its `Listener` says. A forked child has no recorder.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from trajrec.capture.attribution.batches import as_ids
from trajrec.capture.observing.clipping import watch_clipping
from trajrec.capture.observing.criteria import KINDS, watched_criterion
from trajrec.capture.observing.listeners import Listener, listeners
from trajrec.capture.observing.loaders import (
    OuterIterator,
    SamplerTap,
    WatchedIterator,
    begin_pass,
    running,
    take_out,
)
from trajrec.errors import UnknownBatchError

_DEPTH = 8  # calls between the making of an object and that of its loader
_PUT_AROUND = {
    "timm.data.loader": ("PrefetchLoader",),
    "torch_geometric.loader": ("PrefetchLoader",),
}  # finished loaders
_HEAP = 1 << 9  # of the flags of a type: made by a class statement


class _Watching:
    """What is put in place of torch's own, and taken out again."""

    def __init__(self) -> None:
        self.kept: list[tuple[Any, SamplerTap]] = []  # iterators whose workers live on, and what stands in there
        self._undo: list[Callable[[], None]] = []

    def add(self, listener: Listener) -> None:
        """From now on the listener hears what happens."""
        if not listeners.all:
            self._install()
        listeners.all = (*listeners.all, listener)

    def remove(self, listener: Listener) -> None:
        """The listener hears no more; after the last one everything is as it was."""
        left = tuple(other for other in listeners.all if other is not listener)
        if listeners.all and not left:
            self._uninstall()
        listeners.all = left

    def _install(self) -> None:
        self._replace(torch.autograd, "backward", _watched_backward)
        for owner in (Optimizer, nn.Module):
            self._replace(owner, "zero_grad", _watched_clearing)
        self._undo += watch_clipping()
        for criterion in KINDS:
            self._replace(criterion, "__call__", watched_criterion(_tell_criterion))
        self._replace(DataLoader, "__init__", _watched_making)
        self._watch_stacking()
        self.watch_class(DataLoader)
        for kind in (*_subclasses(DataLoader), *_holders()):
            self.watch_class(kind)
        self.watch_known()
        self._watch_new_classes()

    def watch_known(self) -> None:
        """Watches classes that are known to be put around loaders which are finished by then."""
        for module, names in _PUT_AROUND.items():
            for name in names if module in sys.modules else ():
                kind = getattr(sys.modules[module], name, None)
                if isinstance(kind, type):
                    self.watch_class(kind)

    def _uninstall(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for iterator, tap in self.kept:
            object.__setattr__(iterator, "_index_sampler", tap.sampler)
        self.kept.clear()

    def _replace(self, owner: Any, name: str, watched: Callable[[Any], Any]) -> None:
        """Puts `watched(original)` in the place of an attribute."""
        own, original = name in vars(owner), getattr(owner, name)
        setattr(owner, name, watched(original))
        self._undo.append(lambda: setattr(owner, name, original) if own else delattr(owner, name))

    def _watch_stacking(self) -> None:
        """Watches torch.stack as long as somebody wants to hear of it; torch.jit takes it for what it is."""
        original, known = torch.stack, torch.jit._builtins._get_builtin_table()  # type: ignore[no-untyped-call]
        watched = _watched_stack(original)
        known[id(watched)] = known.get(id(original))

        def undo() -> None:
            if torch.stack is watched:
                torch.stack = original
            known.pop(id(watched), None)

        torch.stack = watched
        self._undo.append(undo)

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
            listeners.safely(watching.watch_class, kind)

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
    for listener in listeners.all:
        listener.abandon()
        _watching.remove(listener)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _watched_backward(original: Any) -> Any:
    @wraps(original)
    def watched(tensors: Any, *args: Any, **named: Any) -> Any:
        for listener in listeners.all:
            listener.backward(tensors)
        return original(tensors, *args, **named)

    return watched


def _watched_clearing(original: Any) -> Any:
    @wraps(original)
    def watched(cleared: Any, *args: Any, **named: Any) -> Any:
        for listener in listeners.all:
            listener.cleared(cleared)
        return original(cleared, *args, **named)

    return watched


def _tell_criterion(criterion: Any, output: Any) -> None:
    for listener in listeners.all:
        listener.criterion(criterion, output)


def _watched_stack(original: Any) -> Any:
    @wraps(original)
    def watched(*args: Any, **named: Any) -> Any:
        stacked = original(*args, **named)
        if not torch.compiler.is_compiling():
            listeners.safely(_tell_of_stack, original, watched, args, named, stacked)
        return stacked

    return watched


def _tell_of_stack(original: Any, watched: Any, args: Any, named: Any, stacked: Any) -> None:
    wanting = [listener for listener in listeners.all if listener.wants_stacked()]
    if not wanting:
        if torch.stack is watched:
            torch.stack = original
        return
    dim = named.get("dim", args[1] if len(args) > 1 else 0)
    if dim == 0 and "out" not in named:
        for listener in wanting:
            listener.stacked(args[0] if args else named["tensors"], stacked, sys._getframe(3))


def _watched_iter(original: Any) -> Any:
    @wraps(original)
    def watched(loader: Any) -> Any:
        about, tap = listeners.safely(begin_pass, loader) or (None, None)
        try:
            iterator = original(loader)
        finally:
            if tap is not None:
                listeners.safely(_take_out, loader, tap)
        if about is None:
            return iterator
        # Read after the iterator exists: making it is what starts the sampler anew.
        return WatchedIterator(iterator, about, tap.drawn if tap is not None else None)

    watched.is_watched = True  # type: ignore[attr-defined]
    return watched


def _take_out(loader: Any, tap: SamplerTap) -> None:
    kept = take_out(loader, tap)
    if kept is not None:
        _watching.kept.append((kept, tap))


def _watched_outer_iter(original: Any) -> Any:
    @wraps(original)
    def watched(loader: Any) -> Any:
        outer = OuterIterator(None, loader)
        running().append(outer)
        try:
            iterator = original(loader)
        finally:
            running().pop()
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
        listeners.safely(_watch_maker)

    return watched


def _watch_maker() -> None:
    """Watches the class of an object that is being made, and makes a loader for itself."""
    _watching.watch_known()
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
    for listener in listeners.all:
        listener.give(named, shares)
