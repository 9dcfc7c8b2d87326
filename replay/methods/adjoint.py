r"""Exact or Hessian-free contributions of ALL samples, by going through the run backwards.

lam_T = grad l_j(w_T), sigma_T = 0; for t = T..1:

    (lam', sigma', gamma) = vjp of U at (w_{t-1}, s_{t-1}, g_t), applied to (lam_t, sigma_t)
    C(i, j)  -= c[t,i] <grad l_i(w_{t-1}), gamma>        for every i in the batch
    lam_{t-1} = lam' + H_t gamma;   sigma_{t-1} = sigma'

Running statistics of normalisations are state, too (`replay.derivatives.statistics`).

Hessian-free drops H_t gamma and nothing else. This is the paper's hypergradient (supplement, (30) to (34)) in reverse
mode; the factor N of its sample weights cancels against the 1/N of its contribution (7).

The gradient g_t is computed where it is needed: at every step for an optimizer whose derivative depends on it, and at
the steps that the certificate checks.

Letters: B batch, E epochs, K targets at once, N samples, P' trainable weights, T steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trajrec.records import IntArray
from trajrec.replay.derivatives.choice import Problem, carried_of
from trajrec.replay.losses.statistics import Carried
from trajrec.replay.methods.overflow import check_adjoint
from trajrec.replay.methods.pull import NumberPuller, Puller, VectorPuller
from trajrec.replay.proof.accuracy import Accuracy, steps_tried, twin
from trajrec.replay.proof.certificate import StepChecks
from trajrec.replay.step import Step, initial_state
from trajrec.rules.step import State


@dataclass(slots=True)
class Adjoint:
    """The adjoint of K targets after the steps `done`, T first: what a replay that is taken up again begins with.

    Attributes:
        problem: what is differentiated.
        puller: lam and sigma.
        names: of the targets [K].
        first: the next step to be done.
        until: the last step to be done, going backwards; 1 for the whole run.
        carried: the cotangent of the running statistics; None where there are none, or without a curvature.
        called: a target in words, for messages.
        accuracy: where it is noted what the numbers are good to; None tries nothing.
    """

    problem: Problem
    puller: Puller
    names: IntArray
    first: int
    until: int
    carried: Carried | None = None
    called: Callable[[int], str] = "target {}".format
    accuracy: Accuracy | None = None

    @classmethod
    def begin(
        cls, problem: Problem, targets: Tensor, names: IntArray, until: int = 1, statistics: Tensor | None = None
    ) -> Adjoint:
        """The adjoint at the end of the run.

        Args:
            problem: what is differentiated.
            targets: gradients of K target losses at w_T, [K, P'].
            names: of the targets [K].
            until: the last step to be done.
            statistics: gradients of the target losses by the running statistics [K, Q], or None.
        """
        numbers = problem.rule.constant and not problem.plan.exact
        puller = (NumberPuller if numbers else VectorPuller)(problem.rule, targets)
        carried = carried_of(problem, statistics)
        return cls(problem, puller, names, problem.trajectory.run.steps, until, carried)

    @property
    def initial(self) -> State:
        """s_0; needed once at the end, so not kept on the way."""
        return initial_state(self.problem.trajectory, self.problem.rule)

    def go(
        self, checks: StepChecks | None, collect: Callable[[Step, Tensor], None], advance: Callable[[int], None]
    ) -> None:
        """Goes on backwards and hands over the contributions of every step.

        Args:
            checks: of the steps, or None where another pass has made them.
            collect: called with each step and its contributions [K, B].
            advance: called with the number of steps done.

        Raises:
            NonFiniteError: if a loss or the adjoint overflows, naming the step.
            Drifted: if a step differs from the recorded one.
        """
        problem, puller, free = self.problem, self.puller, self.problem.function.free
        for step in problem.trajectory.backwards(self.first):
            if step.t < self.until:
                break
            wanted = checks is not None and checks.wants(step)
            usual = wanted and checks is not None and checks.stride == 1
            at = problem.at(step, puller.count, gradient=wanted, first=puller.needs_gradient, usual=usual)
            pulled = puller.pull(step, self._state(step), free(at.gradient(), step) if puller.needs_gradient else None)
            found = at.along(free(pulled.gamma, step), self.carried)
            if checks is not None:
                checks.backwards(step, None if found.gradient is None else free(found.gradient, step))
            inner = pulled.scaled(found.inner)
            last, exact = problem.trajectory.run.steps, problem.plan.exact
            check_adjoint(inner, self.names, step.t, last, exact=exact, called=self.called)
            collect(step, -found.shares * inner)
            self._try_accuracy(step, found.shares * inner, found.hvp)
            puller.accept(pulled, found.hvp)
            self.carried = found.carried
            # Gamma and the gradient are as large as the weights: not beside those of the next step.
            del at, pulled, found
            self.first = step.t - 1
            advance(1)
        if checks is not None and self.first == 0:
            checks.finish_backwards(self.initial)

    def _try_accuracy(self, step: Step, added: Tensor, hvp: Tensor | None) -> None:
        """Computes at a few steps once more what they add, as other rounding makes it."""
        if self.accuracy is None or step.t not in steps_tried(self.until, self.problem.trajectory.run.steps):
            return
        problem, puller, free, other = self.problem, self.puller, self.problem.function.free, twin(step)
        at = problem.at(other, puller.count, gradient=False, first=puller.needs_gradient)
        gradient = free(at.gradient(), step) if puller.needs_gradient else None
        pulled = puller.pull(step, self._state(step), gradient)
        found = at.along(free(pulled.gamma, step), self.carried)
        difference = found.shares * pulled.scaled(found.inner) - added
        self.accuracy.note(step, difference, hvp, found.hvp, puller.norms())

    def norms(self) -> Tensor:
        """|lam| of every target, [K]."""
        return self.puller.norms()

    def _state(self, step: Step) -> State:
        if step.state is not None:
            return step.state
        return self.initial if step.t == 1 else self.problem.rule.placeholder_state(step.before)
