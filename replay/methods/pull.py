r"""The optimizer's part of the adjoint: from (lam_t, sigma_t) to gamma and what is left of both.

In general that is one vjp of the optimizer's step (`Rule.pull`). Where a rule is constant (`Rule.constant`: SGD), its
derivative is the same six numbers for all weights of a group,

    lam' = a lam + b sigma,   sigma' = c lam + d sigma,   gamma = e lam + f sigma,

which `Rule.pull` itself gives when it is asked about one weight a group, once for the hyperparameters in force. Without
the Hessian lam, sigma and gamma then stay multiples of the target gradient lam_T: numbers by group suffice.

Letters: G groups, K directions, P' trainable weights.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Protocol

import torch
from torch import Tensor

from trajrec.records import FloatArray
from trajrec.replay.step import Step
from trajrec.rules import Rule
from trajrec.rules.step import State


@dataclass(frozen=True, slots=True)
class Pulled:
    """One step of the optimizer's part.

    Attributes:
        gamma: [K, P'], but for `factor`, the same for all weights: that one waits for the inner products.
        lam: [K, P'] (or [1, G]) without H gamma.
        sigma: by name of the state.
        factor: see `gamma`.
    """

    gamma: Tensor
    lam: Tensor
    sigma: State
    factor: float = 1.0

    def scaled(self, inner: Tensor) -> Tensor:
        """Inner products [K, B] with `gamma`, times the factor that it lacks."""
        return inner if self.factor == 1.0 else inner * self.factor


class Puller(Protocol):
    """The adjoint between two steps."""

    needs_gradient: bool
    count: int
    lam: Tensor
    sigma: State

    def pull(self, step: Step, state: State, gradient: Tensor | None) -> Pulled:
        """What the step makes of the adjoint; changes nothing."""

    def accept(self, pulled: Pulled, hvp: Tensor | None) -> None:
        """Goes on to the step before."""

    def norms(self) -> Tensor:
        """|lam| of every target, [K]."""


class VectorPuller:
    """lam and sigma as vectors.

    Args:
        rule: the optimizer.
        targets: lam_T [K, P'].
    """

    def __init__(self, rule: Rule, targets: Tensor) -> None:
        self.lam, self.sigma = targets, State()
        self.count = len(targets)
        self.needs_gradient = not rule.constant
        self._rule = rule
        self._numbers = _Numbers(rule)

    def pull(self, step: Step, state: State, gradient: Tensor | None) -> Pulled:
        """By numbers where they suffice, else by the vjp of the step."""
        if self._rule.constant and len(self._rule.vectors_of(state)) == 1:
            return self._by_numbers(step, *self._rule.vectors_of(state))
        given = torch.zeros_like(step.before) if gradient is None else gradient
        lam, sigma, gamma = self._rule.pull(step.before, state, given, step.hyper, self.lam, self.sigma)
        return Pulled(gamma, lam, sigma)

    def _by_numbers(self, step: Step, name: str) -> Pulled:
        six, parts = self._numbers.of(step).tolist(), []
        for k, span in enumerate(self._rule.layout.groups):
            lam, sigma = self.lam[:, span], self.sigma.get(name)
            parts.append([_mixed(lam, None if sigma is None else sigma[:, span], *row[k]) for row in six])
        lam, sigma, gamma = (p[0] if len(p) == 1 else torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        return Pulled(gamma, lam, {name: sigma})

    def accept(self, pulled: Pulled, hvp: Tensor | None) -> None:
        """Adds H gamma."""
        self.lam = pulled.lam if hvp is None else pulled.lam + hvp
        self.sigma = pulled.sigma

    def norms(self) -> Tensor:
        """|lam| of every target, [K]."""
        # In single precision the squares leave the range long before the adjoint does.
        norms: Tensor = torch.linalg.vector_norm(self.lam, dim=1, dtype=torch.float64)
        return norms


class NumberPuller:
    """lam and sigma as multiples of lam_T, for a constant rule without the Hessian."""

    needs_gradient = False

    def __init__(self, rule: Rule, targets: Tensor) -> None:
        self._targets = targets
        self.count = len(targets)
        self._rule = rule
        self._numbers, groups = _Numbers(rule), len(rule.layout.groups)
        self.lam = torch.ones(1, groups, dtype=torch.float64)
        self.sigma: State = {}

    def pull(self, step: Step, state: State, gradient: Tensor | None) -> Pulled:
        """By numbers; without a buffer, or with several, by the vjp of the step of one weight a group."""
        names = list(self._rule.vectors_of(state))
        if len(names) == 1:
            sigma = self.sigma[names[0]][0] if self.sigma else torch.zeros_like(self.lam[0])
            both = torch.stack([self.lam[0], sigma], 1)
            new = (self._numbers.of(step) * both).sum(2)
            lam, gamma = new[:1], new[2:]
            pulled = {names[0]: new[1:2]}
        else:
            lam, pulled, gamma = self._numbers.pull(State(), step.hyper, self.lam, self.sigma)
        if len(gamma[0]) == 1:
            return Pulled(self._targets, lam, pulled, float(gamma))
        factors = torch.empty_like(self._targets[0])
        for span, factor in zip(self._rule.layout.groups, gamma[0], strict=True):
            factors[span] = factor
        return Pulled(self._targets * factors, lam, pulled)

    def accept(self, pulled: Pulled, hvp: Tensor | None) -> None:
        """Goes on to the step before."""
        assert hvp is None
        self.lam, self.sigma = pulled.lam, pulled.sigma

    def norms(self) -> Tensor:
        """|lam| of every target, [K]."""
        squares = torch.stack(
            [self._targets[:, span].norm(dim=1, dtype=torch.float64) ** 2 for span in self._rule.layout.groups]
        )
        norms: Tensor = (self.lam[0].to(squares) ** 2 @ squares).sqrt()
        return norms


class _Numbers:
    """A constant rule on one weight a group, in float64."""

    def __init__(self, rule: Rule) -> None:
        groups, tiny = len(rule.layout.groups), copy(rule)
        layout: Any = SimpleNamespace(groups=tuple(slice(i, i + 1) for i in range(groups)), size=groups)
        tiny.layout = layout
        self._rule, self._zeros = tiny, torch.zeros(groups, dtype=torch.float64)
        self._known = b"", self._zeros

    def pull(self, state: State, hyper: FloatArray, lam: Tensor, sigma: State) -> tuple[Tensor, State, Tensor]:
        """`Rule.pull` with cotangents [K, G]."""
        return self._rule.pull(self._zeros, state, self._zeros, hyper, lam, sigma)

    def of(self, step: Step) -> Tensor:
        """For lam', sigma' and gamma: what each is made of, of lam and of sigma, [3, G, 2]."""
        key = step.hyper.tobytes()
        if key != self._known[0]:
            self._known = key, self._found(step.hyper)
        return self._known[1]

    def _found(self, hyper: FloatArray) -> Tensor:
        none = torch.zeros_like(self._zeros)[None]
        ones, state = torch.ones_like(none), self._rule.placeholder_state(self._zeros)
        (name,) = state
        by_lam = self.pull(state, hyper, ones, {name: none})
        by_sigma = self.pull(state, hyper, none, {name: ones})
        rows = [torch.cat([lam, sigma[name], gamma]) for lam, sigma, gamma in (by_lam, by_sigma)]
        return torch.stack(rows, 2)


def _mixed(lam: Tensor, sigma: Tensor | None, a: float, b: float) -> Tensor:
    """A lam + b sigma."""
    return lam * a if sigma is None or b == 0 else (lam * a).add_(sigma, alpha=b)
