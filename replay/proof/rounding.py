r"""What rounding makes of a step, weight by weight: what a right Task may be off by, and a wrong one may not.

Two machines, or two orders of summation, give gradients g and g + e with |e_i| about sigma_i. What becomes of e in a
step depends on the weight: nothing where an optimizer is linear, a whole step where it divides a gradient that is
nothing but rounding (biases before BatchNorm, keys of attention) by its size. So the allowance of weight i is

    a_i = |U(w, s, g + d)_i - U(w, s, g - d)_i|,   d_i = K sigma_i with a sign of its own for each weight,

of this step and of one more like it, which starts from the state that this one leaves: the state before the step has
been made of gradients that were rounded, too. Of a run that keeps keyframes only the whole way from one to the next is
gone again, with d added and with d taken off at every step.

sigma is measured: the gradient at weights a last place away differs from g by rounding of the same size. Against
float64, that was .3 to 3.6 times the true rounding in every parameter of an MLP, two CNNs (with BatchNorm and without)
and a transformer. It is the root mean square over a parameter, and at each weight no less than what was found there.
A row of a parameter that is zero through and through (a token or a unit that took no part, nor in earlier steps, as the
optimizer's state tells) is not rounded at all. What
differs by more than 512 last places of the largest gradient is no rounding: random numbers, or data, that do not come
back.

Letters: P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from trajrec.records import RunSpec
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.gradient import gradient_of
from trajrec.replay.machine.torch_switches import tolerance_of
from trajrec.replay.step import Point, Step
from trajrec.rules import Rule
from trajrec.rules.step import State

FACTOR = 16.0
_MOST = 512.0
_ROW = 4
_TF32 = 2.0**-11

GradientAt = Callable[[Step], Tensor]


def rounding_of(spec: RunSpec, dtype: torch.dtype) -> float:
    """The last place of a floating type, or that of the recording's products where those were coarser."""
    return max(torch.finfo(dtype).eps, _TF32 if tolerance_of(spec) else 0.0)


def on_a_copy(function: LossFunction, samples: Samples) -> GradientAt:
    """A step's gradient by a function that is left as it was: its passes are nobody's.

    By the kernels of the training, which may be others than those that a replay differentiates twice.
    """

    def gradient(step: Step) -> Tensor:
        with function.on_a_copy(), function.fused():
            return gradient_of(function, samples, step)

    return gradient


class Rounding:
    """What rounding makes of the steps of a run.

    Args:
        rule: the optimizer.
        gradient: g_t [P'] of a step, in the coarser of the recording's and the replay's floating types.
        eps: of that type, or more where the recording's arithmetic was coarser.
    """

    def __init__(self, rule: Rule, gradient: GradientAt, eps: float) -> None:
        self._rule = rule
        self._gradient = gradient
        self._eps = eps
        self._levels: Tensor | None = None
        self._signs: Tensor | None = None

    def allowances(self, step: Step, state: State, gradient: Tensor, *, measure: bool = True) -> Iterator[Tensor]:
        """The a_i [P'] of a step: by what earlier steps were rounded by, and then, if need be, by its own rounding."""
        taken = self.taken(gradient, *(value for value in state.values() if value.shape == gradient.shape))
        if self._levels is not None:
            yield self._of_step(step, state, gradient, self._from_levels(gradient) * taken)
        if measure:
            yield self._of_step(step, state, gradient, self.measured(step, gradient) * taken)

    def between(self, first: Step, gradient: Tensor, again: Callable[[Tensor], Point]) -> tuple[Tensor, State]:
        """The a_i [P'] of the way from one keyframe to the next, and the same of the optimizer's state.

        Args:
            first: the first step of the way.
            gradient: its gradient [P'].
            again: goes the way with a change [P'] of every step's gradient, where it is `taken`.
        """
        d = self.measured(first, gradient)
        ahead, behind = again(d), again(-d)
        state = {name: (value - behind.state[name]).abs() for name, value in ahead.state.items()}
        return (ahead.weights - behind.weights).abs(), state

    def measured(self, step: Step, gradient: Tensor) -> Tensor:
        """Finds d [P'] of a step, by its gradient [P'] and one at weights a last place away."""
        generator = torch.Generator().manual_seed(step.t)
        spread = 2 * torch.rand(gradient.shape, generator=generator, dtype=torch.float32) - 1
        moved = step.before * (1 + self._eps * spread.to(step.before))
        other = self._gradient(replace(step, before=moved)).to(gradient)
        largest = float(gradient.abs().max())
        off = (other - gradient).abs().clamp_max(_MOST * self._eps * largest)
        parts = self._rule.layout.split(off)
        counted = torch.stack([(part != 0).sum() for part in parts.values()]).clamp_min(1)
        levels = torch.stack([part.norm() for part in parts.values()]) / counted.sqrt()
        self._levels = levels / (largest or 1.0)
        return FACTOR * torch.maximum(self._spread(levels), off) * self._sign(gradient)

    def _from_levels(self, gradient: Tensor) -> Tensor:
        assert self._levels is not None
        return FACTOR * self._spread(self._levels * gradient.abs().max()) * self._sign(gradient)

    def _spread(self, levels: Tensor) -> Tensor:
        """A number for every parameter as a vector [P']."""
        sizes = torch.tensor(self._rule.layout.sizes, device=levels.device)
        return torch.repeat_interleave(levels, sizes)

    def _sign(self, like: Tensor) -> Tensor:
        if self._signs is None:
            generator = torch.Generator().manual_seed(0)
            self._signs = 2 * torch.randint(0, 2, like.shape, generator=generator, dtype=torch.int8) - 1
        return self._signs.to(like)

    def taken(self, *gradients: Tensor) -> Tensor:
        """Zero at rows of parameters that are zero in every one of these vectors [P'], one elsewhere."""
        found = []
        for parts in zip(*(self._rule.layout.split(gradient).values() for gradient in gradients), strict=True):
            first = parts[0]
            if first.dim() < 2 or first[0].numel() < _ROW:
                found.append(torch.ones_like(first).reshape(-1))
                continue
            taken = torch.stack([part.flatten(1).any(dim=1) for part in parts]).any(dim=0)
            found.append(taken.to(first)[:, None].expand(-1, first[0].numel()).reshape(-1))
        return torch.cat(found)

    def _of_step(self, step: Step, state: State, gradient: Tensor, d: Tensor) -> Tensor:
        with torch.no_grad():
            ends = [self._two_steps(step, state, gradient + sign * d) for sign in (1.0, -1.0)]
            (a, after_a), (b, after_b) = ends
            return torch.maximum((a - b).abs(), (after_a - after_b).abs())

    def _two_steps(self, step: Step, state: State, gradient: Tensor) -> tuple[Tensor, Tensor]:
        one, after = self._rule.step(step.before, state, gradient, step.hyper)
        return one, self._rule.step(step.before, after, gradient, step.hyper)[0]
