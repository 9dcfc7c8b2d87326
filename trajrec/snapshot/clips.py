"""What calls of `clip_grad_norm_` and `clip_grad_value_` did to the gradients of a step, by names of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from trajrec.records import Clip
from trajrec.snapshot.groups import Groups

_KNOWN = 64  # different calls that are remembered


class ClipCall(Protocol):
    """A call as it was made.

    Attributes:
        kind: "norm" or "value".
        limit: what the gradients were clipped to; order: of the norm.
        params: whose gradients it was given.
        is_stale: whether gradients were added to those that it had clipped.
    """

    kind: str
    limit: float
    order: float
    params: Sequence[Tensor]
    is_stale: bool


class Clips:
    """Names of parameters for the calls, each kind of call looked at once.

    Args:
        groups: the model's parameters, and what its optimizers hold of them.
    """

    def __init__(self, groups: Groups) -> None:
        self._names = {id(p): name for name, p in groups.parameters.items()}
        self._groups = groups
        self._known: dict[tuple[object, ...], Clip] = {}

    def of(self, calls: Sequence[ClipCall]) -> tuple[Clip, ...]:
        """The calls that changed a gradient of the coming step, or may have."""
        return tuple(self._clip(call) for call in calls if self._matters(call))

    def _matters(self, call: ClipCall) -> bool:
        return call.limit != math.inf and any(self._groups.of(p) >= 0 for p in call.params)

    def _clip(self, call: ClipCall) -> Clip:
        if call.is_stale or not self._is_whole(call):
            return Clip("other", call.limit if 0 < call.limit < math.inf else 1.0)
        moved = [p.grad is not None for p in self._groups.members]
        key = (call.kind, call.limit, call.order, tuple(map(id, call.params)), tuple(moved))
        found = self._known.get(key)
        if found is None:
            if len(self._known) > _KNOWN:
                self._known.clear()
            found = self._known[key] = self._named(call)
        return found

    def _is_whole(self, call: ClipCall) -> bool:
        """Whether the recorded parameters tell all of what it did."""
        if not (0 < call.limit < math.inf and (call.order > 0)):
            return False
        given = [p for p in call.params if p.grad is not None]
        if len({id(p) for p in given}) < len(given):
            return False  # one that is there twice is clipped twice, and counts twice in the norm
        return call.kind == "value" or all(self._groups.of(p) >= 0 for p in given)

    def _named(self, call: ClipCall) -> Clip:
        given = {id(p) for p in call.params}
        order = None if call.order == math.inf else call.order
        if all(id(p) in given for p in self._groups.members if p.grad is not None):
            return Clip(call.kind, call.limit, order)
        names = [name for key, name in self._names.items() if key in given]
        return Clip(call.kind, call.limit, order, tuple(names))
