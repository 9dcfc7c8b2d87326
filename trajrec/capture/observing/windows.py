"""Batches that are stacked of windows of one long tensor, as small language models are trained.

    x = torch.stack([data[i : i + T] for i in starts])

Their ids are the starts. Where the windows are views of the tensor, their places in memory say these; where they are
copies (of an array, or of another dtype), the integers at hand in the function that stacks do, once data[i : i + T]
equals the window for each of them.

Letters: B windows, T their length.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from trajrec.capture.observing.at_hand import is_strided, variables
from trajrec.records import IntArray


class Windows(NamedTuple):
    """Windows of a tensor or an array.

    Attributes:
        data: what they are of.
        starts: [B].
        length: T.
    """

    data: Any
    starts: IntArray
    length: int

    @property
    def key(self) -> tuple[Any, ...]:
        """Tells data apart: a file that is opened again for every batch stays the same."""
        data = self.data
        if isinstance(data, np.memmap):
            return "file", str(data.filename), data.offset, data.shape, data.dtype.str
        place = data.data_ptr() if isinstance(data, Tensor) else data.ctypes.data
        return type(data).__name__, place, tuple(data.shape), str(data.dtype)

    @property
    def samples(self) -> int:
        """How many windows there are."""
        return len(self.data) - self.length + 1

    @property
    def words(self) -> str:
        """The data in words, to be shown."""
        kind = "file" if isinstance(self.data, np.memmap) else "tensor" if isinstance(self.data, Tensor) else "array"
        dtype = str(self.data.dtype).removeprefix("torch.")
        return f"windows of {self.length} in the {kind} {[*self.data.shape]} of {dtype}"


def windows_of(pieces: Any, frame: FrameType) -> Windows | None:
    """What these tensors are windows of, stacked in this frame; None if that cannot be told."""
    if not isinstance(pieces, list | tuple) or not pieces or not all(type(piece) is Tensor for piece in pieces):
        return None
    first = pieces[0]
    if not first.dim() or len(first) < 2 or any(piece.shape != first.shape for piece in pieces):
        return None
    return _views(pieces) if first._base is not None else _copies(pieces, frame)


def _views(pieces: Sequence[Tensor]) -> Windows | None:
    base = pieces[0]._base
    if base is None or base.dim() != pieces[0].dim() or base.shape[1:] != pieces[0].shape[1:] or not base.stride(0):
        return None
    starts = []
    for piece in pieces:
        start, rest = divmod(int(piece.storage_offset()) - int(base.storage_offset()), base.stride(0))
        if piece._base is not base or piece.stride() != base.stride() or rest:
            return None
        starts.append(start)
    return Windows(base, np.array(starts, dtype=np.int64), len(pieces[0]))


def _copies(pieces: Sequence[Tensor], frame: FrameType) -> Windows | None:
    values = variables(frame)
    starts = [found for value in values if (found := _integers(value, len(pieces))) is not None]
    windows = [piece.detach().cpu().numpy() for piece in pieces] if starts else []
    fitting = (
        [
            Windows(data, ids, len(windows[0]))
            for data in values
            if is_strided(data) and data.ndim and tuple(data.shape[1:]) == windows[0].shape[1:]
            for ids in starts
            if _are(data, ids, windows)
        ]
        if windows
        else []
    )
    if not fitting or any((each.starts != fitting[0].starts).any() for each in fitting):
        return None
    keys = {each.key for each in fitting}
    return fitting[0] if len(keys) == 1 else None


def _integers(value: Any, count: int) -> IntArray | None:
    """A copy of these integers, if there are so many and nothing else."""
    if type(value) is Tensor and value.dim() == 1 and not value.is_floating_point() and not value.is_complex():
        value = value.detach().cpu().numpy()
    elif not isinstance(value, np.ndarray | list | tuple):
        return None
    if len(value) != count if not isinstance(value, np.ndarray) else value.shape != (count,):
        return None
    found = value if isinstance(value, np.ndarray) else np.array(value) if all(map(_is_int, value)) else None
    return found.astype(np.int64) if found is not None and found.dtype.kind in "iu" else None


def _is_int(value: Any) -> bool:
    return type(value) is int or isinstance(value, np.integer)


def _are(data: Any, starts: IntArray, windows: Sequence[np.ndarray[Any, Any]]) -> bool:
    """Whether data[i : i + T] equals the window for each of these starts."""
    length = len(windows[0])
    if (starts < 0).any() or (starts + length > len(data)).any():
        return False
    for start, window in zip(starts.tolist(), windows, strict=True):
        part = data[start : start + length]
        own = part.detach().cpu().numpy() if isinstance(part, Tensor) else np.asarray(part)
        if not np.array_equal(own, window):
            return False
    return True
