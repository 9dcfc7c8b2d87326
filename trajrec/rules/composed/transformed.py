"""A rule whose gradient goes through the loop's own function first: clipping by norm or value, scaling, centring.

    (w_t, s_t) = U(w_{t-1}, s_{t-1}, f(g_t); h_t)

f belongs to the step, so both directions of differentiation go through it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from trajrec.errors import TaskError
from trajrec.records import FloatArray, Keyframe
from trajrec.rules.part import Part
from trajrec.rules.step import Rule, State

Gradients = dict[str, Tensor]


class TransformedRule(Rule):
    """Another rule behind a function of the gradients by parameter name.

    Attributes:
        source: who says that function.
    """

    source = "Task.gradient"

    def __init__(self, rule: Rule, transform: Callable[[Gradients], Gradients]) -> None:
        self.rule = rule
        self.transform = transform
        self.spec = rule.spec
        self.layout = rule.layout
        self.names = rule.names
        self.optimizer_class = rule.optimizer_class
        self.needs_state = rule.needs_state
        self.tolerance = rule.tolerance
        self._order = sorted(rule.layout.params, key=lambda p: p.offset)

    @property
    def scalars(self) -> frozenset[str]:  # type: ignore[override]
        """The other rule's, which may learn of new ones on the way."""
        return self.rule.scalars

    def proving(self) -> AbstractContextManager[None]:
        """The other rule's."""
        return self.rule.proving()

    def suspects(self) -> str:
        """The other rule's."""
        return self.rule.suspects()

    def accept(self, proved: Rule) -> None:
        """Tells the other rule."""
        self.rule.accept(proved.rule if isinstance(proved, TransformedRule) else proved)

    @property
    def untransformed(self) -> Rule:
        """The step without the function, of the same hyperparameters."""
        return self.rule

    def cut(self, part: Part) -> TransformedRule:
        """The other rule of a part of the weights, behind the same function."""
        return TransformedRule(self.rule.cut(part), self.transform)

    def cut_state(self, state: State, part: Part) -> State:
        """The other rule's."""
        return self.rule.cut_state(state, part)

    def transformed(self, gradient: Tensor, hyper: FloatArray) -> Tensor:
        """f(g) [P'] of a gradient [P']; parameters that the step passes by have no gradient in the loop, either.

        Raises:
            TaskError: if it has other names or shapes than the gradients that went in.
        """
        resting = {group for group in range(len(hyper)) if self.rests(hyper, group)}
        parts = self.layout.split(gradient)
        given = {p.name: parts[p.name] for p in self._order if p.group not in resting}
        found = self.transform(given)
        for name, value in given.items():
            if name not in found or found[name].shape != value.shape:
                raise TaskError(
                    f"Task.gradient must return a gradient of shape {tuple(value.shape)} for {name}; pass all names "
                    "on, changed or not."
                )
        return self.layout.join(parts | found)

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The other rule's."""
        return self.rule.initial_state(keyframe, hyper, dtype, device)

    def implied_state(self, before: Tensor, after: Tensor, gradient: Tensor, hyper: FloatArray) -> State | None:
        """The other rule's, of the transformed gradient."""
        return self.rule.implied_state(before, after, self.transformed(gradient, hyper), hyper)

    def placeholder_state(self, weights: Tensor) -> State:
        """The other rule's."""
        return self.rule.placeholder_state(weights)

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, the loop's g_t [P'] and hyperparameters [G, H]; differentiable."""
        return self.rule.step(weights, state, self.transformed(gradient, hyper), hyper)

    def options(self, hyper: FloatArray, index: int) -> dict[str, object]:
        """The other rule's."""
        return self.rule.options(hyper, index)
