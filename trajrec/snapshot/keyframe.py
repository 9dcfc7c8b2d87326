"""What besides the weights it takes to go on after a step: optimizer state, buffers, generators (`Keyframe.arrays`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trajrec.bits import is_known, widest
from trajrec.records import GROUP_STATE, Parts
from trajrec.snapshot.groups import Groups
from trajrec.snapshot.options import Options

Arrays = dict[str, npt.NDArray[Any] | Parts]


class OptimizerState:
    """The state of the optimizers, as arrays over the parameters that rows have.

    States shaped like their parameters are parts that lie where the training has them: it will change them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], groups: Groups, options: Options) -> None:
        self._parameters = list(parameters.values())
        self._groups, self._options = groups, options
        self._flats: dict[tuple[str, int], tuple[Tensor, int, npt.NDArray[Any]]] = {}

    def append(self, parameters: Mapping[str, Tensor]) -> None:
        """Takes in further parameters, behind the others."""
        self._parameters += parameters.values()

    def read(self) -> Arrays:
        """The state by the paths of `Keyframe.arrays`."""
        arrays: dict[str, npt.NDArray[Any]] = {}
        rows: dict[str, dict[int, npt.NDArray[Any]]] = {}
        for index, p in enumerate(self._parameters):
            for name, value in self._groups.state_of(p).items():
                path, is_tensor = f"optimizer/{name}", isinstance(value, Tensor)
                if is_tensor and value.shape == p.shape:
                    rows.setdefault(path, {})[index] = self._flat((path, index), value)
                # A step count of a parameter without dimensions has the parameter's shape too: it is kept as both.
                if isinstance(value, bool | int | float) or (is_tensor and value.numel() == 1):
                    self._scalars(arrays, path)[index] = float(value)
                elif is_tensor and value.shape != p.shape:
                    arrays[f"{path}/{index}"] = widest(value).copy()
        for path, states in rows.items():
            arrays[f"{path}.present"] = np.isin(np.arange(len(self._parameters)), [*states]).astype(np.uint8)
        return arrays | self._late_options() | {path: self._row(states) for path, states in rows.items()}

    def _scalars(self, arrays: dict[str, npt.NDArray[Any]], path: str) -> npt.NDArray[Any]:
        return arrays.setdefault(f"{path}.scalar", np.full(len(self._parameters), np.nan))

    def _flat(self, place: tuple[str, int], value: Tensor) -> npt.NDArray[Any]:
        """A state as it lies in memory; looked for anew only where it is another tensor, or has moved."""
        known = self._flats.get(place)
        if known is not None and known[0] is value and known[1] == value.data_ptr():
            return known[2]
        array: npt.NDArray[Any] = widest(value).reshape(-1)
        if value.device.type == "cpu" and value.is_contiguous() and is_known(value.dtype):
            self._flats[place] = (value, value.data_ptr(), array)
        return array

    def _row(self, states: dict[int, npt.NDArray[Any]]) -> Parts:
        """A state of all parameters, with zeros for those that do not have it."""
        dtype = np.result_type(*(state.dtype for state in states.values()))
        sizes = (p.numel() for p in self._parameters)
        parts = [states[k] if k in states else np.zeros(size, dtype) for k, size in enumerate(sizes)]
        return Parts([part.astype(dtype, copy=False) for part in parts])

    def _late_options(self) -> dict[str, npt.NDArray[Any]]:
        """Numbers that the optimizer put into its groups on the way, as state of each of the group's parameters."""
        groups = [self._options.late(group) for group in self._groups.all]
        arrays: dict[str, npt.NDArray[Any]] = {}
        for index, p in enumerate(self._parameters):
            group = self._groups.of(p)
            for key, value in (groups[group] if group >= 0 else {}).items():
                self._scalars(arrays, f"optimizer/{GROUP_STATE}{key}")[index] = value
        return arrays
