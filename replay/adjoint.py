r"""Exact or Hessian-free contributions of ALL samples, by going through the run backwards.

lam_T = grad l_j(w_T), sigma_T = 0; for t = T..1:

    (lam', sigma', gamma) = vjp of U at (w_{t-1}, s_{t-1}, g_t), applied to (lam_t, sigma_t)
    C(i, j)  -= c[t,i] <grad l_i(w_{t-1}), gamma>        for every i in the batch
    lam_{t-1} = lam' + H_t gamma;   sigma_{t-1} = sigma'

Hessian-free drops H_t gamma and nothing else. This is the paper's hypergradient (supplement, (30) to (34)) in reverse
mode; the factor N of its sample weights cancels against the 1/N of its contribution (7).

Letters: B batch, E epochs, K targets at once, N samples, P' trainable weights, T steps.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from trajrec.replay.certificate import StepChecks
from trajrec.replay.linearize import Linearization
from trajrec.replay.model import LossFunction, check_finite
from trajrec.replay.samples import Samples
from trajrec.replay.trajectory import Step, Trajectory
from trajrec.rules import Rule
from trajrec.rules.step import State


def adjoint(
    trajectory: Trajectory,
    function: LossFunction,
    samples: Samples,
    rule: Rule,
    targets: Tensor,
    *,
    exact: bool,
    certifier: StepChecks | None,
    collect: Callable[[Step, Tensor], None],
    advance: Callable[[int], None],
) -> None:
    """Goes through the run backwards and hands over the contributions of every step.

    Args:
        trajectory: the run.
        function: per-sample losses.
        samples: the training set.
        rule: the optimizer.
        targets: gradients of K target losses at w_T, [K, P'].
        exact: with the Hessian.
        certifier: checks every step, or None where another pass has done so.
        collect: called with each step and its contributions [K, B].
        advance: called with the number of steps done.

    Raises:
        NonFiniteError: if a loss or the adjoint overflows, naming the step.
        Drifted: if a step differs from the recorded one.
    """
    lam, sigma = targets, State()
    initial = initial_state(trajectory, rule)
    for step in trajectory.backwards():
        state = step.state
        if state is None:
            state = initial if step.t == 1 else rule.placeholder_state(step.before)
        here = Linearization(function, samples, step)
        if certifier is not None:
            certifier.backwards(step, here.gradient)
        pulled, sigma, gamma = rule.pull(step.before, state, here.gradient, step.hyper, lam, sigma)
        if exact:
            inner, hvp = here.inner_products_and_hvp(gamma)
            lam = pulled + hvp
        else:
            inner, lam = here.inner_products(gamma), pulled
        check_finite(inner, "The adjoint (it grew beyond the number range going backwards)", step.t)
        collect(step, -here.shares * inner)
        advance(1)
    if certifier is not None:
        certifier.finish_backwards(initial)


def initial_state(trajectory: Trajectory, rule: Rule) -> State:
    """s_0: the optimizer's state before the first recorded step."""
    run = trajectory.run
    return rule.initial_state(run.keyframe(0), run.hyper(1), trajectory.dtype, trajectory.device)
