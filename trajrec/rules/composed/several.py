r"""Several optimizers on disjoint parameters of one model, each of which steps once after every backward pass.

    w = (w^1, ..., w^K),   (w_t^k, s_t^k) = U_k(w_{t-1}^k, s_{t-1}^k, g_t^k; h_t^k)

The parts do not see each other: both derivatives of the joint step are those of the parts, put side by side. A part's
parameter groups follow one another in the recording, so its weights are one piece of the flat vector. Names of its
state have its number in front.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trajrec.records import FloatArray, Keyframe, RunSpec
from trajrec.rules.flat import FlatLayout
from trajrec.rules.part import Part as Cut
from trajrec.rules.step import Rule, State


@dataclass(frozen=True, slots=True)
class Part:
    """One optimizer: its spec as if it were alone, its rows and columns of hyperparameters, its piece of the vector."""

    spec: RunSpec
    rows: slice
    columns: list[int]
    span: slice

    def hyper(self, hyper: FloatArray) -> FloatArray:
        """Its own of all hyperparameters [G, H]."""
        return hyper[self.rows][:, self.columns]


def parts_of(spec: RunSpec, layout: FlatLayout) -> list[Part]:
    """The optimizers of a run with several."""
    starts = list(accumulate((o.groups for o in spec.optimizers), initial=0))
    parts = []
    for optimizer, start, stop in zip(spec.optimizers, starts, starts[1:], strict=False):
        params = tuple(
            replace(p, group=p.group - start) if start <= p.group < stop else replace(p, group=-1, trainable=False)
            for p in spec.params
        )
        alone = replace(
            spec,
            params=params,
            optimizer=optimizer.name,
            optimizer_module=optimizer.module,
            defaults=optimizer.defaults,
            hyperparameters=optimizer.hyperparameters,
            groups=optimizer.groups,
            optimizers=(),
        )
        columns = [spec.hyperparameters.index(name) for name in optimizer.hyperparameters]
        pieces = layout.groups[start:stop]
        parts.append(Part(alone, slice(start, stop), columns, slice(pieces[0].start, pieces[-1].stop)))
    return parts


class JointRule(Rule):
    """The rules of several optimizers as one.

    Args:
        spec: of the run.
        layout: the order of its trainable weights.
        build: the rule of an optimizer's own spec and layout.
    """

    def __init__(self, spec: RunSpec, layout: FlatLayout, build: Callable[[RunSpec, FlatLayout], Rule]) -> None:
        self.spec = spec
        self.layout = layout
        self.names = spec.hyperparameters
        self.parts = parts_of(spec, layout)
        self.rules = [build(part.spec, FlatLayout(part.spec)) for part in self.parts]
        self.optimizer_class = type(spec.optimizer, (Optimizer,), {})
        self.needs_state = any(rule.needs_state for rule in self.rules)
        self.tolerance = max(rule.tolerance for rule in self.rules)

    @property
    def scalars(self) -> frozenset[str]:  # type: ignore[override]
        """Those of all, which may learn of new ones on the way."""
        return frozenset(f"{k}:{name}" for k, rule in enumerate(self.rules) for name in rule.scalars)

    @contextmanager
    def proving(self) -> Iterator[None]:
        """The contexts of all."""
        with ExitStack() as stack:
            for rule in self.rules:
                stack.enter_context(rule.proving())
            yield

    def suspects(self) -> str:
        """What may be wrong with any of the classes."""
        return " ".join(f"{part.spec.optimizer}: {rule.suspects()}" for part, rule in self._each())

    def accept(self, proved: Rule) -> None:
        """Tells all."""
        for rule, other in zip(self.rules, proved.rules if isinstance(proved, JointRule) else [], strict=True):
            rule.accept(other)

    def cut(self, part: Cut) -> JointRule:
        """The rules of a part of the weights."""
        rules = iter(self.rules)
        return JointRule(part.spec, FlatLayout(part.spec), lambda own, _: next(rules).cut(replace(part, spec=own)))

    def cut_state(self, state: State, part: Cut) -> State:
        """The states of a part of the weights."""
        return _named([part.state(_of(state, k), own.span) for k, own in enumerate(self.parts)])

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The state s_t of a keyframe, or what the classes begin with."""
        states = []
        for part, rule in self._each():
            own = _own(keyframe, part.spec)
            states.append(rule.initial_state(own, part.hyper(hyper), dtype, device))
        return _named(states)

    def implied_state(self, before: Tensor, after: Tensor, gradient: Tensor, hyper: FloatArray) -> State | None:
        """s_t where the weights imply all of it; else None."""
        states = [
            rule.implied_state(before[part.span], after[part.span], gradient[part.span], part.hyper(hyper))
            for part, rule in self._each()
        ]
        known = [state for state in states if state is not None]
        return _named(known) if len(known) == len(states) else None

    def placeholder_state(self, weights: Tensor) -> State:
        """States of the right shape."""
        return _named([rule.placeholder_state(weights[part.span]) for part, rule in self._each()])

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""
        made = [
            rule.step(weights[part.span], _of(state, k), gradient[part.span], part.hyper(hyper))
            for k, (part, rule) in enumerate(self._each())
        ]
        return torch.cat([w for w, _ in made]), _named([s for _, s in made])

    def pull(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, lam: Tensor, sigma: State
    ) -> tuple[Tensor, State, Tensor]:
        """The vjp of U: (lam', sigma', gamma), each [K, P'], from cotangents lam [K, P'] of w_t and sigma of s_t."""
        made = []
        for k, (part, rule) in enumerate(self._each()):
            span = part.span
            point = weights[span], _of(state, k), gradient[span], part.hyper(hyper)
            made.append(rule.pull(*point, lam[:, span], _of(sigma, k)))
        return _side_by_side([m[0] for m in made]), _named([m[1] for m in made]), _side_by_side([m[2] for m in made])

    def push(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, d: Tensor, r: State, k: Tensor
    ) -> tuple[Tensor, State]:
        """The jvp of U: (D_t, R_t), each [K, P'], along D_{t-1} [K, P'], R_{t-1} and k [K, P'] of the gradient."""
        made = []
        for number, (part, rule) in enumerate(self._each()):
            span = part.span
            point = weights[span], _of(state, number), gradient[span], part.hyper(hyper)
            made.append(rule.push(*point, d[:, span], _of(r, number), k[:, span]))
        return _side_by_side([m[0] for m in made]), _named([m[1] for m in made])

    def options(self, hyper: FloatArray, index: int) -> dict[str, Any]:
        """Options of one group."""
        for part, rule in self._each():
            if part.rows.start <= index < part.rows.stop:
                return rule.options(part.hyper(hyper), index - part.rows.start)
        raise IndexError(index)

    def _each(self) -> Iterator[tuple[Part, Rule]]:
        return zip(self.parts, self.rules, strict=True)


def _own(keyframe: Keyframe, spec: RunSpec) -> Keyframe:
    """A keyframe without state that only other optimizers keep."""
    places = [place for place, param in enumerate(spec.params) if param.group >= 0]
    present = {
        name.removesuffix(".present"): bool(array[places].any())
        for name, array in keyframe.arrays.items()
        if name.endswith(".present")
    }
    return Keyframe(keyframe.step, {name: a for name, a in keyframe.arrays.items() if present.get(name, True)})


def _named(states: Sequence[State]) -> State:
    return {f"{k}:{name}": value for k, state in enumerate(states) for name, value in state.items()}


def _of(state: State, k: int) -> State:
    prefix = f"{k}:"
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _side_by_side(vectors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(vectors), dim=1)
