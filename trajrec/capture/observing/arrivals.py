"""Ids for samples that have none: of a stream, in the order in which the loop received them."""

from __future__ import annotations

from typing import Any

import numpy as np

from trajrec.capture.attribution.batches import Source
from trajrec.capture.observing.traces import tensors_of
from trajrec.records import IntArray


class Arrivals:
    """Counts the samples of loaders whose ids cannot be told. A second pass over a stream brings new ones."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}  # by data set

    def number(self, source: Source, content: Any) -> IntArray | None:
        """Ids [B] for a batch that has just arrived; None if it has no tensor to count samples by."""
        first = next(iter(tensors_of(content)), None)
        if first is None:
            return None
        start, count = self._counts.get(source.dataset, 0), len(first) if first.dim() else 1
        self._counts[source.dataset] = start + count
        return np.arange(start, start + count)

    def counts(self, dataset: int | None) -> bool:
        """Whether the samples of this data set are numbered so."""
        return dataset in self._counts
