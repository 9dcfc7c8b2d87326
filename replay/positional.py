"""Arguments by position, as functions took them before they took them by name: still taken, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def by_position(*names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Takes arguments behind the run and the task by position, too; `names` are what they stood for."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def called(*args: Any, **named: Any) -> R:
            old = dict(zip(names, args[2:], strict=False))
            if old and len(args) <= 2 + len(names) and not old.keys() & named.keys():
                shown = ", ".join(f"{name}=..." for name in old)
                warnings.warn(
                    f"{function.__name__} takes what comes after the run and the task by name: {shown}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                args, named = args[:2], old | named
            return function(*args, **named)

        return called

    return decorate
