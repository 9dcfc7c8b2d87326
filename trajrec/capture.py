"""Watches the training loop, without a line in it, for what tells which samples made a step.

Three things are watched while a recording is on:

    DataLoader.__iter__         a stand-in for the loader's batch sampler remembers the ids it drew; the iterator
                                hands them over when the loop receives the batch. Loaders yield in the order drawn,
                                so this also holds with worker processes that fetch ahead.
    the model's forward pass    marks the batch that it used; a pass without gradients is evaluation.
    torch.autograd.backward     batches that were used and led to a backward pass belong to the next step; the
                                loss is the tensor it was called on.

and `zero_grad`, which tells gradients that were thrown away from those that add up. `trajrec.ledger` keeps the books.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from functools import wraps
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, IterableDataset

from trajrec.batches import as_ids
from trajrec.errors import UnknownBatchError
from trajrec.ledger import BatchLedger
from trajrec.straight import HAS_LANE, Kind, Straight


class SamplerTap:
    """Stands in for a loader's (batch) sampler and remembers what it drew since the last `iter`."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.drawn: deque[Any] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.drawn = deque()
        return self._draw(self.drawn)

    def _draw(self, drawn: deque[Any]) -> Iterator[Any]:
        for ids in self.sampler:
            drawn.append(ids)
            yield ids

    def __len__(self) -> int:
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.sampler, name)


class WatchedIterator:
    """A loader's iterator that reports each batch when the loop receives it."""

    def __init__(self, iterator: Any, ledger: BatchLedger, loader: Any, drawn: deque[Any] | None, serial: int) -> None:
        self._iterator = iterator
        self._next = iterator.__next__
        self._ledger = ledger
        self._loader = loader
        self._drawn = drawn
        self._serial = serial

    def __iter__(self) -> WatchedIterator:
        return self

    def __next__(self) -> Any:
        content = self._next()
        self.receive(self._drawn.popleft() if self._drawn else None, content)
        return content

    def receive(self, ids: Any, content: Any) -> None:
        """The loop receives a batch."""
        ledger = self._ledger
        began = ledger.watch.start()
        ledger.draw(self._loader, ids, content, self._serial)
        ledger.watch.stop(began)

    def __len__(self) -> int:
        return len(self._iterator)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._iterator, name)


if HAS_LANE:
    from trajrec.lane import Draws, Lane

    class StraightIterator(Draws, WatchedIterator):
        """The same, by way of the lane: it has a `__next__` of its own."""

        def __init__(self, lane: Lane, *watched: Any) -> None:
            WatchedIterator.__init__(self, *watched)
            Draws.__init__(self, lane, self._iterator, self._loader, self._drawn, self._serial)


class Capture:
    """Installs the watching of loaders and backward passes, and takes it out again."""

    def __init__(self, ledger: BatchLedger, straight: Straight) -> None:
        self.ledger = ledger
        self._straight = straight
        self._taps: list[tuple[Any, str, SamplerTap]] = []
        self._original_iter: Any = None
        self._original_backward: Any = None
        self._original_clearing: list[tuple[Any, Any]] = []

    def _watch_clearing(self, owner: Any) -> None:
        """Watches `zero_grad` of all optimizers or modules."""
        original, ledger = owner.zero_grad, self.ledger
        self._original_clearing.append((owner, original))

        def clear(cleared: Any, *args: Any, **kwargs: Any) -> None:
            ledger.cleared(cleared)
            original(cleared, *args, **kwargs)

        hook = self._straight.hook(Kind.CLEARING, clear, original)

        @wraps(original)
        def watched(cleared: Any, *args: Any, **kwargs: Any) -> None:
            hook(cleared, *args, **kwargs)  # which is no function, and a compiled step takes only these for methods

        owner.zero_grad = watched

    def install(self) -> None:
        """Starts watching."""
        self._original_iter = DataLoader.__iter__
        original = self._original_backward = torch.autograd.backward
        capture, ledger, watch = self, self.ledger, self.ledger.watch

        def watched_iter(loader: Any) -> Any:
            if not capture.ledger.watches(loader):
                return capture._original_iter(loader)
            return capture._watch(loader)

        def watched_backward(tensors: Any, *args: Any, **kwargs: Any) -> Any:
            began = watch.start()
            ledger.backward(tensors)
            watch.stop(began)
            return original(tensors, *args, **kwargs)

        DataLoader.__iter__ = watched_iter  # type: ignore[method-assign]
        torch.autograd.backward = self._straight.hook(Kind.BACKWARD, watched_backward, original)
        for owner in (Optimizer, nn.Module):
            self._watch_clearing(owner)
        _active.append(self.ledger)

    def remove(self) -> None:
        """Stops watching; loaders get their own samplers back."""
        DataLoader.__iter__ = self._original_iter  # type: ignore[method-assign]
        torch.autograd.backward = self._original_backward
        for owner, original in self._original_clearing:
            owner.zero_grad = original
        self._original_clearing.clear()
        _active.remove(self.ledger)
        for owner, attribute, tap in self._taps:
            object.__setattr__(owner, attribute, tap.sampler)
        self._taps.clear()

    def _watch(self, loader: Any) -> WatchedIterator:
        tap = self._tap(loader)
        serial = self.ledger.begin_pass(loader)
        iterator = self._original_iter(loader)
        # Read after the iterator exists: making it is what starts the sampler anew.
        drawn = tap.drawn if tap is not None else None
        watched = iterator, self.ledger, loader, drawn, serial
        lane = self._straight.lane
        return WatchedIterator(*watched) if lane is None else StraightIterator(lane, *watched)

    def _tap(self, loader: Any) -> SamplerTap | None:
        """The stand-in of this loader's sampler, put in place on the first pass."""
        if isinstance(loader.dataset, IterableDataset) or not getattr(loader, "in_order", True):
            return None
        attribute = "batch_sampler" if loader.batch_sampler is not None else "sampler"
        sampler = getattr(loader, attribute)
        if isinstance(sampler, SamplerTap):
            return sampler
        tap = SamplerTap(sampler)
        # DataLoader forbids to set its sampler later, to keep it consistent; a stand-in that draws the same is.
        self._replace(loader, attribute, tap)
        kept = getattr(loader, "_iterator", None)
        if kept is not None:  # workers that live on: their iterator has the sampler at hand
            self._replace(kept, "_index_sampler", tap)
        return tap

    def _replace(self, owner: Any, attribute: str, tap: SamplerTap) -> None:
        object.__setattr__(owner, attribute, tap)
        self._taps.append((owner, attribute, tap))


_active: list[BatchLedger] = []


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
    named = as_ids(ids.tolist() if hasattr(ids, "tolist") else ids)
    if named is None:
        raise UnknownBatchError("trajrec.set_batch needs integer sample ids.")
    shares = None if weights is None else np.asarray(weights, dtype=np.float64).reshape(-1)
    if shares is not None and len(shares) != len(named):
        raise UnknownBatchError(f"trajrec.set_batch got {len(named)} ids but {len(shares)} weights.")
    for ledger in _active:
        ledger.give(named, shares)
