"""The samples of a step: batches that loaders have handed out, how they were used, and what they are together.

Letters: A micro-batches and B samples in a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trajrec.errors import RecordingError, UnknownBatchError
from trajrec.records import FloatArray, IntArray

if TYPE_CHECKING:
    from trajrec.inputs import Contents

States = tuple[Any, ...]
"""Of random generators: vectors of bytes."""


class Source(NamedTuple):
    """Where batches come from: a loader, most often.

    Attributes:
        loader: its number.
        dataset: the number of its data set.
        name: the class of the data set.
        is_iterable: whether the data set is one without ids.
        in_order: whether it hands out batches in the order in which they were drawn.
        is_indexed: whether it is no loader, but a tensor that the loop cuts its batches out of: what the model is
            called on has to be seen to be of it.
    """

    loader: int
    dataset: int
    name: str = ""
    is_iterable: bool = False
    in_order: bool = True
    is_indexed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """A batch as the loop received it from a loader.

    Attributes:
        number: how many were drawn before it, and itself.
        source: the loader.
        ids: [B]; None if they cannot be told.
        serial: number of the pass over the loader.
        thread: that received it.
        seeded_pass: the epoch that seeded data were told when the batch was handed out; None for other data.
        digest: checksum of a sample of the content, or None.
        checksum: of the whole content, made until the first step; or None.
        contents: a copy of the content, where it is kept, or why there can be none.
    """

    number: int
    source: Source
    ids: IntArray | None
    serial: int = 0
    thread: int = 0
    seeded_pass: int | None = None
    digest: int | None = None
    checksum: int | None = None
    contents: Contents | RecordingError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Samples of a step that came together: from a loader, or named by the user.

    Attributes:
        ids: [B].
        passes: sizes of what went into the forward passes that led to the step, and generator states before them.
        weights: [B] the c that the user has given, or None.
        digest: checksum of a sample of the batch, or None.
        checksum: of the whole batch, or None.
        contents: a copy of the batch, where it is kept, or why there can be none.
    """

    ids: IntArray
    passes: tuple[tuple[int, States], ...] = ()
    weights: FloatArray | None = None
    digest: int | None = None
    checksum: int | None = None
    contents: Contents | RecordingError | None = None

    def cut(self) -> list[tuple[int, States | None]]:
        """Sizes and generator states of the pieces that went through the model one by one; most often only one."""
        if len(self.passes) > 1 and sum(size for size, _ in self.passes) == len(self.ids):
            return list(self.passes)
        return [(len(self.ids), self.passes[0][1] if self.passes else None)]

    def cut_contents(self) -> list[Contents]:
        """The copies of these pieces; none where there is no copy.

        Raises:
            RecordingError: if the batch could not be copied.
        """
        if self.contents is None:
            return []
        if isinstance(self.contents, RecordingError):
            raise self.contents
        sizes = [size for size, _ in self.cut()]
        if len(sizes) == 1:
            return [self.contents]
        edges = [0, *accumulate(sizes)]
        return [self.contents.rows(slice(a, b), len(self.ids)) for a, b in pairwise(edges)]


class StepBatch(NamedTuple):
    """The samples of one step, from one or more micro-batches.

    Attributes:
        ids: [B].
        weights: [B] the c that the user has given, or None.
        losses: what backward was called on; those on another device stay there until they are read.
        parts: [A] sizes of the micro-batches.
        rng: [A] generator states at the start of their forward passes; None if there was none.
        digests: [A] CRC-32 of the batches as the loader made them, -1 where it was not made; None if none was.
        contents: [A] copies of the micro-batches; none where they are not kept, or no loader made them.
        checksum: CRC-32 of the whole batch as the loader made it; None after the first step, or where no loader did.
        drawn: the batches of loaders that it is made of; none where the user has named the samples.
    """

    ids: IntArray
    weights: FloatArray | None = None
    losses: tuple[Any, ...] = ()
    parts: tuple[int, ...] = ()
    rng: tuple[States, ...] | None = None
    digests: tuple[int, ...] | None = None
    contents: tuple[Contents, ...] = ()
    checksum: int | None = None
    drawn: tuple[Batch, ...] = ()

    @property
    def loss(self) -> float:
        """The loss as the loop computed it (sum over backward passes); NaN if there was none."""
        if len(self.losses) == 1 and type(self.losses[0]) is float:
            return self.losses[0]
        return float(sum(map(float, self.losses))) if self.losses else float("nan")


def joined(
    parts: Sequence[Part], losses: tuple[Any, ...], drawn: tuple[Batch, ...] = (), loose: States | None = None
) -> StepBatch:
    """The step that these parts made.

    Args:
        parts: samples.
        losses: of its backward passes.
        drawn: the batches that the parts are of.
        loose: generator states of a pass that belongs to no part.

    Raises:
        UnknownBatchError: if only some parts have weights.
        RecordingError: if a batch could not be copied.
    """
    pieces = [piece for part in parts for piece in part.cut()]
    states = [state or pieces[0][1] or loose for _, state in pieces]
    known = tuple([state for state in states if state])
    digests = [-1 if part.digest is None else part.digest for part in parts]
    contents = [piece for part in parts for piece in part.cut_contents()]
    return StepBatch(
        parts[0].ids if len(parts) == 1 else np.concatenate([part.ids for part in parts]),
        _given_weights(parts),
        losses,
        tuple([size for size, _ in pieces]),
        known if len(known) == len(pieces) else None,
        tuple(digests) if len(digests) == len(pieces) and max(digests) >= 0 else None,
        tuple(contents) if len(contents) == len(pieces) else (),
        parts[0].checksum if len(parts) == 1 else None,
        drawn,
    )


def _given_weights(parts: Sequence[Part]) -> FloatArray | None:
    """The weights [B] that the user gave.

    Raises:
        UnknownBatchError: if only some micro-batches have them.
    """
    weights = [part.weights for part in parts if part.weights is not None]
    if weights and len(weights) < len(parts):
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
