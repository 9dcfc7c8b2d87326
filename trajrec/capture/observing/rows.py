"""Which rows of a tensor a batch is: found by their values, and compared before they are believed.

    data [N, ...]   a tensor or an array at hand. Every row gets a number of 64 bits, made of its values
    x [B, ...]      what the model is called on: its rows are looked up, and are of data where data[ids] equals x

So shuffling before the batches are cut, indices, slices, masks and copies to another device or dtype are all the same.
Rows that are there twice cannot be told by their values: only where the batch is a view of the data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import torch
from torch import Tensor

from trajrec.records import IntArray

MOST_BYTES = 4 << 30
_CHUNK = 1 << 21  # values that are looked at together
_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Way(NamedTuple):
    """What a loop may do to rows before the model is called on them."""

    name: str
    apply: Callable[[Tensor, torch.dtype], Tensor]


WAYS = (
    Way("", lambda rows, dtype: rows.to(dtype)),
    Way(" / 255", lambda rows, dtype: rows.to(dtype) / 255),
)


class Rows:
    """The rows of one tensor or array, as they were when it was first seen.

    Args:
        data: [N, ...].
        way: what is done to them before the model is called on them.
        like: what the model is called on: its dtype and shape.

    Attributes:
        count: N.
        words: the data in words, to be shown.
    """

    def __init__(self, data: Any, way: Way, like: Tensor) -> None:
        tensor = as_tensor(data)
        self.count = len(tensor)
        self.words = f"{'array' if isinstance(data, np.ndarray) else 'tensor'} {[*tensor.shape]} of {_name(tensor)}"
        self.way = way
        self._data = ref(data)
        self._dtype, self._shape = like.dtype, tuple(like.shape[1:])
        self._numbers = hashes = self._hashes(tensor)
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self.has_twins = bool((self._sorted[1:] == self._sorted[:-1]).any())

    def _hashes(self, tensor: Tensor) -> IntArray:
        step = max(1, _CHUNK // max(1, tensor[0].numel()))
        parts = [row_hashes(self._as_given(tensor[k : k + step])) for k in range(0, len(tensor), step)]
        return np.concatenate(parts)

    def _as_given(self, rows: Tensor) -> Tensor:
        return self.way.apply(rows, self._dtype).reshape(len(rows), *self._shape)

    @property
    def is_alive(self) -> bool:
        """Whether the data are still there."""
        return self._data() is not None

    def stands_for(self, data: Any) -> bool:
        """Whether another tensor holds the same rows in the same order; it is the data from now on, then."""
        tensor = as_tensor(data)
        if len(tensor) != self.count or not np.array_equal(self._hashes(tensor), self._numbers):
            return False
        self._data = ref(data)
        return True

    def fits(self, given: Tensor) -> bool:
        """Whether what the model is called on has the dtype and shape of these rows."""
        return given.dtype == self._dtype and tuple(given.shape[1:]) == self._shape

    def ids_of(self, given: Tensor) -> IntArray | str:
        """The ids [B] of the rows that the model is called on, or "strange", "twins" or "changed"."""
        data = self._data()
        tensor = None if data is None else as_tensor(data)
        if tensor is not None and (start := _place_in(tensor, given)) is not None:
            ids = np.arange(start, start + len(given))
            if self._are(ids, given):  # and are what they were when they got their numbers
                return ids
        hashes = row_hashes(given)
        first = np.searchsorted(self._sorted, hashes)
        if (first >= self.count).any() or (self._sorted[np.minimum(first, self.count - 1)] != hashes).any():
            return "strange"
        if (np.searchsorted(self._sorted, hashes, side="right") - first > 1).any():
            return "twins"
        ids = self._order[first]
        if tensor is None:  # made anew for every step: the same if all of it is
            return ids if np.array_equal(ids, np.arange(self.count)) else "changed"
        is_same = torch.equal(self._as_given(tensor[torch.from_numpy(ids).to(tensor.device)]).to(given.device), given)
        return ids if is_same else "changed"

    def _are(self, ids: IntArray, given: Tensor) -> bool:
        hashes = row_hashes(given)
        first = np.searchsorted(self._sorted, hashes, side="left")
        last = np.searchsorted(self._sorted, hashes, side="right")
        if not self.has_twins:
            return bool(((last - first) == 1).all() and (self._order[np.minimum(first, self.count - 1)] == ids).all())
        return all(i in self._order[a:b] for i, a, b in zip(ids, first, last, strict=True))


def as_tensor(data: Any) -> Tensor:
    """A tensor, or an array as one that shares its memory where it can."""
    if isinstance(data, Tensor):
        return data.detach()
    return torch.from_numpy(data if data.flags.writeable else np.array(data))


def could_be(data: Any, given: Tensor) -> Way | None:
    """What is done to the rows of data, if the first row of what the model is called on may be among them.

    Only two of its values are looked for: most of what is at hand is told apart by that.
    """
    shape = tuple(data.shape)
    if len(shape) < 1 or len(shape) < 2 <= given.dim() or len(given) > shape[0]:
        return None
    if int(np.prod(shape[1:])) != given[0].numel() or data.nbytes > MOST_BYTES:
        return None
    tensor, first = as_tensor(data), given[0].reshape(-1)
    places = sorted({0, first.numel() // 2, first.numel() - 1})
    flat = tensor.reshape(len(tensor), -1) if tensor.is_contiguous() else tensor.contiguous().reshape(len(tensor), -1)
    for way in WAYS if tensor.dtype == torch.uint8 and given.is_floating_point() else WAYS[:1]:
        found = way.apply(flat[:, places], given.dtype).to(given.device) == first[places]
        if bool(found.all(1).any()):
            return way
    return None


def row_hashes(rows: Tensor) -> IntArray:
    """A number of 64 bits for each row, made of its values bit by bit and of their places: [B]."""
    flat = rows.detach().reshape(len(rows), -1).contiguous()
    flat = torch.view_as_real(flat).reshape(len(rows), -1) if flat.is_complex() else flat
    words = flat.view(_WORDS[flat.element_size()]).to(torch.int64)
    places = torch.arange(1, words.shape[1] + 1, device=words.device) * 0x1E3779B97F4A7C15
    mixed = (words + places) * 0x3F58476D1CE4E5B9
    mixed = (mixed ^ (mixed >> 29)) * 0x14D049BB133111EB
    mixed = (mixed ^ (mixed >> 32)) * 0x2545F4914F6CDD1D
    found: IntArray = (mixed ^ (mixed >> 31)).sum(1).cpu().numpy()
    return found


def _place_in(data: Tensor, given: Tensor) -> int | None:
    """The row of data at which a view of its rows, one after the other, begins; None if it is no such view."""
    if given.dtype != data.dtype or given.device != data.device or given.stride() != data.stride() or not data.dim():
        return None
    if given.shape[1:] != data.shape[1:] or not data.stride(0):
        return None
    start, rest = divmod(given.data_ptr() - data.data_ptr(), data.stride(0) * data.element_size())
    return start if not rest and 0 <= start <= len(data) - len(given) else None


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
