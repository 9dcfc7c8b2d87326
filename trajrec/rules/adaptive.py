r"""The adaptive and averaging optimizers of torch.optim: Adam and its kin, RMSprop, Adagrad, Adadelta, ASGD, Rprop.

Their own classes step (see `trajrec.rules.step`); what is written here is only which state they keep and how it begins,
because a state has to exist before the first step in order to be differentiated, and where a derivative has to be
decided on purpose:

* sqrt(v) at v = 0. A weight whose gradient has always been zero (a dead unit) has v = 0 and m = 0, and autograd gives
  0 * inf = NaN. The update m / (sqrt(v) + eps) is smooth there: the derivative through sqrt is multiplied by m = 0.
  A floor far below rounding (1e-36, or 1e-300 in float64) under v has just that derivative and leaves the step itself
  as it is, to the bit.
* max of Adamax and amsgrad at a tie: torch's subgradient, half to each side.
* sign of Rprop: derivative zero, so all its contributions are. That is right, and of no use.
* the switch of RAdam (rho_t > 5) depends on the step count alone, a constant: nothing is differentiated through it.

A class keeps its plain code path where autograd can follow it: that is the path of the training, to the bit. Where it
writes with `out=`, or over a value that is needed again, its own differentiable path is taken, equal up to rounding.
"""

from __future__ import annotations

import math
from copy import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from trajrec.errors import ReplayError
from trajrec.records import FloatArray, Keyframe, RunSpec
from trajrec.rules.flat import FlatLayout
from trajrec.rules.step import Rule, State

PIECE = 1 << 18  # weights of a piece times cotangents
FLOOR = {torch.float32: 1e-36, torch.float64: 1e-300}


@dataclass(frozen=True, slots=True)
class Kept:
    """What a class keeps: vectors and scalars with their first values, an option's name standing for its value.

    Attributes:
        cls: the class.
        vectors: state shaped like the weights.
        scalars: state of one number a group.
        floored: vectors that a square root is taken of.
        own_path: autograd cannot follow the plain path (it writes with `out=`, or over a value it needs again).
        optional: vectors that exist only where an option is set, by the option's name.
    """

    cls: type[Optimizer]
    vectors: dict[str, float | str]
    scalars: dict[str, float | str]
    floored: tuple[str, ...] = ()
    own_path: bool = False
    optional: tuple[tuple[str, str], ...] = ()


_ADAM = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
_AMSGRAD = (("max_exp_avg_sq", "amsgrad"),)
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")

KEPT: dict[str, Kept] = {
    "Adam": Kept(optim.Adam, {**_ADAM, "max_exp_avg_sq": 0.0}, {"step": 0.0}, _SQUARES, optional=_AMSGRAD),
    "AdamW": Kept(optim.AdamW, {**_ADAM, "max_exp_avg_sq": 0.0}, {"step": 0.0}, _SQUARES, optional=_AMSGRAD),
    "NAdam": Kept(optim.NAdam, {**_ADAM}, {"step": 0.0, "mu_product": 1.0}, _SQUARES, own_path=True),
    "RAdam": Kept(optim.RAdam, {**_ADAM}, {"step": 0.0}, _SQUARES, own_path=True),
    "Adamax": Kept(optim.Adamax, {"exp_avg": 0.0, "exp_inf": 0.0}, {"step": 0.0}, own_path=True),
    "RMSprop": Kept(
        optim.RMSprop,
        {"square_avg": 0.0, "momentum_buffer": 0.0, "grad_avg": 0.0},
        {"step": 0.0},
        ("square_avg",),
        own_path=True,
        optional=(("momentum_buffer", "momentum"), ("grad_avg", "centered")),
    ),
    "Adagrad": Kept(optim.Adagrad, {"sum": "initial_accumulator_value"}, {"step": 0.0}, ("sum",), own_path=True),
    "Adadelta": Kept(optim.Adadelta, {"square_avg": 0.0, "acc_delta": 0.0}, {"step": 0.0}, own_path=True),
    "ASGD": Kept(optim.ASGD, {"ax": 0.0}, {"step": 0.0, "eta": "lr", "mu": 1.0}),
    "Rprop": Kept(optim.Rprop, {"prev": 0.0, "step_size": "lr"}, {"step": 0.0}, own_path=True),
}


class AdaptiveRule(Rule):
    """A class of `KEPT`."""

    needs_state = True

    def __init__(self, spec: RunSpec, layout: FlatLayout) -> None:
        self.kept = KEPT[spec.optimizer]
        self.optimizer_class = self.kept.cls
        self.scalars = frozenset(self.kept.scalars)
        amsgrad = bool(spec.defaults.get("amsgrad"))
        self.differentiable_path = self.kept.own_path or amsgrad
        # NAdam multiplies its momentum schedule up in single precision, whatever the weights are.
        self.tolerance = 1e-6 if "mu_product" in self.scalars else 0.0
        super().__init__(spec, layout)

    def _vectors(self) -> list[str]:
        options = dict(self.kept.optional)
        return [n for n in self.kept.vectors if n not in options or self._defaults.get(options[n])]

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The state s_t of a keyframe; before the first step, what the class would begin with.

        Raises:
            ReplayError: if parameters of one group are at different steps.
        """
        options = [self._begins_with(hyper, index) for index in range(len(self.layout.groups))]
        state: State = {}
        for name in self._vectors():
            state[name] = self._vector(name, keyframe, options).to(device, dtype)
        for name in self.kept.scalars:
            state[name] = self._scalar(name, keyframe, options)
        return state

    def _begins_with(self, hyper: FloatArray, index: int) -> dict[str, Any]:
        """Options of one group; the defaults where a step passes it by."""
        return self._defaults | {k: v for k, v in self.options(hyper, index).items() if v is not None}

    def _vector(self, name: str, keyframe: Keyframe, options: list[dict[str, Any]]) -> Tensor:
        """A recorded vector; the class's first value for groups that it has kept nothing of yet."""
        row = keyframe.arrays.get(f"optimizer/{name}")
        present = keyframe.arrays.get(f"optimizer/{name}.present")
        recorded = None if row is None else torch.tensor(self.layout.select(row))
        values = torch.empty(self.layout.size, dtype=torch.float64 if recorded is None else recorded.dtype)
        for index, (span, group) in enumerate(zip(self.layout.groups, options, strict=True)):
            kept = recorded is not None and (present is None or any(present[i] for i in self.layout.places(index)))
            values[span] = recorded[span] if kept and recorded is not None else _first(self.kept.vectors[name], group)
        return values

    def _scalar(self, name: str, keyframe: Keyframe, options: list[dict[str, Any]]) -> Tensor:
        recorded = keyframe.arrays.get(f"optimizer/{name}.scalar")
        values = []
        for index, group in enumerate(options):
            known = [] if recorded is None else [float(recorded[i]) for i in self.layout.places(index)]
            found = {value for value in known if not math.isnan(value)}
            if len(found) > 1:
                raise ReplayError(
                    f"The parameters of group {index} are at different {name} counts ({sorted(found)[:3]}): "
                    "their history before the recording differs. Record from the first step on."
                )
            values.append(found.pop() if found else _first(self.kept.scalars[name], group))
        # Powers of betas by the step count are taken in double precision by the plain paths; other scalars are kept in
        # torch's default dtype, and their rounding is part of the training.
        return torch.tensor(values, dtype=torch.float64 if name == "step" else torch.get_default_dtype())

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""
        stepped, states = [], []
        for index, span in enumerate(self.layout.groups):
            part = {n: v[index] if n in self.scalars else v[span] for n, v in state.items()}
            w, s = weights[span], part
            if not self.rests(hyper, index):
                floored = {n: self._floored(n, v) for n, v in part.items()}
                options = self.options(hyper, index)
                w, s = self._step_group(index, w, floored, gradient[span], options, self.kept.floored)
            stepped.append(w)
            states.append(s)
        joined = {n: torch.stack([s[n] for s in states]) if n in self.scalars else _join(states, n) for n in state}
        return stepped[0] if len(stepped) == 1 else torch.cat(stepped), joined

    def pull(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, lam: Tensor, sigma: State
    ) -> tuple[Tensor, State, Tensor]:
        """The vjp of U, a piece of the weights at a time: each is stepped by itself, and what a step keeps is large."""
        size = max(1, PIECE // len(lam))
        spans = [slice(start, min(start + size, self.layout.size)) for start in range(0, self.layout.size, size)]
        if len(spans) == 1:
            return super().pull(weights, state, gradient, hyper, lam, sigma)
        whole = torch.empty_like(lam), {n: torch.empty_like(lam) for n in self.vectors_of(state)}, torch.empty_like(lam)
        for span in spans:
            own = {n: v if n in self.scalars else v[span] for n, v in state.items()}
            cotangents = lam[:, span], {n: v[:, span] for n, v in sigma.items()}
            found = self._piece(span)._pull_whole(weights[span], own, gradient[span], hyper, *cotangents)
            whole[0][:, span], whole[2][:, span] = found[0], found[2]
            for name, value in found[1].items():
                whole[1][name][:, span] = value
        return whole

    def _pull_whole(self, *point: Any) -> tuple[Tensor, State, Tensor]:
        return super().pull(*point)

    def _piece(self, span: slice) -> AdaptiveRule:
        """The rule of a piece of the weights, whose groups are what lies of them in the piece."""
        first, stop = int(span.start), int(span.stop)

        def inside(place: int) -> int:
            return min(max(place, first), stop) - first

        piece: Any = copy(self)
        groups = tuple(slice(inside(group.start), inside(group.stop)) for group in self.layout.groups)
        piece.layout = SimpleNamespace(groups=groups, size=stop - first)
        return piece  # type: ignore[no-any-return]

    def _floored(self, name: str, values: Tensor) -> Tensor:
        if name not in self.kept.floored:
            return values
        return torch.where(values == 0, FLOOR[values.dtype], values)


def _first(value: float | str, options: dict[str, Any]) -> float:
    """A first value, or that of the option it names."""
    return float(options[value]) if isinstance(value, str) else value


def _join(states: list[State], name: str) -> Tensor:
    return states[0][name] if len(states) == 1 else torch.cat([s[name] for s in states])
