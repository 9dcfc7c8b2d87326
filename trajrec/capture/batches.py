"""The samples of a step: the batches that the loop received, how they were used, and what they are together.

Letters: A micro-batches and B samples in a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.inputs import Contents
from trajrec.records import FloatArray, IntArray

States = tuple[Tensor, ...]


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


@dataclass(slots=True, eq=False)
class MicroBatch:
    """A batch that the loop received from a loader, or whose samples the user has named, and how it was used.

    Attributes:
        ids: [B]; None if they cannot be told.
        loader: where it came from; None if the user named it.
        weights: [B] the c that the user has given, or None.
        contents: a copy of the batch, where it is kept, or why there can be none.
        digest: checksum of the whole content, made until the first step.
        sketch: checksum of a sample of the content, or None.
        evaluated: a forward pass without gradients was seen.
        is_used: a forward pass with gradients was seen.
        is_known: the inputs of one of these were seen to be its tensors, or copies of them.
        passes: sizes of what went into the forward passes that led to the step, and generator states before them.
        serial: of the pass over a loader that it came from.
        about: that pass.
        number: how many batches were drawn before it.
        thread: that drew it.
        seeded_pass: the epoch that seeded data were told when the batch was handed out; None for other data.
        content: the batch as the loop received it, until it is let go of.
        traces: of its tensors, from then on.
    """

    ids: IntArray | None
    loader: Any = None
    weights: FloatArray | None = None
    contents: Contents | RecordingError | None = None
    digest: int | None = None
    sketch: int | None = None
    evaluated: bool = False
    is_used: bool = False
    is_known: bool = False
    passes: list[tuple[int, States]] = field(default_factory=list)
    serial: int = 0
    about: Any = None
    number: int = 0
    thread: int = 0
    seeded_pass: int | None = None
    content: Any = None
    traces: Sequence[Trace] = ()

    def let_go(self) -> None:
        """Keeps the batch's tensors alive no longer: another one was drawn, and this one may wait for long."""
        if self.content is not None:
            self.traces, self.content = traces_of(self.content, keeps=True), None

    def traces_now(self) -> Sequence[Trace]:
        """Traces of the tensors of the batch."""
        return self.traces if self.content is None else traces_of(self.content)

    def cut(self) -> list[tuple[int, States | None]]:
        """Sizes and generator states of the pieces that went through the model one by one; most often only one."""
        assert self.ids is not None
        sizes = [size for size, _ in self.passes]
        if len(sizes) > 1 and sum(sizes) == len(self.ids):
            return list(self.passes)
        return [(len(self.ids), self.passes[0][1] if self.passes else None)]

    def cut_contents(self) -> list[Contents]:
        """The copies of these pieces; none where there is no copy.

        Raises:
            RecordingError: if the batch could not be copied.
        """
        if self.contents is None or self.ids is None:
            return []
        if isinstance(self.contents, RecordingError):
            raise self.contents
        sizes = [size for size, _ in self.cut()]
        if len(sizes) == 1:
            return [self.contents]
        edges = [0, *accumulate(sizes)]
        return [self.contents.rows(slice(a, b), len(self.ids)) for a, b in pairwise(edges)]


@dataclass(slots=True)
class StepBatch:
    """The samples of one step, from one or more micro-batches.

    Attributes:
        ids: [B].
        weights: [B] the c that the user has given, or None.
        losses: what backward was called on; those on another device stay there until they are read.
        parts: [A] sizes of the micro-batches.
        rng: [A] generator states at the start of their forward passes; None if there was none.
        sketches: [A] CRC-32 of the batches as the loader made them, -1 where it was not made; None if none was.
        contents: [A] copies of the micro-batches; none where they are not kept, or no loader made them.
        digest: CRC-32 of the whole batch as the loader made it; None after the first step, or where no loader did.
    """

    ids: IntArray
    weights: FloatArray | None
    losses: list[Tensor | float]
    parts: tuple[int, ...] = ()
    rng: tuple[States, ...] | None = None
    sketches: tuple[int, ...] | None = None
    contents: tuple[Contents, ...] = ()
    digest: int | None = None

    @property
    def loss(self) -> float:
        """The loss as the loop computed it (sum over backward passes); NaN if there was none."""
        if len(self.losses) == 1 and type(self.losses[0]) is float:
            return self.losses[0]
        return float(sum(map(float, self.losses))) if self.losses else float("nan")


def step_of(batches: Sequence[MicroBatch], losses: list[Tensor | float], loose: States | None) -> StepBatch:
    """The step that these micro-batches made; `loose` are generator states of a pass that belongs to none of them."""
    if len(batches) == 1 and len(batches[0].passes) == 1:
        return alone(batches[0], losses)
    return _joined(batches, losses, loose)


def _joined(batches: Sequence[MicroBatch], losses: list[Tensor | float], loose: States | None) -> StepBatch:
    ids = [batch.ids for batch in batches if batch.ids is not None]
    pieces = [piece for batch in batches for piece in batch.cut()]
    states = [state or pieces[0][1] or loose for _, state in pieces]
    known = [state for state in states if state is not None]
    sketches = [-1 if batch.sketch is None else batch.sketch for batch in batches]
    contents = [part for batch in batches for part in batch.cut_contents()]
    return StepBatch(
        ids[0] if len(ids) == 1 else np.concatenate(ids),
        _given_weights(batches),
        losses,
        tuple([size for size, _ in pieces]),
        tuple(known) if len(known) == len(pieces) else None,
        tuple(sketches) if len(sketches) == len(pieces) and max(sketches) >= 0 else None,
        tuple(contents) if len(contents) == len(pieces) else (),
        batches[0].digest if len(batches) == 1 else None,
    )


def alone(batch: MicroBatch, losses: list[Tensor | float]) -> StepBatch:
    """`_joined` of one batch that went through the model once, as most do: every step pays for this."""
    assert batch.ids is not None
    return StepBatch(
        batch.ids,
        batch.weights,
        losses,
        (len(batch.ids),),
        (batch.passes[0][1],),
        None if batch.sketch is None else (batch.sketch,),
        () if batch.contents is None else tuple(batch.cut_contents()),
        batch.digest,
    )


def _given_weights(batches: Sequence[MicroBatch]) -> FloatArray | None:
    """The weights [B] that the user gave.

    Raises:
        UnknownBatchError: if only some micro-batches have them.
    """
    weights = [batch.weights for batch in batches if batch.weights is not None]
    if weights and len(weights) < len(batches):
        raise UnknownBatchError("trajrec.set_batch got weights for some micro-batches of a step and none for others.")
    return np.concatenate(weights) if weights else None


def as_ids(drawn: Any) -> IntArray | None:
    """What a sampler drew as [B] int64, or None if it is not integers."""
    if type(drawn) is list and drawn:
        try:
            return np.frombuffer(array("q", drawn), np.int64)  # several times faster than to find out the dtype
        except (TypeError, OverflowError):
            pass
    try:
        ids = np.asarray(drawn)
    except (TypeError, ValueError):
        return None
    if ids.dtype.kind not in "iu" or ids.ndim > 1:
        return None
    return ids.astype(np.int64).reshape(-1)


def samples_in(inputs: tuple[Any, ...]) -> int:
    """How many samples a forward pass is called on: the length of its first tensor; 0 if it has none."""
    tensor = inputs[0] if inputs else None
    if not isinstance(tensor, Tensor):
        tensor = next((v for v in (*inputs, *tensors_in(inputs)) if isinstance(v, Tensor)), None)
    return len(tensor) if tensor is not None and tensor.dim() else 0


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


# ---- which batch a forward pass was called on

_COMPARED = 512


@dataclass(frozen=True, slots=True)
class Trace:
    """What is kept of a tensor of a batch, so that it, a view of it or a copy is known again.

    Attributes:
        tensor: not kept alive.
        shape: of the tensor.
        kept: some of its values, where the tensor may be gone by the time they are asked for.
    """

    tensor: ref[Tensor]
    shape: torch.Size
    kept: Tensor | None

    def values(self) -> Tensor | None:
        """Some of its values, at `_places`; None where it is gone."""
        own = self.tensor()
        return self.kept if self.kept is not None or own is None else _some_of(own)


def traces_of(content: Any, keeps: bool = False) -> list[Trace]:
    """Traces of the tensors in a batch; with `keeps` they outlive the tensors."""
    found = [tensor for tensor in tensors_in(content) if _has_memory(tensor)]
    return [Trace(ref(tensor), tensor.shape, _some_of(tensor) if keeps else None) for tensor in found]


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


def holders_of(candidates: Sequence[Sequence[Trace]], inputs: Any, copies: bool = True) -> list[int]:
    """Which of several batches these inputs are taken from; several where they fit equally well.

    They are of the batch whose tensors they are, or are views of; or else, if `copies`, of the one that they have the
    values of.
    """
    given = [tensor for tensor in tensors_in(inputs) if _has_memory(tensor)]
    for fits in (_is_part, _is_copy) if copies else (_is_part,):
        counts = [sum(any(fits(trace, tensor) for trace in traces) for tensor in given) for traces in candidates]
        most = max(counts, default=0)
        if most:
            return [place for place, count in enumerate(counts) if count == most]
    return []


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
