"""Knows the tensors of batches again: as they are, as views of them, or as copies with the same values.

The batch that was drawn last is kept alive until another one is drawn, or its step is made; of others that may be used
yet some values are kept. Of those that steps were made of, only what is alive anyway is known again.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from trajrec.capture.attribution.batches import Batch

_COMPARED = 512
_MOST_RECENT = 32


def tensors_in(content: Any, depth: int = 6) -> Iterator[Tensor]:
    """The tensors in lists, tuples, dictionaries and attributes of objects, nested or not; arrays as tensors."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, np.ndarray) and content.dtype.kind in "biuf" and content.flags.writeable:
        yield torch.from_numpy(content)
    elif depth and isinstance(content, list | tuple | Mapping):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from tensors_in(value, depth - 1)
    elif depth and hasattr(content, "__dict__") and not isinstance(content, type | nn.Module):
        yield from tensors_in(list(vars(content).values()), depth - 2)


def tensors_of(content: Any) -> list[Tensor]:
    """The same as a list, without a detour where it holds nothing but tensors, as most batches do."""
    if type(content) in (list, tuple) and all(type(value) is Tensor for value in content):
        return list(content)
    return list(tensors_in(content))


class Trace(NamedTuple):
    """What is kept of a tensor of a batch, so that it, a view of it or a copy is known again.

    Attributes:
        tensor: not kept alive.
        shape: of the tensor.
        kept: some of its values, where the tensor may be gone by the time they are asked for.
    """

    tensor: ref[Tensor]
    shape: torch.Size
    kept: Tensor | None = None

    def values(self) -> Tensor | None:
        """Some of its values, at `_places`; None where it is gone."""
        own = self.tensor()
        return self.kept if self.kept is not None or own is None else _some_of(own)


def traces_of(content: Any, keeps: bool = False) -> list[Trace]:
    """Traces of the tensors in a batch; with `keeps` they outlive the tensors."""
    found = [tensor for tensor in tensors_of(content) if _has_memory(tensor)]
    return [Trace(ref(tensor), tensor.shape, _some_of(tensor) if keeps else None) for tensor in found]


class Held:
    """A batch that may be used yet, or again; its tensors are kept alive until they are let go of.

    Args:
        batch: the batch.
        content: as the loop received it.
        loader: kept alive as long as the batch may be used, so that its data set is known.
    """

    __slots__ = ("_refs", "_tensors", "_traces", "batch", "loader")

    def __init__(self, batch: Batch, content: Any, loader: Any) -> None:
        self.batch = batch
        self.loader = loader
        self._tensors: list[Tensor] | None = tensors_of(content)
        self._refs: list[ref[Tensor]] = []
        self._traces: list[Trace] = []

    def let_go(self) -> None:
        """Keeps the batch's tensors alive no longer, but some of their values."""
        if self._tensors is not None:
            self._traces = traces_of(self._tensors, keeps=True)
            self._refs, self._tensors = [*map(ref, self._tensors)], None

    def is_over(self) -> None:
        """A step was made of the batch: only what others keep alive is known again."""
        if self._tensors is not None:
            self._refs, self._tensors = [*map(ref, self._tensors)], None
        self._traces, self.loader = [], None

    def tensors(self) -> list[Tensor]:
        """The tensors of the batch that are alive."""
        if self._tensors is not None:
            return self._tensors
        return [tensor for mark in self._refs if (tensor := mark()) is not None]

    def traces(self) -> list[Trace]:
        """Traces of the tensors of the batch."""
        return self._traces or traces_of(self.tensors())


class BatchTensors:
    """The tensors of batches that wait or are in use, and of those that steps were made of a short while ago."""

    def __init__(self) -> None:
        self._held: list[Held] = []
        self._recent: list[Held] = []

    @property
    def count(self) -> int:
        """How many batches wait or are in use."""
        return len(self._held)

    @property
    def only(self) -> Batch | None:
        """The batch that waits or is in use, if there is but one."""
        return self._held[0].batch if len(self._held) == 1 else None

    def add(self, held: Held) -> None:
        """Takes in a batch that was drawn; keeps those before it alive no longer."""
        for before in self._held:
            before.let_go()
        self._held.append(held)

    def keep(self, batches: Container[Batch], made: Container[Batch] = ()) -> None:
        """Keeps only these of the batches that wait or are in use.

        Those that a step was made of are known again for a while, as long as their tensors are alive.
        """
        recent = [held for held in self._recent if held.tensors() and held.batch not in made]
        for held in self._held:
            if held.batch in made:
                held.is_over()
                recent.append(held)
        self._recent = recent[-_MOST_RECENT:]
        self._held = [held for held in self._held if held.batch in batches]
        for held in self._held:
            held.let_go()

    def shown(self, given: Sequence[Tensor], by_value: bool = True) -> Batch | None:
        """The batch that tensors are taken from: which they are of, or are views of; or else copies of.

        Args:
            given: what the model is called on.
            by_value: whether to look for copies.

        Returns:
            None if nothing tells, or several batches with other samples fit as well.
        """
        held = self._held
        if not given or not (held or self._recent):
            return None
        if len(held) == 1 and _are_all_of(given, held[0].tensors()):
            return held[0].batch
        given = [tensor for tensor in given if _has_memory(tensor)]
        everyone = [*self._recent, *held]
        own = [known for known in everyone if given and _are_all_of(given, known.tensors())]
        found = _one_of(own) or _one_of(_best(everyone, given, _is_part))
        if found is not None:
            return self._in_use(found)
        parts = _best(held, given, _is_part)
        return _one_of(parts or (_best(held, given, _is_copy) if by_value else []))

    def _in_use(self, batch: Batch) -> Batch:
        """Looks for copies of this batch, too, from now on."""
        again = [held for held in self._recent if held.batch is batch]
        if again:
            self._held = [*again, *self._held]
            self._recent = [held for held in self._recent if held.batch is not batch]
        return batch


def _are_all_of(given: Sequence[Tensor], own: Sequence[Tensor]) -> bool:
    return all(any(tensor is other for other in own) for tensor in given)


def _best(known: Sequence[Held], given: Sequence[Tensor], fits: Callable[[Trace, Tensor], bool]) -> list[Held]:
    places = _fitting([held.traces() for held in known], given, fits)
    return [known[place] for place in places]


def _one_of(found: Sequence[Held]) -> Batch | None:
    """The newest of these, if all of them have the same samples."""
    if len(found) > 1:
        samples = {None if held.batch.ids is None else held.batch.ids.tobytes() for held in found}
        if len(samples) > 1 or None in samples:
            return None
    return max((held.batch for held in found), key=lambda batch: batch.number, default=None)


def holders_of(candidates: Sequence[Sequence[Trace]], inputs: Any) -> list[int]:
    """Which of several batches these inputs are taken from; several where they fit equally well.

    They are of the batch whose tensors they are, or are views of; or else of the one that they have the values of.
    """
    given = [tensor for tensor in tensors_in(inputs) if _has_memory(tensor)]
    return _fitting(candidates, given, _is_part) or _fitting(candidates, given, _is_copy)


def _fitting(
    candidates: Sequence[Sequence[Trace]], given: Sequence[Tensor], fits: Callable[[Trace, Tensor], bool]
) -> list[int]:
    """The candidates that most of the given tensors fit; none if none fits."""
    counts = [sum(any(fits(trace, tensor) for trace in traces) for tensor in given) for traces in candidates]
    most = max(counts, default=0)
    return [place for place, count in enumerate(counts) if count == most] if most else []


def _has_memory(tensor: Tensor) -> bool:
    """Whether values of a tensor can be looked at: not of a sparse one, or one that torch.func has wrapped."""
    try:
        return tensor.layout is torch.strided and tensor.numel() > 0 and tensor.data_ptr() != 0
    except RuntimeError:
        return False


def _some_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[_places(tensor.numel()).to(flat.device)]


@lru_cache(maxsize=64)
def _places(count: int) -> Tensor:
    """Up to 512 places among `count` values, the same ones each time, without drawing from torch's generators."""
    if count <= _COMPARED:
        return torch.arange(count)
    return torch.from_numpy(np.sort(np.random.Generator(np.random.PCG64(count)).integers(count, size=_COMPARED)))


def _is_part(trace: Trace, tensor: Tensor) -> bool:
    """Whether a tensor is that of a batch, or shares its memory."""
    own = trace.tensor()
    if own is None or own.device != tensor.device:
        return False
    if own is tensor:
        return True
    first, second = _span(own), _span(tensor)
    return first[0] < second[1] and second[0] < first[1]


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where in memory a tensor's values lie: from this byte to before that one."""
    start = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * tensor.element_size() if tensor.numel() else start


def _is_copy(trace: Trace, tensor: Tensor) -> bool:
    """Whether a tensor has the values of one of a batch, as far as they are kept, on any device and in any dtype."""
    if tensor.shape != trace.shape or (kept := trace.values()) is None:
        return False
    values = _some_of(tensor)
    return bool(torch.equal(kept.to(values.device, values.dtype), values))
