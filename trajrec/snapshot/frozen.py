"""The parameters that nobody trains: stored once, and looked at now and then whether they are still the same.

What is trained is what a group of an optimizer holds that requires a gradient, or has one: decay and momentum move it
without requiring any. All other parameters are frozen, until one comes into a group with a gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from torch import Tensor

from trajrec.bits import Array, bits_of, checksum, leaves
from trajrec.errors import RecordingError
from trajrec.records import FROZEN, FROZEN_CHECK, FrozenSpec
from trajrec.snapshot.groups import Groups
from trajrec.snapshot.weights import dtype_name

_ALWAYS = 1 << 26  # bytes that are summed at every keyframe; more at the 1st, 2nd, 4th, 8th ... and the last


def is_trained(parameter: Tensor, groups: Groups) -> bool:
    """Whether an optimizer may move a parameter."""
    return groups.of(parameter) >= 0 and (parameter.requires_grad or parameter.grad is not None)


def trained(parameters: Mapping[str, Tensor], groups: Groups) -> dict[str, Tensor]:
    """The parameters that an optimizer may move; where there are none yet, those that it holds."""
    found = {name: p for name, p in parameters.items() if is_trained(p, groups)}
    return found or {name: p for name, p in parameters.items() if groups.of(p) >= 0}


class Frozen:
    """The parameters that are stored once.

    Args:
        parameters: by name.
        groups: of the optimizers.

    Attributes:
        owes_a_look: whether the last keyframe was written without looking at them.
    """

    def __init__(self, parameters: Mapping[str, Tensor], groups: Groups) -> None:
        self._parameters = dict(parameters)
        self._groups = groups
        self._table: tuple[FrozenSpec, ...] | None = None
        self._looks = self._bytes = 0
        self.owes_a_look = False

    def table(self) -> tuple[FrozenSpec, ...]:
        """The parameters with their checksums, as they are when it is asked for first.

        Raises:
            RecordingError: one has no values.
        """
        if self._table is None:
            self._table = tuple(self._spec(name, p) for name, p in self._parameters.items())
            self._bytes = sum(p.numel() * p.element_size() for p in self._parameters.values())
        return self._table

    def _spec(self, name: str, p: Tensor) -> FrozenSpec:
        return FrozenSpec(name, tuple(p.shape), dtype_name(p.dtype), self._groups.of(p), _checksum(name, p))

    def arrays(self) -> dict[str, Array]:
        """Their bits, by the paths of `Keyframe.arrays`."""
        found: dict[str, Array] = {}
        for name, p in self._parameters.items():
            found |= {f"{FROZEN}{path}": bits_of(leaf) for path, leaf in leaves(name, p).items()}
        return found

    def thawed(self) -> list[FrozenSpec]:
        """Those that an optimizer moves from now on."""
        return [spec for spec in self._still if is_trained(self._parameters[spec.name], self._groups)]

    def give(self, specs: Iterable[FrozenSpec]) -> dict[str, Tensor]:
        """Hands over parameters that are frozen no more.

        Raises:
            RecordingError: one is not what it was.
        """
        specs = list(specs)
        self._check({spec.name: _checksum(spec.name, self._parameters[spec.name]) for spec in specs})
        return {spec.name: self._parameters.pop(spec.name) for spec in specs}

    @property
    def _still(self) -> list[FrozenSpec]:
        return [spec for spec in self.table() if spec.name in self._parameters]

    def look(self, is_last: bool) -> dict[str, Array]:
        """The checksums of all [frozen], those that are trained by now as they were; nothing where it is no time.

        By the path of `Keyframe.arrays`; `check` judges them.
        """
        self._looks += 1
        is_time = is_last or self._looks & (self._looks - 1) == 0 or self._bytes <= _ALWAYS
        self.owes_a_look = bool(self.table()) and not is_time
        if not self.table() or not is_time:
            return {}
        sums = [
            _checksum(s.name, self._parameters[s.name]) if s.name in self._parameters else s.crc32 for s in self.table()
        ]
        return {FROZEN_CHECK: np.array(sums, dtype=np.uint32)}

    def check(self, found: Array) -> None:
        """Judges what `look` has found.

        Raises:
            RecordingError: a parameter is not what it was.
        """
        self._check({spec.name: crc for spec, crc in zip(self.table(), found.tolist(), strict=True)})

    def _check(self, sums: Mapping[str, int]) -> None:
        changed = [spec.name for spec in self.table() if sums.get(spec.name, spec.crc32) != spec.crc32]
        if changed:
            raise RecordingError(
                f"Parameter {changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''} "
                f"{'were' if len(changed) > 1 else 'was'} changed outside the optimizer that is recorded: a frozen "
                "weight is stored once, as it was before the first step. Keep averages and teachers in a copy beside "
                "the model, or give what is trained to the optimizer before the recording begins."
            )


def _checksum(name: str, parameter: Tensor) -> int:
    try:
        return checksum(leaves(name, parameter))
    except TypeError as error:
        raise RecordingError(f"Parameter {name} cannot be stored: {error}. Load its values before training.") from error
