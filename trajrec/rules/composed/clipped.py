"""A rule behind the clipping that the recording notes, which may be another at every step.

The hyperparameters [G, H + 1] that it is given have one column more: which of the noted functions the step's gradient
goes through. What is behind it sees the H columns of the recording.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from trajrec.records import FloatArray, Keyframe
from trajrec.rules.composed.transformed import Gradients, TransformedRule
from trajrec.rules.part import Part
from trajrec.rules.step import Rule, State

Transform = Callable[[Gradients], Gradients]


def _as_they_are(gradients: Gradients) -> Gradients:
    return gradients


class ClippedRule(TransformedRule):
    """Another rule behind the function of the gradients that the last column of the hyperparameters numbers."""

    source = "The clipping that the recording notes"

    def __init__(self, rule: Rule, transforms: Sequence[Transform]) -> None:
        super().__init__(rule, _as_they_are)
        self.transforms = transforms

    @property
    def untransformed(self) -> Rule:
        """The step without any of the functions, of the same hyperparameters."""
        return ClippedRule(self.rule, [_as_they_are] * len(self.transforms))

    def cut(self, part: Part) -> ClippedRule:
        """The other rule of a part of the weights, behind the same functions."""
        return ClippedRule(self.rule.cut(part), self.transforms)

    def rests(self, hyper: FloatArray, index: int) -> bool:
        """The other rule's."""
        return self.rule.rests(hyper[:, :-1], index)

    def transformed(self, gradient: Tensor, hyper: FloatArray) -> Tensor:
        """f_t(g) [P'] of a gradient [P']."""
        self.transform = self.transforms[int(hyper[0, -1])]
        return super().transformed(gradient, hyper)

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The other rule's."""
        return self.rule.initial_state(keyframe, hyper[:, :-1], dtype, device)

    def implied_state(self, before: Tensor, after: Tensor, gradient: Tensor, hyper: FloatArray) -> State | None:
        """The other rule's, of the clipped gradient."""
        return self.rule.implied_state(before, after, self.transformed(gradient, hyper), hyper[:, :-1])

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, the loop's g_t [P'] and hyperparameters [G, H + 1]; differentiable."""
        return self.rule.step(weights, state, self.transformed(gradient, hyper), hyper[:, :-1])

    def options(self, hyper: FloatArray, index: int) -> dict[str, object]:
        """The other rule's."""
        return self.rule.options(hyper[:, :-1], index)
