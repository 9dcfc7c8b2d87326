"""Why a replay drifted: found by trying.

A drifted step is made again under one suspicion after the other, and what comes out is compared with the recording. A
suspicion that brings the drift down to rounding is the cause, for a step has far more weights than a suspicion has free
numbers. Suspected are

    the batch           that of a neighbouring step; of a step twice as long
    the modes           train instead of eval mode, or the other way round
    randomness          drawn where the training drew none, or not drawn where it did
    the gradient        f(g) = s g (loss scale; clipping by norm if only some steps need it), cut to [-v, v],
                        g + lam w (weight decay in the loss), g + lam sign(w) (an L1 penalty)

The numbers s and lam are fitted by Gauss-Newton steps, which are exact for an optimizer that is linear in the gradient.
Of a run that keeps keyframes only, all steps between two keyframes are made again.

Letters: P' trainable weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.proof.refusal import Drifted
from trajrec.replay.step import Part, RecordedRun, Step, make_step
from trajrec.rules import Rule
from trajrec.rules.composed.transformed import TransformedRule

_FITTED = 12
_HALVED = 12
_LARGEST = 50.0
_EXPLAINED = 1e-3
_MOST_STEPS = 256

GradientChange = Callable[[Tensor, Tensor], Tensor]
StepChange = Callable[[Step], Step]


def _unchanged(step: Step) -> Step:
    return step


@dataclass(frozen=True, slots=True)
class Cause:
    """A cause in a sentence, with what to do about it, and the drift that is left under it."""

    sentence: str
    drift: float


class Diagnosis:
    """Tries suspicions on a drifted step.

    Args:
        run: the recording.
        function: the Task's losses.
        samples: the training set; its inputs are not checked here.
        rule: the optimizer.
        drifted: the drift, with the point before it.
    """

    def __init__(
        self, run: RecordedRun, function: LossFunction, samples: Samples, rule: Rule, drifted: Drifted
    ) -> None:
        self.run = run
        self.function = function
        self.samples = samples
        self.rule = rule
        dtype = samples.dtype  # rows between keyframes come in the recording's own
        self.first = replace(drifted.probe, before=drifted.probe.before.to(dtype))
        self.state = drifted.state and {n: v if n in rule.scalars else v.to(dtype) for n, v in drifted.state.items()}
        self.last = drifted.seen_at
        self.target = None if drifted.recorded is None else drifted.recorded.to(dtype)
        self.drift = drifted.drift
        self._gradient: Tensor | None = None

    def cause(self) -> Cause | None:
        """The first suspicion that explains the drift, or None."""
        if self.state is None or self.target is None or self.last - self.first.t >= _MOST_STEPS:
            return None
        checked, self.samples.checks_inputs = self.samples.checks_inputs, False
        try:
            found = (suspicion() for suspicion in self._suspicions())
            return next((cause for cause in found if cause is not None), None)
        finally:
            self.samples.checks_inputs = checked

    def _suspicions(self) -> Sequence[Callable[[], Cause | None]]:
        return (
            self._given_change,
            self._modes,
            self._randomness,
            self._batch,
            self._scale,
            self._value,
            self._decay,
            self._l1,
        )

    # -- making the step again -------------------------------------------------------------------------------------

    def _reached(self, change: StepChange, of: GradientChange = lambda g, _: g) -> Tensor:
        """The weights after the last step, under changes of the steps and of their gradients."""
        weights, state = self.first.before, self.state
        assert state is not None
        for t in range(self.first.t, self.last + 1):
            step = change(make_step(self.run, t, weights, weights))
            as_recorded = change is _unchanged and t == self.first.t
            gradient = self._first_gradient() if as_recorded else gradient_of(self.function, self.samples, step)
            with torch.no_grad():
                weights, state = self.rule.step(weights, state, of(gradient, weights), step.hyper)
        return weights

    def _first_gradient(self) -> Tensor:
        """The gradient of the first step, computed once."""
        if self._gradient is None:
            self._gradient = gradient_of(self.function, self.samples, self.first)
        return self._gradient

    def _drift(self, reached: Tensor) -> float:
        assert self.target is not None
        moved = float((self.target - self.first.before).abs().max())
        return float((reached - self.target).abs().max()) / moved if moved else float("inf")

    def _explained(self, reached: Tensor, sentence: str) -> Cause | None:
        drift = self._drift(reached)
        return Cause(sentence, drift) if drift <= _EXPLAINED * min(self.drift, 1.0) else None

    # -- the step --------------------------------------------------------------------------------------------------

    def _given_change(self) -> Cause | None:
        """Whether the Task changes a gradient that the training left alone."""
        rule = self.rule
        if not isinstance(rule, TransformedRule):
            return None
        self.rule = rule.rule
        try:
            reached = self._reached(_unchanged)
        finally:
            self.rule = rule
        return self._explained(
            reached, "Task.gradient changes the gradient of this step, and the training left it as it was."
        )

    def _modes(self) -> Cause | None:
        """Train or eval mode, of the model as a whole or of one kind of layer."""
        for modes, words in self._other_modes():
            changed = replace(self.first.conditions, eval_modules=modes)
            cause = self._tried(lambda step, to=changed: replace(step, conditions=to))  # type: ignore[misc]
            if cause is not None:
                return replace(cause, sentence=words)
        return None

    def _other_modes(self) -> Iterator[tuple[tuple[str, ...], str]]:
        now = self.first.conditions.eval_modules
        if now:
            yield (
                (),
                (
                    "The training step was made in train mode, although the model was in eval mode when the optimizer "
                    "stepped: call model.train() before the forward pass and leave the mode alone until step()."
                ),
            )
        if now != ("",):
            yield (
                ("",),
                (
                    "The training step was made in eval mode and the Task's in train mode, or by a model without its "
                    "dropout. Build the same model, and let Task.loss make the same calls of train() and eval() as the "
                    "loop."
                ),
            )

    def _randomness(self) -> Cause | None:
        draws, drew = self._is_random(), any(part.rng for part in self.first.parts)
        if not self._comes_back():
            sentence = (
                "The Task's loss draws random numbers from a generator of its own, whose state is not recorded: draw "
                "them from torch's default generator."
            )
        elif draws and not drew:
            sentence = (
                "The Task's loss draws random numbers where the training step drew none: dropout, noise or "
                "augmentation that the training did not have."
            )
        elif drew and not draws:
            sentence = (
                "The training step drew random numbers and the Task's loss draws none: its dropout, noise or "
                "augmentation is missing in the Task."
            )
        else:
            return None
        return Cause(sentence, float("nan"))

    def _is_random(self) -> bool:
        """Whether the loss depends on the state of torch's generator, or on another."""
        with torch.random.fork_rng(devices=[]):
            values = [self._loss(seed) for seed in (0, 1)]
        return values[0] != values[1]

    def _comes_back(self) -> bool:
        """Whether the same state of torch's generator gives the same loss."""
        with torch.random.fork_rng(devices=[]):
            return self._loss(0) == self._loss(0)

    def _loss(self, seed: int) -> float:
        torch.manual_seed(seed)
        step = replace(self.first, parts=tuple(Part(part.span) for part in self.first.parts))
        return self.function.value(self.first.before, self.samples, step)

    def _batch(self) -> Cause | None:
        """The samples of a neighbouring step."""
        for offset in (1, -1, 2, -2):
            if 1 <= self.first.t + offset <= self.run.steps and 1 <= self.last + offset <= self.run.steps:
                cause = self._tried(lambda step, by=offset: self._with_batch_of(step, by))  # type: ignore[misc]
                if cause is not None:
                    sentence = (
                        f"The step was made with another batch: that of step {self.first.t + offset} gives the "
                        "recorded weights. The ids passed to trajrec.set_batch are shifted, or the loop keeps a batch "
                        "for a later step: name the ids of every step with trajrec.set_batch."
                    )
                    return replace(cause, sentence=sentence)
        return None

    def _with_batch_of(self, step: Step, offset: int) -> Step:
        other = make_step(self.run, step.t + offset, step.before, step.after)
        return replace(step, ids=other.ids, shares=other.shares, parts=other.parts, epoch=other.epoch)

    def _tried(self, change: StepChange) -> Cause | None:
        return self._explained(self._reached(change), "")

    # -- the gradient ----------------------------------------------------------------------------------------------

    def _scale(self) -> Cause | None:
        def scaled(logarithm: float) -> Tensor:
            return self._reached(_unchanged, lambda g, _: math.exp(min(logarithm, _LARGEST)) * g)

        recorded, computed = self.run.loss(self.first.t), self._step_loss()
        starts = [0.0, math.log(recorded / computed)] if min(recorded, computed) > 0 else [0.0]
        logarithm, reached = self._fit(scaled, starts)
        s = math.exp(min(logarithm, _LARGEST))
        norm = float(self._first_gradient().norm())
        sentence = f"The training's gradient is {s:.4g} times the Task's: its norm {s * norm:.4g}, not {norm:.4g}. "
        if s < 1 and self._loss_agrees(recorded, computed):
            advice = (
                "The loss itself agrees, so it was clipped by its norm, Task(gradient=trajrec.clip_norm"
                f"({s * norm:.3g})), or scaled, Task(gradient=lambda g: {{n: {s:.4g} * v for n, v in g.items()}})."
            )
        else:
            advice = (
                "Another loss scale: a sum for a mean, a factor before the loss, or micro-batches averaged otherwise. "
                "Give Task.loss the factor, or Task(reduction=...)."
            )
        return self._explained(reached, sentence + advice)

    def _step_loss(self) -> float:
        return self.function.value(self.first.before, self.samples, self.first)

    def _loss_agrees(self, recorded: float, computed: float) -> bool:
        return abs(recorded - computed) <= 1e-3 * max(abs(recorded), 1e-12)

    def _value(self) -> Cause | None:
        """Cut values: the limit is the largest value of the gradient that was not cut, or just below."""
        low, high = 0.0, float(self._first_gradient().abs().max())

        def cut(limit: float) -> Tensor:
            return self._reached(_unchanged, lambda g, _: g.clamp(-limit, limit))

        limit, reached = self._least(cut, low, high)
        sentence = f"The training's gradient was clipped by value: Task(gradient=trajrec.clip_value({limit:.3g}))."
        return self._explained(reached, sentence)

    def _decay(self) -> Cause | None:
        """Weight decay that the optimizer does not know of: of all weights, or of the matrices alone."""
        for mask, which in ((None, ""), (self._matrices(), " if p.dim() > 1")):
            squares = self.first.before.square() if mask is None else self.first.before.square() * mask
            starts = self._from_loss(float(squares.sum()) / 2)
            lam, reached = self._fit(lambda x, on=mask: self._decayed(x, on), starts)  # type: ignore[misc]
            penalty = f"{lam / 2:.4g} * sum(p.square().sum() for p in model.parameters(){which})"
            sentence = (
                f"The training's gradient holds {lam:.4g} times the weights more: a weight decay in the loss, which is "
                f"missing in the Task: Task(penalty=lambda model: {penalty})."
            )
            if (cause := self._explained(reached, sentence)) is not None:
                return cause
        return None

    def _from_loss(self, penalty: float) -> list[float]:
        """Where to look for the factor of a penalty: zero, and what explains the difference of the losses."""
        missing = self.run.loss(self.first.t) - self._step_loss()
        return [0.0, missing / penalty] if penalty and math.isfinite(missing) else [0.0]

    def _decayed(self, lam: float, mask: Tensor | None) -> Tensor:
        return self._reached(_unchanged, lambda g, w: g + lam * (w if mask is None else w * mask))

    def _matrices(self) -> Tensor:
        """One for weights of parameters with two or more dimensions, zero for others, [P']."""
        parts = self.function.layout.split(torch.ones_like(self.first.before))
        return self.function.layout.join({name: part * float(part.dim() > 1) for name, part in parts.items()})

    def _l1(self) -> Cause | None:
        starts = self._from_loss(float(self.first.before.abs().sum()))
        lam, reached = self._fit(lambda x: self._reached(_unchanged, lambda g, w: g + x * w.sign()), starts)
        penalty = f"{lam:.4g} * sum(p.abs().sum() for p in model.parameters())"
        sentence = (
            f"The training's gradient holds an L1 penalty of {lam:.4g}, which is missing in the Task: "
            f"Task(penalty=lambda model: {penalty})."
        )
        return self._explained(reached, sentence)

    # -- fitting ---------------------------------------------------------------------------------------------------

    def _fit(self, reached: Callable[[float], Tensor], starts: Sequence[float]) -> tuple[float, Tensor]:
        """The number whose weights come nearest to the recorded ones, by Gauss-Newton steps from the best start."""
        assert self.target is not None
        x = min(starts, key=lambda start: self._drift(reached(start)))
        found = reached(x)
        for _ in range(_FITTED):
            h = 1e-3 * max(abs(x), 1e-3)
            slope = (reached(x + h) - found).double() / h
            if not bool(slope.any()):
                break
            step = -float((slope * (found - self.target).double()).sum() / slope.square().sum())
            for _ in range(_HALVED):
                made = reached(x + step)
                if self._drift(made) < self._drift(found):
                    break
                step /= 2
            else:
                break
            x, found = x + step, made
        return x, found

    def _least(self, reached: Callable[[float], Tensor], low: float, high: float) -> tuple[float, Tensor]:
        """The number in an interval whose weights come nearest to the recorded ones, by golden sections."""
        ratio = 0.6180339887498949
        for _ in range(48):
            a, b = high - ratio * (high - low), low + ratio * (high - low)
            if self._drift(reached(a)) <= self._drift(reached(b)):
                high = b
            else:
                low = a
        middle = (low + high) / 2
        return middle, reached(middle)
