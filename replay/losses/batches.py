"""Samples of a data set as batches on the replay's device.

Replay visits every sample many times. Where items are tensors and numbers of one shape and torch's default collation
makes the batches, the data set is collated once and batches are rows of it: the same values, without Python calls for
each item. Everything else (custom collation, items of several shapes, data sets larger than `limit`) goes item by item.
Where the recording holds the inputs of its steps, those are taken, and the data set is not asked.

Items of several shapes (images of different sizes one at a time, buckets of lengths) make no batch together. Those of a
recorded micro-batch did; elsewhere (`batches`) a run of ids is cut until its pieces do.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.data import default_collate

from trajrec.digest import sampled_digest
from trajrec.errors import DataMismatchError, first_line
from trajrec.records import IntArray
from trajrec.replay.step import Part, Step
from trajrec.task.reading import Reading
from trajrec.task.seeding import find_seeded
from trajrec.task.task import Batch, Collate

_BLOCK = 512
LIMIT = 2 << 30
_CHECK_EVERY = 16
_PAIRS = Reading()


class OtherInputs(Exception):  # noqa: N818
    """The inputs of step t are not those that the training loop received."""

    def __init__(self, t: int) -> None:
        super().__init__(t)
        self.t = t


class Samples:
    """Batches of a data set by sample ids.

    Args:
        dataset: map-style data set.
        collate: makes a batch of a list of items.
        dtype: floating tensors of a batch are cast to it.
        device: where batches go.
        first_pass: the pass over the data that the run's epoch 0 was, as `trajrec.seeded` counts.
        limit: bytes up to which the collated data set is held in memory.
        stored: the micro-batches of a step as the recording holds them; None where it does not.
        classes_in: the classes [B] of the samples of a batch (`Task.classes_in`).
    """

    def __init__(
        self,
        dataset: Any,
        collate: Collate,
        dtype: torch.dtype,
        device: torch.device,
        *,
        first_pass: int = 0,
        limit: int = LIMIT,
        stored: Callable[[int], list[Batch] | None] | None = None,
        classes_in: Callable[[Batch], Tensor | None] = _PAIRS.classes_in,
        collated_by: str = "",
    ) -> None:
        self.dataset = dataset
        self.collate = collate
        self.dtype = dtype
        self.device = device
        self.first_pass = first_pass
        self.checks_inputs = False
        self._stored = stored
        self._classes_in, self._collated_by = classes_in, collated_by
        self._last_stored: tuple[int, list[Batch] | None] = (0, None)
        self._seeded = find_seeded(dataset)
        self._stack: Batch | None = None
        self._is_raw = False
        self._may_stack = collate is default_collate and self._seeded is None
        self._limit = limit

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def raw(self, ids: IntArray) -> Batch:
        """The batch as the training loop received it: collated, neither moved nor cast."""
        return self.collate([self.dataset[i] for i in ids.tolist()])

    def batch(self, ids: IntArray) -> Batch:
        """The batch of these ids [B], on the device and in the replay's floating type."""
        if self._may_stack and self._stack is None:
            self._stack = self._collate_all()
            self._may_stack = self._stack is not None
            self._is_raw = self._stack is not None and self.device.type == "cpu" and self._keeps_types()
        if self._stack is not None:
            index = torch.as_tensor(ids, device=self.device)
            return tree_map(lambda values: values[index], self._stack)
        return self._place(self.raw(ids))

    def batches(self, ids: IntArray, most: int = _BLOCK) -> Iterator[tuple[IntArray, Batch]]:
        """Batches of at most so many of these ids, in their order, each with its ids; smaller where items differ."""
        for start in range(0, len(ids), most):
            yield from self._cut(ids[start : start + most])

    def _cut(self, ids: IntArray) -> Iterator[tuple[IntArray, Batch]]:
        try:
            whole = self.batch(ids)
        except RuntimeError:  # items of different shapes
            if len(ids) == 1:
                raise
            half = len(ids) // 2
            yield from self._cut(ids[:half])
            yield from self._cut(ids[half:])
            return
        yield ids, whole

    def part(self, step: Step, part: Part) -> Batch:
        """The batch of one micro-batch of a step.

        Raises:
            OtherInputs: if `checks_inputs` is set and the training loop received something else.
            DataMismatchError: if its samples make no batch together.
        """
        if part.batch is not None:
            return part.batch
        if (recorded := self._recorded(step.t)) is not None:
            return self._place(recorded[step.parts.index(part)], copy=True)
        ids = step.ids[part.span]
        self._tell_epoch(step)
        batch = self._recorded_batch(step.t, ids)
        if self.checks_inputs and part.digest is not None:
            self._check(step.t, ids, batch, part.digest)
        return batch

    def _recorded_batch(self, t: int, ids: IntArray) -> Batch:
        """The batch of samples that were one in the training."""
        try:
            return self.batch(ids)
        except RuntimeError as error:
            raise DataMismatchError(
                f"The samples of step {t} ({', '.join(map(str, ids[:5]))}{', ...' if len(ids) > 5 else ''}) were one "
                f"batch in the training, and the Task's collate cannot make one of them: {first_line(error)} "
                f"Give the Task the data set and the collate function that the run was trained with.{self._collated_by}"
            ) from error

    def _recorded(self, t: int) -> list[Batch] | None:
        """The recorded micro-batches of step t; a step is often asked for twice in a row."""
        if self._stored is not None and self._last_stored[0] != t:
            self._last_stored = t, self._stored(t)
        return self._last_stored[1]

    def raw_step(self, step: Step) -> Batch:
        """All samples of a step as one batch, as the training loop received it."""
        self._tell_epoch(step)
        return self.raw(step.ids)

    def _tell_epoch(self, step: Step) -> None:
        if self._seeded is not None:
            since = step.conditions.seeded_from
            self._seeded.set_epoch(step.epoch + (self.first_pass if since is None else since))

    def _check(self, t: int, ids: IntArray, batch: Batch, recorded: int) -> None:
        # Where batches are cast or moved, the loader's own is made anew, which is slow: at some steps only.
        if not self._is_raw and t % _CHECK_EVERY:
            return
        if sampled_digest(batch if self._is_raw else self.raw(ids)) != recorded:
            raise OtherInputs(t)

    def _place(self, batch: Batch, copy: bool = False) -> Batch:
        def place(value: Any) -> Any:
            if isinstance(value, UserDict):  # a tokenizer's batch is one, and no tree of torch's
                return type(value)({key: place(part) for key, part in value.items()})
            if not isinstance(value, Tensor):
                return value
            return value.to(self.device, self.dtype if value.is_floating_point() else None, copy=copy)

        return tree_map(place, batch)

    def _collate_all(self) -> Batch | None:
        """The whole data set as one batch, or None where it cannot be one."""
        try:
            first = self._place(self.raw(np.arange(min(2, len(self)))))
        except RuntimeError:  # items of different shapes
            return None
        leaves = tree_leaves(first)
        if not leaves or not all(isinstance(v, Tensor) and v.dim() and len(v) == min(2, len(self)) for v in leaves):
            return None
        if sum(v.nbytes for v in leaves) / min(2, len(self)) * len(self) > self._limit:
            return None
        blocks = []
        for start in range(0, len(self), _BLOCK):
            try:
                blocks.append(self._place(self.raw(np.arange(start, min(start + _BLOCK, len(self))))))
            except RuntimeError:  # items of different shapes
                return None
        return _concatenate(blocks)

    def _keeps_types(self) -> bool:
        """Whether nothing of a batch is cast."""
        return all(v.dtype == self.dtype for v in tree_leaves(self.raw(np.arange(1))) if v.is_floating_point())

    def labels(self, ids: IntArray) -> list[Any] | None:
        """The labels of these samples where their batches have whole numbers for labels [B]; else None.

        Raises:
            TaskError: if the Task says where labels are, and batches have no such part.
        """
        found: list[Any] = []
        for block, batch in self.batches(ids):
            label = self._classes_in(batch)
            if label is None or len(label) != len(block):
                return None
            found += label.tolist()
        return found

    def check_ids(self, largest: int, what: str) -> None:
        """Checks that the data set holds the sample with the largest id.

        Raises:
            DataMismatchError: if it is too short.
        """
        if largest >= len(self):
            raise DataMismatchError(
                f"The recording used {what} sample {largest}, but the task's {what} set has only {len(self)} samples. "
                "Give the Task the data set that the run was trained on."
            )


def _concatenate(blocks: list[Batch]) -> Batch:
    if len(blocks) == 1:
        return blocks[0]
    flat = [tree_flatten(block) for block in blocks]
    joined = [torch.cat(parts) for parts in zip(*(leaves for leaves, _ in flat), strict=True)]
    return tree_unflatten(joined, flat[0][1])
