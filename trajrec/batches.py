"""The samples of a step: the batches that the loop received, how they were used, and what they are together.

Letters: A micro-batches and B samples in a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any
from weakref import ref

import numpy as np
from torch import Tensor

from trajrec.contents import Contents
from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.records import FloatArray, IntArray

States = tuple[Tensor, ...]


@dataclass(slots=True)
class MicroBatch:
    """A batch that the loop received from a loader, or whose samples the user has named, and how it was used.

    Attributes:
        ids: [B]; None if they cannot be told.
        loader: where it came from; None if the user named it.
        weights: [B] the c that the user has given, or None.
        contents: a copy of the batch, where it is kept, or why there can be none.
        digest: checksum of the whole content, made until the first step.
        sketch: checksum of a sample of the content, or None.
        used_in_training_mode: None if no forward pass with gradients was seen.
        evaluated: a forward pass without gradients was seen.
        passes: sizes of what went into the model's forward passes with gradients, and generator states before them.
        spent: how many of the passes were made before the last backward pass.
        serial: of the pass over a loader that it came from.
        seeded_pass: the epoch that seeded data were told when the batch was handed out; None for other data.
        content: the batch as the loader yielded it, until it is let go of.
        tensors: of that batch, not kept alive, from then on.
        is_fed: a forward pass with gradients was called on one of them.
    """

    ids: IntArray | None
    loader: Any = None
    weights: FloatArray | None = None
    contents: Contents | RecordingError | None = None
    digest: int | None = None
    sketch: int | None = None
    used_in_training_mode: bool | None = None
    evaluated: bool = False
    passes: list[tuple[int, States]] = field(default_factory=list)
    spent: int = 0
    serial: int = 0
    seeded_pass: int | None = None
    content: Any = None
    tensors: Sequence[ref[Tensor]] = ()
    is_fed: bool = False

    def let_go(self) -> None:
        """Keeps the batch's tensors alive no longer: another one was drawn, and this one may wait for long."""
        if self.content is not None:
            self.tensors, self.content = references(self.content), None

    def holds(self, inputs: tuple[Any, ...]) -> bool:
        """Whether one of these tensors, or what it is a view of, is in the batch."""
        places = {tensor.untyped_storage().data_ptr() for tensor in self.alive()} - {0}
        return any(tensor.untyped_storage().data_ptr() in places for tensor in tensors_in(inputs))

    def alive(self) -> list[Tensor]:
        """The tensors of the batch that the loop still has."""
        if self.content is not None:
            return list(tensors_in(self.content))
        return [tensor for reference in self.tensors if (tensor := reference()) is not None]

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
    if ids.dtype.kind not in "iu":
        return None
    return ids.astype(np.int64, copy=False).reshape(-1)


def samples_in(inputs: tuple[Any, ...]) -> int:
    """How many samples a forward pass is called on: the length of its first tensor; 0 if it has none."""
    tensor = inputs[0] if inputs else None
    if not isinstance(tensor, Tensor):
        tensor = next((v for v in (*inputs, *tensors_in(inputs)) if isinstance(v, Tensor)), None)
    return len(tensor) if tensor is not None and tensor.dim() else 0


def references(content: Any) -> list[ref[Tensor]]:
    """The tensors of a batch."""
    if type(content) in (list, tuple) and {*map(type, content)} == {Tensor}:
        return [*map(ref, content)]
    return [ref(tensor) for tensor in tensors_in(content)]


def tensors_in(content: Any) -> Iterator[Tensor]:
    """The tensors in lists, tuples and dictionaries, nested or not."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, list | tuple | Mapping):
        for value in content.values() if isinstance(content, Mapping) else content:
            yield from tensors_in(value)
