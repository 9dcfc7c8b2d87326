"""Which batches are summed: those with a sample that no step has used yet, and now and then another.

A checksum of what the loader yielded tells a replay that data have changed. Batches whose samples have all been summed
before can only be augmented anew: of those two steps in 32 are enough (two, because loops draw ahead).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from trajrec.capture.attribution.batches import as_ids
from trajrec.records import IntArray

EVERY = 32


class SampleSet:
    """Some of N samples, by their ids."""

    def __init__(self, samples: int) -> None:
        self._is_in = np.zeros(samples, dtype=bool)
        self._missing = self._uncounted = samples  # at least that many until it can be whole

    def holds(self, ids: IntArray) -> bool:
        """Whether all of these samples [B] are in it; not of ids that are none of the N."""
        try:
            return not self._missing or bool(self._is_in[ids].all())
        except IndexError:
            return False

    @property
    def is_whole(self) -> bool:
        """Whether all N are in it."""
        return not self._missing

    def add(self, ids: IntArray) -> None:
        """Takes in these samples [B], as far as they are of the N."""
        try:
            self._is_in[ids] = True
        except IndexError:
            return
        self._uncounted -= len(ids)
        if self._missing and self._uncounted <= 0:
            self._missing = self._uncounted = int(np.count_nonzero(~self._is_in))


class Sums:
    """Says which batches are to be summed.

    Args:
        samples: gives N, the number of training samples, once there was a step.
    """

    def __init__(self, samples: Callable[[], int]) -> None:
        self._samples = samples
        self._summed: SampleSet | None = None
        self._noted: list[Any] = []  # ids that are not in the set yet: one look at many is cheaper than many

    def wants(self, ids: Any, step: int, is_first: bool) -> bool:
        """Whether a batch for the coming step is to be summed, given its ids [B] as they were drawn.

        In the first epoch it always is: nearly all samples are new then, and to ask would cost more than to sum.
        """
        if is_first or step % EVERY < 2:
            return True
        summed = self._up_to_date()
        if summed is not None and summed.is_whole:
            return False
        known = as_ids(ids)
        return known is None or summed is None or not summed.holds(known)

    def note(self, ids: Any) -> None:
        """A step was made of these samples [B], and their batch was summed."""
        self._noted.append(ids)

    @property
    def is_whole(self) -> bool:
        """Whether all samples have been summed."""
        summed = self._up_to_date()
        return summed is not None and summed.is_whole

    def _up_to_date(self) -> SampleSet | None:
        if self._summed is None and self._noted:
            self._summed = SampleSet(self._samples())
        for ids in self._noted:
            known = as_ids(ids)
            if self._summed is not None and known is not None:
                self._summed.add(known)
        self._noted.clear()
        return self._summed
