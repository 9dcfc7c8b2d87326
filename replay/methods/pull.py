r"""The optimizer's part of the adjoint: from (lam_t, sigma_t) to gamma and what is left of both.

In general that is one vjp of the optimizer's step (`Rule.pull`). Where a rule is constant (`Rule.constant`: SGD), its
derivative is the same six numbers for all weights of a group,

    lam' = a lam + b sigma,   sigma' = c lam + d sigma,   gamma = e lam + f sigma,

which `Rule.pull` itself gives when it is asked about one weight a group. Without the Hessian even more is known: lam,
sigma and gamma then stay multiples of the target gradient lam_T, so that numbers by group suffice.

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
        directions: [K, P'], and scale: [G] or None; gamma is the one times the other, group by group.
        lam: [K, P'] (or [1, G]) without H gamma.
        sigma: by name of the state.
    """

    directions: Tensor
    scale: Tensor | None
    lam: Tensor
    sigma: State


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
        self._numbers = Numbers(rule)

    def pull(self, step: Step, state: State, gradient: Tensor | None) -> Pulled:
        """By numbers where they suffice, else by the vjp of the whole step."""
        if self._rule.constant and len(self._rule.vectors_of(state)) == 1:
            return self._by_numbers(step, *self._rule.vectors_of(state))
        given = torch.zeros_like(step.before) if gradient is None else gradient
        lam, sigma, gamma = self._rule.pull(step.before, state, given, step.hyper, self.lam, self.sigma)
        return Pulled(gamma, None, lam, sigma)

    def _by_numbers(self, step: Step, name: str) -> Pulled:
        parts = []
        for span, six in zip(self._rule.layout.groups, self._numbers.of(step.hyper), strict=True):
            sigma = self.sigma.get(name)
            part = None if sigma is None else sigma[:, span]
            parts.append([_mixed(self.lam[:, span], part, *pair) for pair in six])
        lam, sigma, gamma = (p[0] if len(p) == 1 else torch.cat(p, dim=1) for p in zip(*parts, strict=True))
        return Pulled(gamma, None, lam, {name: sigma})

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
        self._numbers = Numbers(rule)
        groups = len(rule.layout.groups)
        self.lam = torch.ones(1, groups, dtype=torch.float64)
        self.sigma: State = {}

    def pull(self, step: Step, state: State, gradient: Tensor | None) -> Pulled:
        """Six numbers a group."""
        names = list(self._rule.vectors_of(state))
        if len(names) != 1:
            lam, sigma, gamma = self._numbers.pull({}, step.hyper, self.lam, self.sigma)
            return Pulled(self._targets, gamma[0], lam, sigma)
        six = torch.tensor(self._numbers.of(step.hyper), dtype=torch.float64)
        both = torch.stack([self.lam[0], self.sigma[names[0]][0] if self.sigma else torch.zeros_like(self.lam[0])], 1)
        lam, sigma_row, gamma = (six * both[:, None]).sum(2).T
        return Pulled(self._targets, gamma, lam[None], {names[0]: sigma_row[None]})

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


class Numbers:
    """A constant rule on one weight a group, in float64."""

    def __init__(self, rule: Rule) -> None:
        groups = len(rule.layout.groups)
        tiny: Any = copy(rule)
        tiny.layout = SimpleNamespace(groups=tuple(slice(i, i + 1) for i in range(groups)), size=groups)
        self._rule, self._groups = tiny, groups
        self._known: tuple[bytes, list[list[tuple[float, float]]]] = b"", []

    def pull(self, state: State, hyper: FloatArray, lam: Tensor, sigma: State) -> tuple[Tensor, State, Tensor]:
        """`Rule.pull` with cotangents [K, G]."""
        zeros = torch.zeros(self._groups, dtype=torch.float64)
        found: tuple[Tensor, State, Tensor] = self._rule.pull(zeros, state, zeros, hyper, lam, sigma)
        return found

    def of(self, hyper: FloatArray) -> list[list[tuple[float, float]]]:
        """((a, b), (c, d), (e, f)) of every group."""
        key = hyper.tobytes()
        if key != self._known[0]:
            self._known = key, self._find(hyper)
        return self._known[1]

    def _find(self, hyper: FloatArray) -> list[list[tuple[float, float]]]:
        zeros = torch.zeros(self._groups, dtype=torch.float64)
        ones, none = torch.ones(1, self._groups, dtype=torch.float64), torch.zeros(1, self._groups, dtype=torch.float64)
        state = self._rule.placeholder_state(zeros)
        (name,) = state
        by_lam = self.pull(state, hyper, ones, {name: none})
        by_sigma = self.pull(state, hyper, none, {name: ones})
        columns = [(x[0], x[1][name], x[2]) for x in (by_lam, by_sigma)]
        return [[(float(p[0, g]), float(q[0, g])) for p, q in zip(*columns, strict=True)] for g in range(self._groups)]


def _mixed(lam: Tensor, sigma: Tensor | None, a: float, b: float) -> Tensor:
    """A lam + b sigma."""
    if sigma is None or b == 0:
        return lam * a
    return (lam * a).add_(sigma, alpha=b)


def directions_of(pulled: Pulled, rule: Rule) -> Tensor:
    """Gamma [K, P'], but for a factor that is the same for all weights: that one waits for the inner products."""
    if pulled.scale is None or len(pulled.scale) == 1:
        return pulled.directions
    scale = torch.empty_like(pulled.directions[0])
    for span, factor in zip(rule.layout.groups, pulled.scale, strict=True):
        scale[span] = factor
    return pulled.directions * scale


def scaled(inner: Tensor, pulled: Pulled, rule: Rule) -> Tensor:
    """Inner products [K, B], times the factor that `directions_of` left out."""
    return inner * float(pulled.scale) if pulled.scale is not None and len(rule.layout.groups) == 1 else inner
