"""What the user says was trained: model, data, loss. Imports nothing of capture/, runfile/, replay or cli."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["Task"]

if TYPE_CHECKING:
    from trajrec.task.task import Task as Task


def __getattr__(name: str) -> Any:
    if name != "Task":
        raise AttributeError(f"module 'trajrec.task' has no attribute {name!r}")
    from trajrec.task.task import Task

    return Task
