"""The weights of a model as one row, from wherever they are.

Letters: P weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from trajrec.bits import is_composed
from trajrec.checksum import copy_crc32, crc32
from trajrec.errors import RecordingError
from trajrec.records import Row
from trajrec.snapshot.devicecopy import DeviceCopy, RowCopy

_EXACT = {  # what a row has without loss
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
}
_CACHED = 1 << 20  # bytes that are still in a cache when the last of them has been copied


class Weights:
    """The parameters of a model, one behind the other.

    Values of 16 bits are in a row of 32 without loss: their bits come back.

    Attributes:
        dtype: of a row: float64 if any parameter has it.
        device: of the first parameter.

    Raises:
        RecordingError: a parameter is of no real floating type.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._names, self._values = list(parameters), list(parameters.values())
        kinds = {p.dtype for p in self._values}
        self.dtype = torch.float64 if torch.float64 in kinds else torch.float32
        self.device = self._values[0].device
        self._begin()

    def append(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in further parameters, behind the others."""
        self._names += parameters
        self._values += parameters.values()
        self._begin()

    def _begin(self) -> None:
        self._check_kinds()
        self._kinds = self._present_kinds()
        self._places: list[int] = []
        self._views: list[Row] = []

    def copy(self, row: Row | None) -> int:
        """Copies the weights into a row, if there is one. Returns their CRC-32."""
        views = self.memory()
        if row is not None and row.nbytes <= _CACHED:
            np.concatenate(views, out=row)
            return crc32(row.data)
        crc = at = 0
        for view in views:
            crc = crc32(view.data, crc) if row is None else copy_crc32(row[at : at + view.size], view, crc)
            at += view.size
        return crc

    def flat(self) -> list[Tensor]:
        """The parameters as flat tensors, where they are."""
        return [p.detach().reshape(-1) for p in self._values]

    def transfer(self) -> RowCopy | None:
        """How rows travel to the host; None where the weights are in its memory."""
        sizes = [p.numel() for p in self._values]
        return DeviceCopy(sizes, self.dtype, self.device) if self.device.type == "cuda" else None

    def memory(self) -> list[Row]:
        """The weights as they lie in memory, one flat array a parameter.

        Made anew only when a parameter has moved; where it cannot be seen (another device or dtype, not contiguous),
        it is copied at every call.
        """
        places = [p.data_ptr() for p in self._values]
        if places != self._places:
            self._check_same()
            self._places = places if all(self._is_seen(p) for p in self._values) else []
            self._views = [p.detach().to("cpu", self.dtype).reshape(-1).numpy() for p in self._values]
        return self._views

    def _present_kinds(self) -> list[tuple[torch.dtype, tuple[int, ...]]]:
        return [(p.dtype, tuple(p.shape)) for p in self._values]

    def _check_same(self) -> None:
        """Checks that parameters are what they were at the first step, wherever they lie now.

        Raises:
            RecordingError: one has become another.
        """
        for name, before, after in zip(self._names, self._kinds, self._present_kinds(), strict=True):
            if before != after:
                raise RecordingError(
                    f"Parameter {name} was {_kind_name(*before)} at the first step and has become "
                    f"{_kind_name(*after)}. Rows of one recording have one form: record the two parts of the training "
                    "as separate runs."
                )

    def _check_kinds(self) -> None:
        for name, p in zip(self._names, self._values, strict=True):
            if p.dtype not in _EXACT[self.dtype] or is_composed(p):
                raise RecordingError(
                    f"Parameter {name} is trained, and is {dtype_name(p.dtype)}: rows hold "
                    f"{', '.join(map(dtype_name, _EXACT[self.dtype]))} beside one another. Keep what is trained in one "
                    "of them, or give the optimizer only the other parameters."
                )

    def _is_seen(self, p: Tensor) -> bool:
        return p.device.type == "cpu" and p.dtype == self.dtype and p.is_contiguous()


def copy_row(source: Row, row: Row | None) -> int:
    """Copies a row into another, if there is one. Returns its CRC-32."""
    return crc32(source.data) if row is None else copy_crc32(row, source)


def dtype_name(dtype: torch.dtype) -> str:
    """The name that numpy has for it, too."""
    return str(dtype).removeprefix("torch.")


def _kind_name(dtype: torch.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype_name(dtype)} of shape {list(shape)}"
