"""Lazy modules: a model whose parameters get their shapes in its first forward pass, as in the training.

The script made that pass before it built its optimizer; the Task's model has not been through it. So the batch of the
first recorded step goes through the Task's loss once, with the random state put back. What values that leaves in
parameters and buffers does not matter: the recorded ones take their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_map

from trajrec.errors import TaskError, first_line
from trajrec.replay.machine.generators import generators_kept
from trajrec.replay.step import RecordedRun
from trajrec.task.task import Batch, Task


def uninitialised(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that have no shape yet."""
    return [name for name, value in (*model.named_parameters(), *model.named_buffers()) if is_lazy(value)]


def initialise(model: nn.Module, task: Task, run: RecordedRun, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a lazy model its shapes; leaves every other model alone. It then lies on the device, in this dtype.

    Raises:
        TaskError: if a pass through the Task's loss does not do it.
    """
    names = uninitialised(model)
    if not names:
        return
    model.to(device=device, dtype=dtype)
    try:
        _pass(model, task, _first_batch(task, run), dtype, device)
    except Exception as error:
        raise _refusal(names, f"failed with {type(error).__name__}: {first_line(error)}") from error
    if left := uninitialised(model):
        raise _refusal(left, "does not use them")


def _first_batch(task: Task, run: RecordedRun) -> Batch:
    recorded = run.inputs(1)
    if recorded is not None:
        return recorded[0]
    ids = run.sample_ids(1)[: int(run.parts(1)[0])]
    return task.collate([task.train[i] for i in ids.tolist()])


def _pass(model: nn.Module, task: Task, batch: Batch, dtype: torch.dtype, device: torch.device) -> None:
    def place(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if value.is_floating_point() else None)

    with generators_kept(device):
        task.loss(model, tree_map(place, batch))


def _refusal(names: list[str], what: str) -> TaskError:
    shown = f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return TaskError(
        f"The Task's model is lazy: {shown} {'have' if len(names) > 1 else 'has'} no shape before a first forward "
        f"pass, and the first recorded batch, put through Task.loss for that, {what}. Let Task.model put a batch "
        "through the model before it returns it."
    )
