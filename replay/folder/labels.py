"""What a data set says about its samples: label, name, and whether the label is known to be wrong.

    labels, names, noisy    attributes, one entry a sample (a list, an array, a tensor)
    info(i)                 a method: a dict with any of the keys label, name, noisy
    classes                 names of the classes, by number

An attribute comes before `info`; without either, the label is that of the sample's batch. A `torch.utils.data.Subset`
is looked through. Nothing here is needed for a number: what cannot be read is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Subset

from trajrec.records import IntArray, Json
from trajrec.replay.losses.batches import Samples

ATTRIBUTES = {"label": "labels", "name": "names", "noisy": "noisy"}


def facts(samples: Samples, ids: IntArray) -> dict[str, list[Any]]:
    """Columns label (int or str), name (str) and noisy (bool) of these samples, as far as they are known."""
    dataset, inner = _unwrapped(samples.dataset, ids)
    info = _info(dataset, inner)
    found: dict[str, list[Any]] = {}
    for column, attribute in ATTRIBUTES.items():
        values = _attribute(dataset, attribute, inner)
        if values is None:
            values = [entry.get(column) for entry in info]
        if any(value is not None for value in values):
            found[column] = _of_one_kind(column, [_plain(value) for value in values])
    if "label" not in found and (labels := samples.labels(ids)) is not None:
        found = {"label": labels} | found
    return found


def classes(samples: Samples) -> list[str] | None:
    """Names of the classes by number, if the data set has the attribute `classes`."""
    dataset, _ = _unwrapped(samples.dataset, np.arange(0))
    names = getattr(dataset, "classes", None)
    return [str(name) for name in names] if isinstance(names, list | tuple) else None


def in_words(predictions: Sequence[int], given: list[Any] | None, labels: list[Any] | None) -> list[Any]:
    """Predicted class numbers in the words of the labels, None where no label says what a number is called.

    Args:
        predictions: [M] class numbers.
        given: [M] class numbers of the batches.
        labels: [M] labels as reports show them.
    """
    if labels is None or given is None or not any(isinstance(label, str) for label in labels):
        return list(predictions)
    words = dict(zip(given, labels, strict=True))
    return [words.get(number) for number in predictions]


def _unwrapped(dataset: Any, ids: IntArray) -> tuple[Any, IntArray]:
    while isinstance(dataset, Subset):
        ids, dataset = np.asarray(dataset.indices, dtype=np.int64)[ids], dataset.dataset
    return dataset, ids


def _attribute(dataset: Any, name: str, ids: IntArray) -> list[Any] | None:
    values: Any = getattr(dataset, name, ())
    try:
        return [values[i] for i in ids.tolist()] if len(values) == len(dataset) else None
    except (TypeError, KeyError, IndexError):  # something else of the same name
        return None


def _info(dataset: Any, ids: IntArray) -> list[Json]:
    info: Callable[[int], Any] | None = getattr(dataset, "info", None)
    if not callable(info):
        return []
    try:
        entries = [info(i) for i in ids.tolist()]
    except TypeError:  # a method of the same name that is about something else
        return []
    return entries if all(isinstance(entry, dict) for entry in entries) else []


def _of_one_kind(column: str, values: list[Any]) -> list[Any]:
    kind: Callable[[Any], Any] = bool if column == "noisy" else str
    if column == "label" and all(value is None or isinstance(value, int) for value in values):
        kind = int
    return [None if value is None else kind(value) for value in values]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
