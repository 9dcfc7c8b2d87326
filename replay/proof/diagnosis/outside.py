"""Suspicions about what is outside of the model: labels of another shape, weights that nobody recorded."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from trajrec.replay.proof.diagnosis.trial import Cause, Trial

_SAME = 1e-5
_DEPTH = 4


def broadcast(trial: Trial) -> Cause | None:
    """Whether the recorded loss is one of every output with every label: [B, 1] beside [B] gives [B, B]."""
    if len(trial.first.parts) > 1:
        return None
    recorded = trial.run.loss(trial.first.t)
    for output, labels in _outputs_and_labels(trial):
        for name in ("mse_loss", "l1_loss", "smooth_l1_loss"):
            pairs = output.reshape(-1, 1).expand(-1, labels.numel()), labels.reshape(1, -1).expand(output.numel(), -1)
            value = float(getattr(functional, name)(*pairs))
            if abs(value - recorded) <= _SAME * abs(recorded):
                return Cause(_BROADCAST.format(recorded, name), float("nan"))
    return None


_BROADCAST = (
    "The recorded loss, {0:.6g}, is F.{1} of every output with the label of every sample: outputs of shape [B, 1] "
    "beside labels of shape [B], or the other way round, were broadcast to [B, B] in the training, whose model then "
    "learns the mean of the labels. Mend the loop (outputs.squeeze(1), or labels.unsqueeze(1)) and record again."
)


def _outputs_and_labels(trial: Trial) -> Iterator[tuple[Tensor, Tensor]]:
    """What the model gives in the step, beside every part of the batch that could be its labels: a number a sample."""
    outputs: list[Any] = []
    handle = trial.function.model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        trial.loss()
    finally:
        handle.remove()
    count = len(trial.first.ids)
    batch = trial.samples.part(trial.first, trial.first.parts[0])
    for output in (leaf for leaf in tree_leaves(outputs) if _is_one_each(leaf, count)):
        for labels in (leaf for leaf in tree_leaves(batch) if _is_one_each(leaf, count)):
            yield output.detach(), labels


def _is_one_each(value: Any, count: int) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and count > 1 and value.numel() == count


def weights_outside(trial: Trial) -> str:
    """A sentence on weights that Task.loss uses and that are not the model's; "" if none are found."""
    found = dict(_held(trial.function.task.loss, _DEPTH))
    if not found:
        return ""
    names = ", ".join(f"{name} ({kind})" for name, kind in list(found.items())[:3])
    return (
        f"Task.loss uses weights outside of the model: {names}. They are not recorded; if the training moved them (a "
        "mean teacher, or parameters of the loss with an optimizer of their own), the Task's are others. Parameters of "
        "the loss belong into the recorded model, and both optimizers into trajrec.record(optimizer=[...]); "
        "a teacher that follows the weights is not replayed."
    )


def _held(function: Callable[..., Any], depth: int) -> Iterator[tuple[str, str]]:
    """Names and kinds of the modules and parameters that a function reaches, but not by its arguments."""
    if not depth:
        return
    if isinstance(function, functools.partial):
        values = {**function.keywords, **{f"argument {k}": value for k, value in enumerate(function.args)}}
        yield from _named(values, depth)
        yield from _held(function.func, depth - 1)
        return
    owner = getattr(function, "__self__", None)
    if owner is not None and not inspect.ismodule(owner):
        yield from _named(dict(getattr(owner, "__dict__", {})), depth)
    try:
        found = inspect.getclosurevars(inspect.unwrap(function))
    except (TypeError, ValueError):  # no function of Python's
        return
    yield from _named({**found.globals, **found.nonlocals}, depth)


def _named(values: dict[str, Any], depth: int) -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, nn.Module):
            if any(True for _ in value.parameters()):
                yield name, type(value).__name__
        elif isinstance(value, Tensor):
            if value.requires_grad:
                yield name, type(value).__name__
        elif isinstance(value, dict | list | tuple) and len(value) < 100:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            inner = {f"{name}[{key!r}]": item for key, item in items if isinstance(item, nn.Module | Tensor)}
            yield from _named(inner, depth)
        elif inspect.isfunction(value) or isinstance(value, functools.partial):
            yield from _held(value, depth - 1)
