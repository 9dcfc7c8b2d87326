"""The second proof, of what contributions begin with: the gradients of the target losses, and the running statistics.

A target loss may leave the graph as a training loss may (`.item()`, numpy, a change in place), in eval mode alone, too.
Its gradient at w_T is then another than the target's, under a proof of the training's gradient that is clean. So the
targets' own gradients are held against differences (`replay.proof.scalars`), at some of them.

Where targets depend on the running statistics of normalisations, these are part of what the training moves
(`replay.proof.running`).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trajrec.errors import DerivativeError, NonFiniteError, TrajrecError, first_line
from trajrec.records import IntArray
from trajrec.replay.derivatives.difference import precisely
from trajrec.replay.derivatives.through import differentiating, hidden_parts
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.seen import Seen
from trajrec.replay.losses.targets import Targets, target_gradients, target_losses
from trajrec.replay.proof.derivative import Derivation, DerivativeProof, lower_precision
from trajrec.replay.proof.running import prove_running
from trajrec.replay.proof.scalars import AGREE, apart
from trajrec.task.task import Batch

if TYPE_CHECKING:
    from trajrec.replay.session import Session

_MOST, _FEW = 16, 8


def prove_targets(session: Session, targets: Targets, proof: DerivativeProof) -> DerivativeProof:
    """Tries the gradients of some target losses. Returns the proof so far, or one that says that they are not proved.

    Raises:
        DerivativeError: if one is not its target's; names what is to blame.
    """
    some = _some(targets)
    weights = session.trajectory.weights(session.run.steps)
    trial = _Trial(session, some, weights.double())
    try:
        with precisely(trial.function):
            found = apart(trial.values, trial.gradients, trial.at, len(weights))
            lower = lower_precision(trial.function, lambda: trial.values(trial.at)) if found > AGREE else None
            has_statistics = len(trial.at) > len(weights)
            depends = has_statistics and bool(trial.gradients(trial.at)[:, len(weights) :].any())
    except NonFiniteError as error:
        return _unproved(proof, f"beside the last weights {first_line(error)}")
    except (TrajrecError, MemoryError):
        raise
    except Exception as error:  # whatever the user's code raises in float64
        reason = f"a target loss cannot be computed in float64 ({type(error).__name__}: {first_line(error)})"
        return _unproved(proof, reason)
    if lower is not None:
        proof = _unproved(proof, f"a target loss computes in {lower} inside (its gradient was off by {found:.0e})")
    elif found > AGREE:
        raise _refusal(found, session.targets_seen or Seen())
    if depends:
        prove_running(session)
    return proof


def _some(targets: Targets) -> Targets:
    places = np.unique(np.linspace(0, len(targets.names) - 1, _MOST).round().astype(int))
    return targets.at(places, most=_FEW)


class _Once(Samples):
    """Batches that are fetched once: items that are random are others each time."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*given, **options)
        self._fetched: dict[bytes, Batch] = {}

    def batch(self, ids: IntArray) -> Batch:
        """The batch of these ids [B], as it was the first time."""
        key = ids.tobytes()
        if key not in self._fetched:
            self._fetched[key] = super().batch(ids)
        return self._fetched[key]


class _Trial:
    """Target losses [M] and their gradients in float64, as functions of weights and running statistics [P' + Q]."""

    def __init__(self, session: Session, targets: Targets, weights: Tensor) -> None:
        self.function: LossFunction = session.differences.function
        self.function.seen = session.function.seen
        self._samples = session.test_samples(_Once, torch.float64, limit=0)
        self._targets, self._size = targets, len(weights)
        self.at = torch.cat([weights, self.function.final_statistics().to(weights)])

    def values(self, at: Tensor) -> Tensor:
        """The losses [M]."""
        return target_losses(self._targets, self.function, self._samples, at)

    def gradients(self, at: Tensor) -> Tensor:
        """Theirs, [M, P' + Q], as a replay takes them; the running statistics are those of the run."""
        with hidden_parts(self.function), differentiating(self.function.seen.hides):
            return target_gradients(self._targets, self.function, self._samples, at[: self._size])


def _unproved(proof: DerivativeProof, reason: str) -> DerivativeProof:
    if proof.verdict is Derivation.NOT_PROVED:
        return proof
    return replace(proof, verdict=Derivation.NOT_PROVED, worst=math.nan, reason=reason)


def _refusal(off: float, seen: Seen) -> DerivativeError:
    why = (
        f"a value leaves the graph by {seen.exits[0]}, and counts as a constant"
        if seen.exits
        else f"the backward pass of {seen.functions[0]} is not the derivative of its forward pass"
        if seen.functions
        else "a part of it is not in the graph (detached in a way that is not seen through, or changed in place), or "
        "the derivative of an operator is wrong"
    )
    return DerivativeError(
        f"The gradient of a target loss is not the one that automatic differentiation gives, off by {off:.1e} of a "
        f"central difference in float64 at the last weights: {why}. Give Task(measure=...) a loss whose every part "
        "is a computation of torch."
    )
