"""Derivatives that leave the number range are reported at the step where they do, not as NaN at the end.

Where a training is chaotic its derivatives grow like a power of the number of steps, and a long run takes them beyond
the largest float32 (3e38) or float64 (2e308). Nothing after that step means anything, so the replay stops there and
says which target or sample it was, and what can still be asked of this run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajrec.errors import NonFiniteError
from trajrec.records import IntArray


def check_adjoint(
    inner: Tensor, names: IntArray, t: int, last: int, *, exact: bool, called: Callable[[int], str]
) -> None:
    """Checks inner products [K, B] of step t, of `last`, for the targets of these names [K], `called` so in words.

    Raises:
        NonFiniteError: naming the step and a target.
    """
    if bool(torch.isfinite(inner).all()):
        return
    target = called(_first(inner, names))
    later = f" Or ask about the steps after it: --steps {t + 1}:{last}." if t < last else ""
    raise NonFiniteError(
        f"Going backwards, the adjoint of {target} became NaN or infinite at step {t}{_advice(inner, exact)}{later}",
        step=t,
    )


def check_tangent(d: Tensor, tracked: IntArray, t: int, *, exact: bool) -> None:
    """Checks hypergradients [K, P'] after step t for these samples [K].

    Raises:
        NonFiniteError: naming the step and a sample.
    """
    if bool(torch.isfinite(d).all()):
        return
    raise NonFiniteError(
        f"Going forwards, the hypergradient of sample {_first(d, tracked)} became NaN or infinite at step "
        f"{t}{_advice(d, exact)}",
        step=t,
    )


def _first(values: Tensor, names: IntArray) -> int:
    bad = ~torch.isfinite(values).all(dim=1)
    return int(names[int(bad.int().argmax())])


def _advice(values: Tensor, exact: bool) -> str:
    dtype = str(values.dtype).removeprefix("torch.")
    parts = [f": on the way it grew beyond the range of {dtype}, so sensitive is this training to its past."]
    parts += [" --dtype float64 has a wider range."] if values.dtype == torch.float32 else []
    return "".join([*parts, " The Gauss-Newton form (--curvature ggn) is tamer."] if exact else parts)
