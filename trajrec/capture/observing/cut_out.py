"""Loops without a loader: batches that are cut out of a tensor, known by what they are equal to.

    rows      what the model is called on has rows of a tensor or an array that is at hand (`observing.rows`)
    windows   it was stacked of windows of a long one (`observing.windows`)

Rows are looked for only where no loader's batch is known in what the model is called on, and before the first step or
where the training is known to be of rows. So a loop with a loader has none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from trajrec.capture.attribution import refusals
from trajrec.capture.attribution.batches import Source
from trajrec.capture.observing.at_hand import arrays_in_sight, is_of_script, tensors_alive
from trajrec.capture.observing.lasting import lasts
from trajrec.capture.observing.rows import Rows, could_be
from trajrec.capture.observing.windows import Windows, windows_of
from trajrec.records import IntArray

_MOST_SEARCHES = 32


class Cut(NamedTuple):
    """A batch that was cut out: of which source, and the ids [B]."""

    source: Source
    ids: IntArray


class Described(NamedTuple):
    """A source in words, with N, how many samples it has; and what an id is."""

    words: str
    samples: int
    ids: str


class CutOut:
    """The tensors that batches are cut out of.

    Args:
        new_source: makes a source of a name.

    Attributes:
        wants_windows: whether stacked batches are still of interest.
    """

    def __init__(self, new_source: Callable[[str], Source]) -> None:
        self.wants_windows = True
        self._new_source = new_source
        self._rows: list[tuple[Source, Rows]] = []
        self._windows: dict[Any, tuple[Source, ref[Any] | None]] = {}
        self._described: dict[int, Described] = {}
        self._used: dict[int, int] = {}  # samples of steps, by the source's data set
        self._searches = 0
        self._whole: tuple[ref[Tensor], int, Cut] | None = None  # called on before, as it was then
        self._last: Windows | None = None

    def described(self, dataset: int | None) -> Described | None:
        """What a data set is, if batches are cut out of it."""
        return None if dataset is None else self._described.get(dataset)

    def serial(self, source: Source) -> int:
        """The epoch, from 1: as many as all samples together fit into what was used."""
        return 1 + self._used.get(source.dataset, 0) // max(1, self._described[source.dataset].samples)

    def note(self, source: Source, count: int) -> None:
        """A step was made of so many samples of this source."""
        self._used[source.dataset] = self._used.get(source.dataset, 0) + count

    # ---- rows

    def find(self, given: Sequence[Tensor], may_search: bool) -> Cut | str:
        """The rows that the model is called on, or why they cannot be told.

        Args:
            given: what it is called on.
            may_search: whether to look at all that is at hand, and not only at tensors that were found before.
        """
        self._last = None
        first = next(iter(given), None)
        if first is None or type(first) is not Tensor or not first.dim() or first.is_meta or first.is_quantized:
            return ""
        with torch.no_grad():
            return self._find(first, may_search)

    def _find(self, first: Tensor, may_search: bool) -> Cut | str:
        if self._whole is not None and self._whole[0]() is first and self._whole[1] == _version(first):
            return self._whole[2]
        if first.layout is not torch.strided:
            return self._whole_of(first, may_search)
        given = first[None] if first.dim() == 1 else first  # one sample without a dimension for the batch
        if not given.numel():
            return ""
        whys = []
        for source, rows in self._rows:
            if rows.fits(given):
                if not rows.is_alive:
                    self._look_again(rows, given)
                found = rows.ids_of(given)
                if not isinstance(found, str):
                    return self._kept(first, Cut(source, found))
                whys.append(found)
        if may_search and self._searches < _MOST_SEARCHES:
            self._searches += 1
            cut = self._search(given, first)
            if isinstance(cut, Cut):
                return self._kept(first, cut)
            whys.append(cut)
        return refusals.rows_unknown(whys)

    def _whole_of(self, first: Tensor, may_search: bool) -> Cut | str:
        """All rows of a sparse tensor that lasts, whose single rows are not looked for."""
        if self._whole is not None and self._whole[0]() is first:
            return refusals.rows_unknown(["changed"])
        if not may_search or not lasts(first, sys._getframe(1)):
            return ""
        source = self._new_source("Tensor")
        words = f"sparse tensor {[*first.shape]} of {str(first.dtype).removeprefix('torch.')}"
        self._described[source.dataset] = Described(words, len(first), "rows")
        return self._kept(first, Cut(source, np.arange(len(first))))

    def _look_again(self, rows: Rows, given: Tensor) -> None:
        """The data are gone: they may have been a copy of what the loop cuts its batches out of."""
        at_hand: list[Any] = [*tensors_alive(), *arrays_in_sight()] if self._searches < _MOST_SEARCHES else []
        self._searches += 1
        for data in at_hand:
            is_like = data.ndim and len(data) == rows.count and data is not given and could_be(data, given)
            if is_like and rows.stands_for(data):
                return

    def _kept(self, given: Tensor, cut: Cut) -> Cut:
        if len(cut.ids) == self._described[cut.source.dataset].samples and not given.is_inference():
            self._whole = ref(given), _version(given), cut
        return cut

    def _search(self, given: Tensor, first: Tensor) -> Cut | str:
        """Looks for the tensor or array that the model is called on rows of; of several, the smallest and oldest."""
        at_hand: list[Any] = [*tensors_alive(), *arrays_in_sight()]
        everyone = [data for data in at_hand if data.ndim and data.nbytes]
        longer = [data for data in everyone if len(data) > len(given)]
        whole = [data for data in everyone if len(data) == len(given) and data.ndim == first.dim() > 1]
        if whole and any(could_be(data, given[None]) for data in longer if data.ndim == given.dim() + 1):
            whole = []  # one item of those, or a batch of items that was made before: who knows
        fitting, whys = [], ["strange"]
        for data in (*sorted(longer, key=len), *whole):
            is_plain = given[0].numel() > 1 or given.is_floating_point() or data is first
            way = could_be(data, given) if is_plain else None
            if way is not None and lasts(data, sys._getframe(1)):
                rows = Rows(data, way, given)
                found = rows.ids_of(given)
                if isinstance(found, str):
                    whys.append(found)
                else:
                    fitting.append((rows, found, data))
        if not fitting or "twins" in whys:
            return next((why for why in whys if why != "strange"), "strange")
        rows, ids, data = fitting[0]
        source = self._new_source("Tensor" if isinstance(data, Tensor) else "ndarray")
        self._rows.append((source, rows))
        self._described[source.dataset] = Described(f"{rows.words}{rows.way.name}", rows.count, "rows")
        return Cut(source, ids)

    # ---- windows

    def stacked(self, pieces: Any, frame: FrameType) -> Cut | None:
        """What was stacked in this frame, if it is windows of a tensor."""
        if not is_of_script(frame):
            return None
        with torch.no_grad():
            windows = windows_of(pieces, frame)
        if windows is None:
            return None
        before, self._last = self._last, windows
        if before is not None and _is_shifted(before, windows):
            self._last = None
            return None  # what is to be predicted of them
        return Cut(self._source_of(windows), windows.starts)

    def _source_of(self, windows: Windows) -> Source:
        known = self._windows.get((windows.key, windows.length))
        if known is not None and (known[1] is None or known[1]() is not None):
            return known[0]
        source = self._new_source(type(windows.data).__name__)
        mark = None if isinstance(windows.data, np.memmap) else ref(windows.data)
        self._windows[windows.key, windows.length] = source, mark
        self._described[source.dataset] = Described(windows.words, windows.samples, "starts of windows")
        return source


def _is_shifted(before: Windows, windows: Windows) -> bool:
    """Whether windows are those before them, moved on by less than their length."""
    if before.key != windows.key or len(before.starts) != len(windows.starts):
        return False
    shifts = {*(windows.starts - before.starts).tolist()}
    return len(shifts) == 1 and 0 < shifts.pop() <= windows.length


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
