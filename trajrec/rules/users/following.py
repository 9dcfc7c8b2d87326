r"""Lets autograd follow an optimizer's step that was written without a thought of it, and notes where it cannot.

Such a step runs under `torch.no_grad()` and changes tensors in place. Within this mode

* gradients stay as the caller has switched them: `no_grad`, `enable_grad` and `set_grad_enabled` do nothing;
* `out=` becomes a copy into that tensor;
* sqrt(0) has the derivative zero. A weight that never had a gradient has second moments of zero, and without this its
  derivative would be 0 * inf. Its step, m / (sqrt(v) + eps) at m = 0, is smooth, and has just that derivative.

What leaves the graph is not mended but noted, with the line of the user's code: `.data`, numbers taken out of tensors
(`.item()`), `.detach()`, rounding to a coarser dtype, inference mode. Whether it does harm is for the self-test to say.
(A tensor as `alpha=` or `value=` is a number taken out of it as well, and one that torch refuses where it has a graph.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ROUNDS = "rounds"
_NUMBERS = frozenset({"item", "tolist", "numpy", "__float__", "__int__", "__array__", "__complex__"})
_ROOTS = frozenset({"sqrt", "sqrt_"})
_POWERS = frozenset({"pow", "pow_", "__pow__", "__ipow__", "float_power"})
_LIBRARY = str(Path(torch.__file__).parent)


@dataclass(frozen=True, slots=True)
class Leak:
    """Something that leaves the graph, and the line of code that does it."""

    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.what} ({self.where})"


class Following(TorchFunctionMode):
    """Runs a step with the graph kept; `note` is told of every leak.

    Args:
        note: is called with each leak of a value that autograd follows (in reverse mode).
    """

    def __init__(self, note: Callable[[Leak], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._C._set_grad_enabled:
            return None
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        result = _call(name, func, args, kwargs)
        what = _leak(name, func, args, result)
        if what is not None:
            self._note(Leak(what, _caller()))
        return result


def _call(name: str, func: Any, args: Any, kwargs: Any) -> Any:
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out.copy_(func(*args, **{key: value for key, value in kwargs.items() if key != "out"}))
    if name.endswith("_") and any(value is args[0] for value in args[1:]):
        # x.mul_(x): torch's forward mode changes the tangent of x while it still needs it.
        args = (args[0], *(value.clone() if value is args[0] else value for value in args[1:]))
    if name in _NUMBERS:
        return func(args[0].detach(), *args[1:], **kwargs)
    if name in _ROOTS or (name in _POWERS and _is_half(args, kwargs)):
        return _root(args[0], name.endswith("_") and name != "__pow__")
    return func(*args, **kwargs)


def _is_half(args: Any, kwargs: Any) -> bool:
    exponent = args[1] if len(args) > 1 else kwargs.get("exponent")
    return isinstance(exponent, float) and exponent == 0.5 and isinstance(args[0], Tensor)


def _root(values: Tensor, in_place: bool) -> Tensor:
    """The square root with the derivative zero at zero."""
    zero = values == 0
    root = torch.where(zero, values.detach(), torch.where(zero, 1.0, values).sqrt())
    return values.copy_(root) if in_place else root


def _leak(name: str, func: Any, args: Any, result: Any) -> str | None:
    """What leaves the graph by this call, or None."""
    if not args or not isinstance(args[0], Tensor) or not any(value.requires_grad for value in _tensors(args)):
        return None
    if getattr(func, "__self__", None) is torch.Tensor.data:
        return "works on .data"
    if name in _NUMBERS:
        return f"takes a number out of a tensor by .{name}()" if name[0] != "_" else "takes a number out of a tensor"
    if name in ("detach", "detach_"):
        return "cuts the graph by .detach()"
    if torch.is_inference_mode_enabled():
        return "runs in inference mode"
    rounded = coarser_dtype(args[0], result)
    return None if rounded is None else f"{ROUNDS} to {str(rounded).removeprefix('torch.')}"


def coarser_dtype(values: Any, result: Any) -> torch.dtype | None:
    """The result's dtype if it is a tensor of coarser numbers than the values; else None."""
    if not all(isinstance(v, Tensor) and v.is_floating_point() for v in (values, result)):
        return None
    return result.dtype if torch.finfo(result.dtype).eps > torch.finfo(values.dtype).eps else None


def _tensors(args: Any) -> list[Tensor]:
    return [value for value in tree_leaves(args) if isinstance(value, Tensor)]


def _caller() -> str:
    """The line outside torch and this file that is being run."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((_LIBRARY, __file__)):
        frame = frame.f_back
    return "unknown line" if frame is None else f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
