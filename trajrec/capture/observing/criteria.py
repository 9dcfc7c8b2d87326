"""Criteria of torch.nn that the loop calls until its first step: which its loss is made of, and how they were made.

Calls of the classes are watched (not their `forward`, which torch.jit compiles), so that it does not matter when a
criterion was made, and by whom. Functions of `torch.nn.functional` are not seen.
"""

from __future__ import annotations

from collections import deque
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from trajrec.records import CRITERIA, MOST_CLASSES, Criterion

KINDS = tuple(getattr(nn, name) for name in CRITERIA)
_TENSORS = ("weight", "pos_weight")
_NEAR = 64  # nodes of the graph between a loss and the criterion that it is made of


class Criteria:
    """The criteria that the first step's losses are made of.

    Attributes:
        found: those, each once.
    """

    def __init__(self) -> None:
        self.found: dict[Criterion, None] = {}
        self._called: list[tuple[Any, Criterion]] = []
        self._is_open = True

    def called(self, criterion: nn.Module, output: Any) -> None:
        """A criterion has given a loss."""
        if self._is_open and isinstance(output, Tensor) and output.grad_fn is not None:
            known = _described(criterion)
            if known is not None:
                self._called.append((output.grad_fn, known))

    def backward(self, loss: Any) -> None:
        """A backward pass begins: a criterion near its loss is what the training learns by."""
        if self._called and isinstance(loss, Tensor):
            near = _near(loss.grad_fn)
            self.found |= {known: None for node, known in self._called if node in near}
        self._called = []

    def close(self) -> tuple[Criterion, ...]:
        """What was found; nothing is looked at from now on."""
        self._is_open, self._called = False, []
        return tuple(self.found)


def watched_criterion(tell: Any) -> Any:
    """What stands in the place of a criterion's `__call__`, and tells of each call."""

    def watching(original: Any) -> Any:
        @wraps(original)
        def call(criterion: Any, *args: Any, **named: Any) -> Any:
            output = original(criterion, *args, **named)
            if not torch.compiler.is_compiling():
                tell(criterion, output)
            return output

        return call

    return watching


def _near(root: Any) -> set[Any]:
    """The nodes of a graph that are nearest to its root."""
    found: set[Any] = set()
    waiting = deque([root])
    while waiting and len(found) < _NEAR:
        node = waiting.popleft()
        if node is not None and node not in found:
            found.add(node)
            waiting.extend(before for before, _ in node.next_functions)
    return found


def _described(criterion: nn.Module) -> Criterion | None:
    """How a criterion was made; None for classes of others, and for more weights than are worth a place in a file."""
    kind = type(criterion)
    if kind not in KINDS:
        return None
    options, weights = {}, {}
    for name in CRITERIA[kind.__name__]:
        value = getattr(criterion, name)
        if name not in _TENSORS:
            options[name] = float(value)
        elif value is not None:
            if value.dim() != 1 or len(value) > MOST_CLASSES or not bool(torch.isfinite(value).all()):
                return None
            weights[name] = tuple(value.detach().double().cpu().tolist())
    return Criterion(kind.__name__, str(criterion.reduction), tuple(options.items()), **weights)
