"""The numeric options of parameter groups as rows of numbers.

Letters: G parameter groups, H hyperparameters.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from trajrec.records import FloatArray
from trajrec.snapshot.groups import Groups

# How torch computes a step, not what: they have no place in the mathematics of a replay.
_IMPLEMENTATION = frozenset({"params", "foreach", "fused", "capturable", "differentiable", "initial_lr"})


class Options:
    """The hyperparameters in force.

    Attributes:
        names: of the H hyperparameters, those of tuples by position ("betas.0").
    """

    def __init__(self, groups: Groups) -> None:
        self._groups = groups
        self.names = tuple(dict.fromkeys(name for o in groups.optimizers for name in names_of(o)))
        self._keys = [(name.partition(".")[0], name.partition(".")[2]) for name in self.names]
        self._known = dict.fromkeys(key for key, _ in self._keys)
        self._hyper: FloatArray | None = None
        self._last: list[list[Any]] = []
        self._has_tensors = False

    def hyper(self) -> FloatArray:
        """Hyperparameters in force, [G, H]."""
        # Mostly nothing has changed since the last step; a tensor may have, in place.
        groups = self._groups.all
        options = [[*map(group.get, self._known)] for group in groups]
        if self._hyper is None or options != self._last or self._has_tensors:
            self._last = options
            self._has_tensors = any(isinstance(value, Tensor) for row in options for value in row)
            rows = [[_number(group, key, place) for key, place in self._keys] for group in groups]
            self._hyper = np.array(rows, dtype=np.float64)
        return self._hyper

    def rates(self, hyper: FloatArray) -> list[float]:
        """The learning rate of each group, of hyperparameters [G, H]."""
        return hyper[:, self.names.index("lr")].tolist() if "lr" in self.names else []

    def late(self, group: dict[str, Any]) -> dict[str, float]:
        """Numbers that the optimizer has put into a group since the first step."""
        return {
            key: value
            for key, value in group.items()
            if key not in self._known and key not in _IMPLEMENTATION and isinstance(value, bool | int | float)
        }


def names_of(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the numeric options of an optimizer's groups; those of tuples by position ("betas.0")."""
    names: dict[str, None] = {}
    for group in optimizer.param_groups:
        for key, value in group.items():
            if key in _IMPLEMENTATION:
                continue
            if isinstance(value, list | tuple):
                places = (i for i, item in enumerate(value) if isinstance(item, int | float | Tensor))
                names.update({f"{key}.{i}": None for i in places})
            elif value is None or isinstance(value, bool | int | float | Tensor):
                names[key] = None
    return tuple(names)


def _number(group: dict[str, Any], key: str, place: str) -> float:
    value = group.get(key)
    if value is not None and place:
        value = value[int(place)]
    return float("nan") if value is None else float(value)
