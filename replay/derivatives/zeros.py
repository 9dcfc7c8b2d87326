"""0/0 in a second derivative: a norm of zeros, a root of zero.

The norm of a vector of zeros has no derivative. torch gives zero for the first one, so that training goes on, and 0/0 =
NaN for the second. An exact replay is then NaN from that step on, however calm the training is. Here such a step is
looked at again: the operators of its loss that were given zeros, with the line of the user's code that called them.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from trajrec.errors import DerivativeError
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.step import Step

_NORMS = ("linalg_vector_norm", "norm", "_cdist_forward", "_euclidean_dist", "_pdist_forward")
_OURS = ("torch", "trajrec")


class _Zeros(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the operators that have no derivative where they are called, in words."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator."""
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0].rstrip("_")
        words = _fault(name, args, result)
        if words:
            self.found[f"{words}{_where()}"] = None
        return result


def _fault(name: str, args: Any, result: Any) -> str:
    """What an operator was given that it has no derivative at, in words."""
    value = args[0] if args and isinstance(args[0], Tensor) else None
    if value is None or not value.is_floating_point():
        return ""
    if name in _NORMS and isinstance(result, Tensor) and bool((result == 0).any()):
        return "the norm of a vector of zeros"
    if name in ("sqrt", "rsqrt") and bool((value == 0).any()):
        return f"{name} of zero"
    if name == "std" and isinstance(result, Tensor) and bool((result == 0).any()):
        return "the standard deviation of equal values"
    exponent = args[1] if name == "pow" and len(args) > 1 else None
    if isinstance(exponent, int | float) and exponent != int(exponent) and exponent < 2 and bool((value == 0).any()):
        return f"zero to the power of {exponent:g}"
    return ""


def _where() -> str:
    """The innermost line of code that is neither torch's nor ours."""
    frame = sys._getframe(2)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if module not in _OURS:
            name = frame.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
            return f" (in {frame.f_code.co_name}, line {frame.f_lineno} of {name})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def zeros_error(function: LossFunction, samples: Samples, step: Step) -> DerivativeError | None:
    """The refusal, if the Hessian of a step is NaN for operators that are given zeros; None if it is finite."""
    if _is_finite(function, samples, step):
        return None
    watched = _Zeros()
    with torch.no_grad(), watched:
        function.objective(step.before, samples, step)
    if not watched.found:
        return None
    first, *others = watched.found
    more = f" (and {len(others)} more)" if others else ""
    return DerivativeError(
        f"The loss of step {step.t} has no second derivative: 0/0 in {first}{more}. This is no sensitivity of the "
        "training. Add a small number inside: (x.square().sum(1) + eps).sqrt() for x.norm(dim=1), (x + eps).sqrt(); in "
        "the training and the Task. --curvature none needs one derivative only."
    )


def _is_finite(function: LossFunction, samples: Samples, step: Step) -> bool:
    """Whether second derivatives of a step are finite: the Hessian, and those of single losses, along a direction."""
    weights = step.before.detach().requires_grad_()
    with torch.enable_grad():
        objective = function.objective(weights, samples, step)
        (gradient,) = torch.autograd.grad(objective.total, weights, create_graph=True)
        ones = torch.ones_like(objective.losses, requires_grad=True)
        (pulled,) = torch.autograd.grad(objective.losses, weights, ones, create_graph=True, materialize_grads=True)
        found = [
            torch.autograd.grad(value.sum(), by, retain_graph=True, materialize_grads=True)[0]
            for value, by in ((gradient, weights), (pulled, ones))
            if value.requires_grad
        ]
    return all(bool(torch.isfinite(value).all()) for value in found)
