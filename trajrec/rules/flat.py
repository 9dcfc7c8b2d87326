"""How a row's trainable weights become one flat vector with every parameter group in one piece.

Most optimizers are elementwise within a group (same hyperparameters), so a group is one tensor to them; to the others
the vector is split into parameters. The vector of P' trainable weights is ordered by group, then by the parameter
table; a row holds all P weights, frozen ones too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trajrec.records import ParamSpec, RunSpec


class FlatLayout:
    """The order of P' trainable weights.

    Attributes:
        params: the trainable parameters in vector order.
        size: P'.
        groups: for every parameter group its slice of the vector (empty if the group has no trainable weight).
    """

    def __init__(self, spec: RunSpec) -> None:
        trainable = [p for p in spec.params if p.trainable]
        self.params: tuple[ParamSpec, ...] = tuple(sorted(trainable, key=lambda p: (p.group, p.offset)))
        self._places = [
            [i for i, p in enumerate(spec.params) if p.trainable and p.group == group] for group in range(spec.groups)
        ]
        self.sizes = [p.size for p in self.params]
        self.size = sum(self.sizes)
        self.groups = tuple(self._group_slice(group) for group in range(spec.groups))
        # One slice of the row where the trainable weights lie in one piece and in order: no copy is needed then.
        self._whole = self._contiguous()

    def _group_slice(self, group: int) -> slice:
        before = sum(p.size for p in self.params if p.group < group)
        return slice(before, before + sum(p.size for p in self.params if p.group == group))

    def places(self, group: int) -> list[int]:
        """Places in the parameter table of a group's trainable parameters."""
        return self._places[group]

    def table(self, spec: RunSpec) -> list[tuple[int, ParamSpec]]:
        """The trainable parameters in vector order, each with its place in the parameter table."""
        places = {param.name: place for place, param in enumerate(spec.params)}
        return [(places[param.name], param) for param in self.params]

    def _contiguous(self) -> slice | None:
        ends = [p.offset + p.size for p in self.params]
        if not self.params or any(p.offset != end for p, end in zip(self.params[1:], ends, strict=False)):
            return None
        return slice(self.params[0].offset, ends[-1])

    def select(self, row: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The trainable weights [P'] of a row [P]."""
        if self._whole is not None:
            return row[self._whole]
        return np.concatenate([row[p.span] for p in self.params]) if self.params else row[:0]

    def fill(self, row: npt.NDArray[Any], values: npt.NDArray[Any]) -> None:
        """Puts trainable weights [P'] into their places of a row [P]."""
        if self._whole is not None:
            row[self._whole] = values
            return
        for param, part in zip(self.params, np.split(values, np.cumsum(self.sizes)[:-1]), strict=True):
            row[param.span] = part

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """The parameters of a vector [P'], as views by name."""
        parts = torch.split(vector, self.sizes)
        return {p.name: part.view(p.shape) for p, part in zip(self.params, parts, strict=True)}

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The vector [P'] of parameters by name."""
        return torch.cat([values[p.name].reshape(-1) for p in self.params])
