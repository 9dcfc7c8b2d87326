"""Calls of `torch.nn.utils.clip_grad_norm_` and `clip_grad_value_`: what gradients were clipped to, before which step.

A script may have imported the functions before anything was watched. Each of them is a small wrapper (it switches
gradients off) around a function that it finds in its closure: that one is exchanged, so every way to call it is seen.

What a call did is the step's own only if its gradients stay as it left them. One that belongs to a step which was not
made (a loss scaler skips steps) is forgotten once its gradients are; gradients added behind it make it stale.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from types import CellType, GeneratorType
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad as library

from trajrec.capture.observing.listeners import listeners

_MOST = 64  # calls before a step


@dataclass(slots=True)
class ClipCall:
    """A call as it was made: see `trajrec.snapshot.clips`."""

    kind: str
    limit: float
    order: float
    params: Sequence[Tensor]
    is_stale: bool = False

    @property
    def has_gradients(self) -> bool:
        """Whether anything is left of what it clipped."""
        return any(p.grad is not None and bool(p.grad.any()) for p in self.params)


class Clippings:
    """The calls since the last step."""

    def __init__(self) -> None:
        self._calls: list[ClipCall] = []

    def clipped(self, kind: str, limit: Any, order: Any, params: Sequence[Tensor]) -> None:
        """Gradients were clipped."""
        self._calls.append(ClipCall(kind, float(limit), float(order), params))
        del self._calls[:-_MOST]

    def backward(self) -> None:
        """A backward pass begins, which adds to what gradients there are."""
        if self._calls:
            self._calls = [call for call in self._calls if call.has_gradients]
            for call in self._calls:
                call.is_stale = True

    def take(self) -> list[ClipCall]:
        """The calls before the step that is about to be made, once."""
        if not self._calls:
            return self._calls
        calls, self._calls = self._calls, []
        return calls


def watch_clipping() -> list[Callable[[], None]]:
    """Tells the listeners of every call from now on. Returns what takes that back."""
    undo: list[Callable[[], None]] = []
    for kind in ("norm", "value"):
        cell = _cell_of(getattr(library, f"clip_grad_{kind}_", None), f"clip_grad_{kind}_")
        if cell is not None:
            original = cell.cell_contents
            cell.cell_contents = _watched(original, kind)
            undo.append(_restoring(cell, original))
    return undo


def _cell_of(function: Any, name: str) -> CellType | None:
    """Where one of the library's wrappers has the function that it wraps; None where it is made in another way."""
    for cell in getattr(function, "__closure__", None) or ():
        if getattr(cell.cell_contents, "__name__", None) == name:
            return cell  # type: ignore[no-any-return]
    return None


def _restoring(cell: CellType, original: Any) -> Callable[[], None]:
    def restore() -> None:
        cell.cell_contents = original

    return restore


def _watched(original: Any, kind: str) -> Any:
    def by_norm(parameters: Any, max_norm: Any, norm_type: Any = 2.0, *args: Any, **named: Any) -> Any:
        given, params = _kept(parameters)
        found = original(given, max_norm, norm_type, *args, **named)
        _tell(kind, max_norm, norm_type, params)
        return found

    def by_value(parameters: Any, clip_value: Any, *args: Any, **named: Any) -> Any:
        given, params = _kept(parameters)
        original(given, clip_value, *args, **named)
        _tell(kind, clip_value, 2.0, params)

    return wraps(original)(by_norm if kind == "norm" else by_value)


def _kept(parameters: Any) -> tuple[Any, list[Tensor]]:
    """What the function is to be given, and a list of the same parameters: an iterator can be gone through once."""
    if isinstance(parameters, Tensor):
        return parameters, [parameters]
    params = list(parameters)
    if isinstance(parameters, GeneratorType):
        return (p for p in params), params  # the function says so where a generator is empty
    return params, params


def _tell(kind: str, limit: Any, order: Any, params: Sequence[Tensor]) -> None:
    if not torch.compiler.is_compiling():
        for listener in listeners.all:
            listener.clipped(kind, limit, order, params)
