"""Which parts of a batch the model is called with, and which are the labels.

    (x, y)              a pair is read without being told: model(x), labels y
    inputs="image"      a key of a dictionary, or the position in a tuple: model(batch["image"])
    inputs=[0, 2]       several positions: model(batch[0], batch[2])
    inputs=["ids", "mask"]                    several keys, by keyword: model(ids=..., mask=...)
    inputs={"ids": "input_ids"}               the same, under other keywords: model(input_ids=batch["ids"])
    labels="labels"     a key or a position

Where nobody tells what the labels of a dictionary are, those under one of `NAMES` are, if they are whole numbers, one a
sample: reports and targets by class ask for them. No loss is ever made of what was not told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils.data import default_convert

from trajrec.errors import TaskError

Key: TypeAlias = str | int
Inputs: TypeAlias = Key | Sequence[Key] | Mapping[Key, str]
NAMES = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True, slots=True)
class Reading:
    """How a batch is read; None for a pair (x, y), whose parts need no name.

    Raises:
        TaskError: a key is neither a name nor a position, or keys and positions are mixed.
    """

    inputs: Inputs | None = None
    labels: Key | None = None

    def __post_init__(self) -> None:
        for what, keys in (("inputs", _keys(self.inputs)), ("labels", _keys(self.labels))):
            if any(type(key) not in (str, int) for key in keys) or len({type(key) for key in keys}) > 1:
                raise TaskError(f"{what}= takes keys of a dictionary or positions in a tuple, not {keys!r}.")
        if self.inputs is not None and not _keys(self.inputs):
            raise TaskError("inputs= names no part of a batch. Leave it out where batches are pairs (x, y).")

    def call(self, model: nn.Module, batch: Any) -> Any:
        """What the model gives for a batch.

        Raises:
            TaskError: if the batch has no such parts.
        """
        told = self.inputs
        if told is None or isinstance(told, str | int):
            return model(_part(batch, 0 if told is None else told, "inputs", told is not None))
        if isinstance(told, Mapping):
            return model(**{word: _part(batch, key, "inputs") for key, word in told.items()})
        if isinstance(told[0], str):
            return model(**{str(key): _part(batch, key, "inputs") for key in told})
        return model(*(_part(batch, key, "inputs") for key in told))

    def labels_in(self, batch: Any) -> Any:
        """The labels of a batch.

        Raises:
            TaskError: if the batch has no such part.
        """
        return _part(batch, 1 if self.labels is None else self.labels, "labels", self.labels is not None)

    def classes_in(self, batch: Any) -> Tensor | None:
        """The labels [B] of a batch where they are whole numbers, one a sample; else None.

        Raises:
            TaskError: if they were told and the batch has no such part.
        """
        if self.labels is not None:
            return _classes(self.labels_in(batch))
        if is_pair(batch):
            return _classes(batch[1])
        named = (batch[name] for name in NAMES if name in batch) if isinstance(batch, Mapping) else ()
        return next((found for part in named if (found := _classes(part)) is not None), None)


def unbatched(items: list[Any]) -> Any:
    """The one item of a list, as a loader with batch_size=None hands it out: `Task(collate=trajrec.unbatched)`.

    The model then gets what it got in the training: single samples, or whole batches that the data set makes.

    Raises:
        RuntimeError: if there are more items, which make no batch together; replay then takes them one by one.
    """
    if len(items) != 1:
        raise RuntimeError(f"a loader with batch_size=None makes no batch of {len(items)} items")
    item: Any = default_convert(items[0])  # type: ignore[no-untyped-call]
    return item


def is_pair(batch: Any) -> bool:
    """Whether a batch needs no telling what is what."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def scores_in(outputs: Any) -> Any:
    """The scores in what a model returned: itself, or its `logits`, or the only part of a tuple."""
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return outputs["logits"]
    if isinstance(logits := getattr(outputs, "logits", None), Tensor):
        return logits
    if isinstance(outputs, tuple | list) and len(outputs) == 1:
        return outputs[0]
    return outputs


def found_in(value: Any, deep: bool = True) -> str:
    """What a batch is, in words: its keys or positions, and the shapes behind them."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if deep and isinstance(value, Mapping):
        parts = ", ".join(f"{key!r}: {found_in(part, False)}" for key, part in list(value.items())[:12])
        return f"a dictionary with {parts or 'nothing in it'}"
    if deep and isinstance(value, tuple | list):
        parts = ", ".join(f"{place}: {found_in(part, False)}" for place, part in enumerate(value[:12]))
        return f"a {type(value).__name__} of {len(value)} ({parts})" if parts else f"an empty {type(value).__name__}"
    return type(value).__name__


def _keys(told: Any) -> tuple[Any, ...]:
    if told is None:
        return ()
    return tuple(told) if isinstance(told, Mapping | list | tuple) else (told,)


def _part(batch: Any, key: Key, what: str, told: bool = True) -> Any:
    """The part of a batch under a key, which was told, or goes without saying where a batch is a pair."""
    if not told and not is_pair(batch):
        raise TaskError(
            f"Task.supervised reads batches that are pairs (inputs, labels); this one is {found_in(batch)}. "
            'Say what is what: inputs="KEY" (or a list of keys) and labels="KEY", or positions in a tuple.'
        )
    if isinstance(batch, Tensor) or not hasattr(batch, "__getitem__"):
        raise TaskError(f"{what}={key!r} names a part of a batch, but a batch is {found_in(batch)}.")
    try:
        return batch[key]
    except (KeyError, IndexError, TypeError):
        raise TaskError(f"{what}={key!r} is no part of a batch, which is {found_in(batch)}.") from None


def _classes(labels: Any) -> Tensor | None:
    if not isinstance(labels, Tensor) or labels.dtype.is_floating_point or labels.dtype.is_complex:
        return None
    return labels.reshape(-1) if labels.dim() < 2 else None
