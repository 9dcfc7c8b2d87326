r"""Exact or Hessian-free contributions of ALL samples, by going through the run backwards.

lam_T = grad l_j(w_T), sigma_T = 0; for t = T..1:

    (lam', sigma', gamma) = vjp of U at (w_{t-1}, s_{t-1}, g_t), applied to (lam_t, sigma_t)
    C(i, j)  -= c[t,i] <grad l_i(w_{t-1}), gamma>        for every i in the batch
    lam_{t-1} = lam' + H_t gamma;   sigma_{t-1} = sigma'

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
from trajrec.replay.derivatives.choice import FIRST_ORDER, POINTS, REFERENCE, Problem, at_once, kind_of, point_at
from trajrec.replay.derivatives.derivatives import Derivatives, Wanted
from trajrec.replay.derivatives.operators import operator_without
from trajrec.replay.derivatives.pieces import cut
from trajrec.replay.derivatives.reverse import saved_bytes
from trajrec.replay.methods.overflow import check_adjoint
from trajrec.replay.methods.pull import NumberPuller, Pulled, Puller, VectorPuller, directions_of, scaled
from trajrec.replay.proof.certificate import StepChecks
from trajrec.replay.step import Step, initial_state
from trajrec.rules.step import State


@dataclass(slots=True)
class Adjoint:
    """The adjoint of K targets after the steps `done`, T first: what a replay that is taken up again begins with.

    Attributes:
        puller: lam and sigma.
        names: of the targets [K].
        first: the next step to be done.
        until: the last step to be done, going backwards; 1 for the whole run.
    """

    problem: Problem
    puller: Puller
    names: IntArray
    first: int
    until: int

    @classmethod
    def begin(cls, problem: Problem, targets: Tensor, names: IntArray, until: int = 1) -> Adjoint:
        """The adjoint at the end of the run, from gradients of K target losses at w_T, [K, P'], and their names."""
        numbers = problem.rule.constant and not problem.exact
        puller = (NumberPuller if numbers else VectorPuller)(problem.rule, targets)
        return cls(problem, puller, names, problem.trajectory.run.steps, until)

    @property
    def initial(self) -> State:
        """s_0; needed once at the end, so not kept on the way."""
        return initial_state(self.problem.trajectory, self.problem.rule)

    def go(
        self,
        certifier: StepChecks | None,
        collect: Callable[[Step, Tensor], None],
        advance: Callable[[int], None],
    ) -> None:
        """Goes on backwards and hands over the contributions of every step.

        Args:
            certifier: checks steps, or None where another pass has done so.
            collect: called with each step and its contributions [K, B].
            advance: called with the number of steps done.

        Raises:
            NonFiniteError: if a loss or the adjoint overflows, naming the step.
            Drifted: if a step differs from the recorded one.
        """
        last = self.problem.trajectory.run.steps
        for step in self.problem.trajectory.backwards(self.first):
            if step.t < self.until:
                break
            pulled, found = self._at(step, certifier)
            if certifier is not None:
                certifier.backwards(step, self._free(found.gradient, step))
            self.puller.accept(pulled, found.hvp)
            inner = scaled(found.inner, pulled, self.problem.rule)
            check_adjoint(inner, self.names, step.t, last, exact=self.problem.exact)
            collect(step, -found.shares * inner)
            # Gamma and the gradient are as large as the weights: not beside those of the next step.
            del pulled, found
            self.first = step.t - 1
            advance(1)
        if certifier is not None and self.first == 0:
            certifier.finish_backwards(self.initial)

    def _free(self, gradient: Tensor | None, step: Step) -> Tensor | None:
        return None if gradient is None else self.problem.function.free(gradient, step)

    def _at(self, step: Step, certifier: StepChecks | None) -> tuple[Pulled, Derivatives]:
        """One step: the optimizer's part, and derivatives along its gamma."""
        state = self._state(step)
        wanted: Wanted = certifier is not None and certifier.wants(step)
        if certifier is not None and wanted:
            wanted = certifier.among(step) or True
        made: list[Pulled] = []
        function = self.problem.function

        # A form is tried as most steps will need it, not as the first, which is always checked.
        usual = wanted if certifier is not None and certifier.stride == 1 else False

        def trial(name: str, wanted: Wanted = usual) -> Derivatives:
            made.clear()  # as large as a few times the weights: not beside what takes its place
            point = point_at(POINTS[name], self.problem, step)
            gradient = function.free(point.gradient(), step) if self.puller.needs_gradient else None
            made[:] = [self.puller.pull(step, state, gradient)]
            directions = function.free(directions_of(made[0], self.problem.rule), step)
            found: Derivatives = point.along(directions, hessian=self.problem.exact, gradient=wanted)
            return found

        found = self._in_a_form(step, trial, wanted)
        return made[0], found

    def _in_a_form(self, step: Step, trial: Callable[..., Derivatives], wanted: Wanted) -> Derivatives:
        """Derivatives in the form that was chosen; in a plainer one at a step where that cannot be computed."""
        forms, exact = self.problem.forms, self.problem.exact
        kind = kind_of(step, self.puller.count, hessian=exact)
        if self.puller.count > 1:
            self._settle_chunk(step)
        for candidates in (self._candidates(step), (REFERENCE,)):
            try:
                return trial(forms.form(kind, candidates, trial), wanted)
            except RuntimeError as error:  # a model may use its weights otherwise than at the step that was tried
                # Nothing takes the place of a curvature that was asked for.
                last = exact and (candidates == (REFERENCE,) or forms.gauss_newton)
                if last or not (isinstance(error, NotImplementedError) or operator_without(error)):
                    raise
                forms.names.pop(kind, None)
        self._settle_chunk(step)
        return trial(forms.form(kind, self._first_order(step), trial), wanted)

    def _settle_chunk(self, step: Step) -> None:
        function, samples = self.problem.function, self.problem.samples
        self.problem.forms.settle_chunk(lambda: saved_bytes(function, samples, self._piece(step)))

    def _candidates(self, step: Step) -> tuple[str, ...]:
        """The forms that may serve."""
        if self.problem.function.takes_derivatives:
            # What the others make of derivatives within need not show at the step where they are tried.
            return ("reverse",) if self.puller.count == 1 else ("reverse", "batched")
        if self.puller.count == 1:
            return ("forward", "reverse")
        if self.problem.exact:
            return ("reverse", "batched", "forward")
        samples = ("samples",) if self._fits(step) else ()
        return ("reverse", "layers", *samples, "batched", "forward")

    def _first_order(self, step: Step) -> tuple[str, ...]:
        """The forms that may serve where only first derivatives are to be had."""
        return tuple(name for name in FIRST_ORDER if name != "samples" or self._fits(step))

    def _fits(self, step: Step) -> bool:
        """Whether the gradients of all samples fit into the memory."""
        return at_once(self.problem, step) * step.before.nbytes <= self.problem.forms.memory

    def _piece(self, step: Step) -> Step:
        """What of a step is computed at once."""
        size = at_once(self.problem, step)
        return step if size == len(step.ids) else next(cut(self.problem.function, self.problem.samples, step, size))

    def norms(self) -> Tensor:
        """|lam| of every target, [K]."""
        return self.puller.norms()

    def _state(self, step: Step) -> State:
        if step.state is not None:
            return step.state
        return self.initial if step.t == 1 else self.problem.rule.placeholder_state(step.before)
