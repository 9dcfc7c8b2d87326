"""`optimizer.step(closure)`: a step that makes its own gradient, as in Lightning, skorch and torch's own examples.

    step(closure)      torch calls the pre-hook: in place of the closure goes one that calls it and then listens
    closure()          is called by the step itself, as often, when and in the mode it would be: nothing is run ahead.
                       When it has returned for the first time the gradient is there, and the weights are those before
                       the step: now everything that is read before a step is read
    closure() again    makes a second gradient at other weights (LBFGS, SAM): recording stops, the training goes on

The closure is called by nobody but the step, so the training is the same whatever becomes of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trajrec.capture.companions import is_within_step
from trajrec.capture.discovery import parameters_of
from trajrec.capture.guard import Guard
from trajrec.errors import RecordingError

_ONE_GRADIENT = "A step is recorded if it calls its closure once, before it does anything else."


class Handed:
    """A closure that a step was given.

    Args:
        optimizer: that steps.
        keeps: whether the weights themselves are kept, to see whether they have changed.

    Attributes:
        calls: how often it has returned.
        inner: steps within this one that have begun, and not ended, before the closure was called.
    """

    def __init__(self, optimizer: Optimizer, keeps: bool) -> None:
        self.optimizer = optimizer
        self.calls = self.inner = 0
        self._weights = parameters_of(optimizer)
        self._versions = self._now()
        self._kept: list[Tensor] | None = [p.detach().clone() for p in self._weights] if keeps else None

    def _now(self) -> list[int]:
        return [p._version for p in self._weights]

    def check_weights(self) -> None:
        """Checks that the step has not changed weights yet.

        Raises:
            RecordingError: it has.
        """
        kept, self._kept = self._kept, None
        is_still = kept is None or all(map(torch.equal, kept, [p.detach() for p in self._weights]))
        if self._now() != self._versions or not is_still:
            raise RecordingError(
                f"{type(self.optimizer).__name__}.step(closure) changes the weights before it calls the closure: its "
                f"gradient is not that of the weights before the step. {_ONE_GRADIENT}"
            )


class Closures:
    """Hands closures on to the steps that they were given to.

    Args:
        guard: of the recorder.
        prepare: called before an optimizer changes the weights, once its gradient is there.
    """

    def __init__(self, guard: Guard, prepare: Callable[[Optimizer, int], None]) -> None:
        self._guard = guard
        self._prepare = prepare
        self._handed: Handed | None = None
        self._known: set[type[Optimizer]] = set()

    def is_within(self, optimizer: Optimizer) -> bool:
        """Whether the step that begins is called by one that has not called its closure yet (`super().step()`)."""
        handed = self._handed
        if handed is None or handed.optimizer is not optimizer or handed.calls or not is_within_step(optimizer):
            return False
        handed.inner += 1
        return True

    def forget(self) -> None:
        """What was handed on before is over."""
        self._handed = None

    def hand_on(self, optimizer: Optimizer, arguments: Sequence[Any], options: dict[str, Any]) -> Any:
        """The arguments of a step, the optimizer itself the first, with its closure listened to.

        Raises:
            RecordingError: if there are several.
        """
        callables = [*filter(callable, (*arguments[1:], *options.values()))]
        if len(callables) > 1:
            raise RecordingError(
                f"{type(optimizer).__name__}.step() was given {len(callables)} functions. {_ONE_GRADIENT}"
            )
        kind = type(optimizer)
        handed = self._handed = Handed(optimizer, keeps=kind not in self._known and not is_torchs(optimizer))
        self._known.add(kind)
        listened = self._listened(callables[0], handed)
        given = tuple(listened if value is callables[0] else value for value in arguments)
        return given, {name: listened if value is callables[0] else value for name, value in options.items()}

    def _listened(self, closure: Callable[..., Any], handed: Handed) -> Callable[..., Any]:
        begins, returned = self._guard.around(self._begins), self._guard.around(self._returned)

        @wraps(closure)
        def listened(*args: Any, **named: Any) -> Any:
            begins(handed)
            loss = closure(*args, **named)
            returned(handed)
            return loss

        return listened

    def _begins(self, handed: Handed) -> None:
        if handed is not self._handed:
            return
        if handed.calls:
            raise RecordingError(
                f"{type(handed.optimizer).__name__}.step(closure) calls its closure more than once: it takes several "
                f"gradients a step, which cannot be recorded. {_ONE_GRADIENT}"
            )
        handed.check_weights()

    def _returned(self, handed: Handed) -> None:
        if handed is self._handed:
            handed.calls += 1
            self._prepare(handed.optimizer, handed.inner)

    def ends(self, optimizer: Optimizer) -> bool:
        """Whether the step that has ended is to be looked at: not one within another whose closure is still to come.

        Raises:
            RecordingError: the step has not called its closure.
        """
        handed = self._handed
        if handed is None or handed.optimizer is not optimizer or handed.calls:
            return True
        if handed.inner:
            handed.inner -= 1
            return False
        self._handed = None
        raise RecordingError(
            f"{type(optimizer).__name__}.step(closure) did not call the closure it was given, so what it was made of "
            "was not seen. Call backward() yourself, and step() without a closure."
        )


def has_closure(arguments: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether a step was given a function; the optimizer itself is its first argument."""
    return bool(options or len(arguments) > 1) and any(map(callable, (*arguments[1:], *options.values())))


def is_torchs(optimizer: Optimizer) -> bool:
    """Whether the optimizer's class is one of torch's own, which do nothing where there is no gradient."""
    return type(optimizer).__module__.startswith("torch.optim.")


def is_no_step(optimizers: Sequence[Optimizer]) -> bool:
    """Whether a step changes nothing: there is no gradient, as where Lightning's `training_step` has returned None."""
    held = [p for optimizer in optimizers for p in parameters_of(optimizer)]
    return all(map(is_torchs, optimizers)) and all(p.grad is None for p in held)
