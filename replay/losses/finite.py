"""Losses that are no numbers: at which step, and of which samples."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import NonFiniteError
from trajrec.records import IntArray


def check_finite(
    values: Tensor, what: str, t: int | None, ids: IntArray | None = None, shares: Tensor | None = None
) -> None:
    """Checks values [B] of step t, or of the final weights; `ids` [B] are those of the samples, `shares` their c.

    Raises:
        NonFiniteError: naming the step, and the samples where only some are concerned.
    """
    finite = torch.isfinite(values)
    if bool(finite.all()):
        return
    which, advice = _not_finite(finite, "sample" if t is not None else "test sample", ids, shares)
    if t is None:
        raise NonFiniteError(f"{what} at the final weights is NaN or infinite{which}: it has no contributions.{advice}")
    raise NonFiniteError(
        f"{what} at step {t} became NaN or infinite{which}; the replay cannot go on past that step.{advice}"
    )


def _not_finite(finite: Tensor, noun: str, ids: IntArray | None, shares: Tensor | None) -> tuple[str, str]:
    """The samples whose losses are not finite, in words, and what helps where they are the fault of these samples."""
    if ids is None:
        return "", ""
    bad = np.flatnonzero(~finite.cpu().numpy())
    names = ", ".join(map(str, ids[bad[:5]]))
    which = f" for {noun}{'s' * (len(bad) > 1)} {names}{', ...' * (len(bad) > 5)}"
    if shares is not None and bool((shares[~finite] == 0).all()):
        return which, (
            " It weighs nothing in the training's mean: it has no valid label (-100 everywhere, say), and its own mean "
            "is 0/0. Let Task.loss divide by count.clamp(min=1): it then counts nothing."
        )
    if len(bad) < len(ids):
        return which, (
            " The others of its batch are finite: has it no valid label (-100 everywhere, a mean over nothing), or is "
            "there NaN in its data?"
        )
    return which, ""


def check_gradients(gradients: Tensor, names: IntArray, called: Callable[[int], str]) -> None:
    """Checks the gradients [M, P'] of targets of these names [M], which are called so in words.

    Raises:
        NonFiniteError: naming the target, and what its finite loss must be doing.
    """
    bad = ~torch.isfinite(gradients).all(dim=1)
    if bool(bad.any()):
        name = int(names[int(bad.int().argmax())])
        raise NonFiniteError(
            f"The loss of {called(name)} is finite at the final weights, and its gradient is not: a root, a power or a "
            "logarithm of zero, as in a distance of equal points. Add a small number inside, in Task(measure=...): "
            "(x + eps).sqrt()."
        )
