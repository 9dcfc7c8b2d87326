r"""Hypergradients d w_T / d eps_i of chosen samples, by going through the run forwards.

The paper's recurrence (33)-(34) for any optimizer. D_0 = 0, R_0 = 0; for t = 1..T:

    (D_t, R_t) = jvp of U at (w_{t-1}, s_{t-1}, g_t)
                 along (D_{t-1}, R_{t-1}, H_t D_{t-1} + N sum over places of i in the batch of c[t,i] grad l_i)

Hessian-free drops H_t D_{t-1}. C(i, j) = -(1/N) <grad l_j(w_T), D_T>. All of it is linear in the sample: a set of
samples with one eps has one D, the sum of theirs.

Letters: B batch, K samples at once, N samples, P' trainable weights, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trajrec.records import IntArray
from trajrec.replay.derivatives.choice import At, Problem, carried_from_start
from trajrec.replay.losses.statistics import Carried
from trajrec.replay.methods.overflow import check_tangent
from trajrec.replay.proof.certificate import StepChecks
from trajrec.replay.step import Step, initial_state
from trajrec.rules.step import State


@dataclass(slots=True)
class Tangent:
    """The hypergradients of K tracked samples after the steps before `first`.

    Attributes:
        problem: the run, and how it is differentiated.
        tracked: sample ids [K].
        total: N.
        window: first and last step at which the samples' weights count.
        d: D_t [K, P'], and r: R_t by name of the state.
        state: s_t.
        first: the next step to be done.
        carried: the tangents of the running statistics; None where there are none, or without a curvature.
        sets: ids of the samples that are weighed together, K sets of them; None where each is one of `tracked`.
    """

    problem: Problem
    tracked: IntArray
    total: int
    window: tuple[int, int]
    d: Tensor
    r: State
    state: State
    first: int = 1
    carried: Carried | None = None
    sets: tuple[IntArray, ...] | None = None

    @classmethod
    def begin(
        cls,
        problem: Problem,
        tracked: IntArray,
        total: int,
        window: tuple[int, int],
        sets: tuple[IntArray, ...] | None = None,
    ) -> Tangent:
        """The hypergradients before the first step: zero."""
        trajectory = problem.trajectory
        d = torch.zeros(len(tracked), trajectory.layout.size, dtype=trajectory.dtype, device=trajectory.device)
        carried = carried_from_start(problem, len(tracked))
        start = initial_state(trajectory, problem.rule)
        return cls(problem, tracked, total, window, d, State(), start, carried=carried, sets=sets)

    def go(self, checks: StepChecks, advance: Callable[[int], None]) -> Tensor:
        """Goes on forwards to the end. Returns D_T [K, P'].

        Args:
            checks: makes every step again, which also carries the optimizer's state along.
            advance: called with the number of steps done.

        Raises:
            NonFiniteError: if a loss or a hypergradient overflows, naming the step.
            Drifted: if a step differs from the recorded one.
        """
        problem, free = self.problem, self.problem.function.free
        for step in problem.trajectory.forwards(self.first):
            at = problem.forced(step, len(self.tracked))
            gradient, k = free(at.gradient(), step), free(self._force(at, step), step)
            if self.carried is not None:
                extra, self.carried = at.push_statistics(self.d, self.carried)
                k = k if extra is None else k + free(extra, step)
            after = checks.forwards(step, self.state, gradient)
            self.d, self.r = problem.rule.push(step.before, self.state, gradient, step.hyper, self.d, self.r, k)
            check_tangent(self.d, self.tracked, step.t, exact=problem.plan.exact)
            self.state, self.first = after, step.t + 1
            advance(1)
        return self.d

    def _force(self, at: At, step: Step) -> Tensor:
        """What the gradient changes by, [K, P']; without the Hessian only samples of the batch have anything."""
        multipliers = self._places(step).to(self.d.dtype) * at.shares * self.total
        if not self.window[0] <= step.t <= self.window[1]:
            multipliers = torch.zeros_like(multipliers)
        if self.problem.plan.exact:
            return at.forced(self.d, multipliers)
        force = torch.zeros_like(self.d)
        (touched,) = torch.nonzero(multipliers.any(dim=1), as_tuple=True)
        if len(touched):
            force[touched] = at.forced(None, multipliers[touched])
        return force

    def _places(self, step: Step) -> Tensor:
        """Where in the batch the tracked samples are, or those of the sets [K, B]."""
        if self.sets is not None:
            return torch.as_tensor(np.stack([np.isin(step.ids, ids) for ids in self.sets]), device=self.d.device)
        device = self.d.device
        return torch.as_tensor(step.ids, device=device) == torch.as_tensor(self.tracked, device=device)[:, None]
