r"""Hypergradients d w_T / d eps_i of chosen samples, by going through the run forwards.

The paper's recurrence (33)-(34) for any optimizer. D_0 = 0, R_0 = 0; for t = 1..T:

    (D_t, R_t) = jvp of U at (w_{t-1}, s_{t-1}, g_t)
                 along (D_{t-1}, R_{t-1}, H_t D_{t-1} + N sum over places of i in the batch of c[t,i] grad l_i)

Hessian-free drops H_t D_{t-1}. C(i, j) = -(1/N) <grad l_j(w_T), D_T>.

Letters: B batch, K samples at once, N samples, P' trainable weights, T steps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from trajrec.records import IntArray
from trajrec.replay.adjoint import initial_state
from trajrec.replay.certificate import StepChecks
from trajrec.replay.linearize import Linearization
from trajrec.replay.model import LossFunction, check_finite
from trajrec.replay.samples import Samples
from trajrec.replay.trajectory import Trajectory
from trajrec.rules import Rule
from trajrec.rules.step import State


def tangent(
    trajectory: Trajectory,
    function: LossFunction,
    samples: Samples,
    rule: Rule,
    tracked: IntArray,
    *,
    total: int,
    exact: bool,
    certifier: StepChecks,
    advance: Callable[[int], None],
) -> Tensor:
    """The hypergradients D_T [K, P'] of the tracked samples [K].

    Args:
        trajectory: the run.
        function: per-sample losses.
        samples: the training set.
        rule: the optimizer.
        tracked: sample ids [K].
        total: N.
        exact: with the Hessian.
        certifier: makes every step again, which also carries the optimizer's state along.
        advance: called with the number of steps done.

    Raises:
        NonFiniteError: if a loss or a hypergradient overflows, naming the step.
        Drifted: if a step differs from the recorded one.
    """
    ids = torch.as_tensor(tracked, device=trajectory.device)
    d = torch.zeros(len(tracked), trajectory.layout.size, dtype=trajectory.dtype, device=trajectory.device)
    r, state = State(), initial_state(trajectory, rule)
    for step in trajectory.forwards():
        here = Linearization(function, samples, step)
        state_after = certifier.forwards(step, state, here.gradient)
        batch_ids = torch.as_tensor(step.ids, device=trajectory.device)
        multipliers = (batch_ids == ids[:, None]).to(d.dtype) * here.shares * total
        k = here.forced(d if exact else None, multipliers)
        d, r = rule.push(step.before, state, here.gradient, step.hyper, d, r, k)
        check_finite(d, "A hypergradient", step.t)
        state = state_after
        advance(1)
    return d
