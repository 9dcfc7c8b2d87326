"""Operators that can be differentiated once and not twice, by the names that users know them by.

torch says so when a derivative is taken, in the words of its library: "derivative for aten::hardsigmoid_backward is not
implemented". Where only first derivatives are asked for, another form serves (`replay.derivatives.per_sample`); where
the Hessian is, the replay is refused, and the refusal names the operator and the modules that are made of it.

Of a backward pass marked @once_differentiable torch may say nothing: what it gives out is cut from what it was given,
so a second derivative goes by it, without its part. Inside `cuts_told` that is an error where the gradient is recorded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trajrec.errors import DerivativeError

_ONCE = "trying to differentiate twice a function that was marked with @once_differentiable"
_NAMED = (
    re.compile(r"derivative for '?(?:aten::)?(\w+)'? is not implemented"),
    re.compile(r"forward AD with (\w+) that does not support it"),
    re.compile(r"(?:double backwards?|second derivatives?) (?:is|are) not (?:supported|implemented) for (\w+)", re.I),
)
UNSEEN = "a value that was cut off is used as only a constant can be"
_DESCRIBED = {
    UNSEEN: "a value that the loss cuts off from its graph and uses as only a constant can be",
    _ONCE: "an autograd.Function marked @once_differentiable",
    "does not currently support double backward": "a function compiled by torch.compile",
    "Can't call numpy() on Tensor that requires grad": "a backward pass that computes in numpy",
    "has been modified by an inplace operation": "an operation whose result is changed in place",
}
_SHORT = {"cudnn_rnn": "the fused RNN, GRU or LSTM of cuDNN", "miopen_rnn": "the fused RNN, GRU or LSTM of MIOpen"}
_LAYERS = {name.lower(): name for name, kind in vars(nn).items() if inspect.isclass(kind)}


@contextmanager
def cuts_told() -> Iterator[None]:
    """Inside, a gradient that cannot be differentiated again is an error at once."""
    functions: Any = torch._C._functions
    late, functions.DelayedError = functions.DelayedError, _refuse
    try:
        yield
    finally:
        functions.DelayedError = late


def _refuse(message: bytes, *_: Any) -> Any:
    raise RuntimeError(message.decode())


def operator_without(error: BaseException) -> str | None:
    """What lacks a derivative, as torch's error says it ("embedding_bag"); None for errors about something else."""
    message = str(error)
    for pattern in _NAMED:
        if found := pattern.search(message):
            return re.sub(r"_(backward|forward)\w*$", "", found[1]).strip("_")
    return next((what for words, what in _DESCRIBED.items() if words in message), None)


def derivative_error(error: BaseException, model: nn.Module) -> DerivativeError | None:
    """The refusal to raise for an error of torch; None if it is not about a derivative."""
    operator = operator_without(error)
    if operator is None:
        return None
    return DerivativeError(
        f"This replay needs the second derivative of {shown(operator, model)}, and torch has none. Without the "
        'Hessian first derivatives are enough: ask with --curvature none (in Python curvature="none").'
    )


def shown(operator: str, model: nn.Module) -> str:
    """An operator in the words of torch.nn, with the modules of a model that are made of it."""
    key = operator.replace("_", "").lower()
    users = [repr(name) for name, module in model.named_modules() if type(module).__name__.lower() == key and name]
    name = _LAYERS.get(key)
    notes = [operator] if name and name.lower() != operator else []
    notes += [f"module {', '.join(users[:3])}{', ...' if len(users) > 3 else ''}"] if users else []
    return (name or _SHORT.get(operator, operator)) + (f" ({'; '.join(notes)})" if notes else "")
