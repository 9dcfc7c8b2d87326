r"""Optimizers that are not elementwise: they step parameter by parameter, each in its own shape.

The values of a step are made by torch's own class, to the bit. Where autograd cannot follow that class, a formula of
ours, differentiable, says what its derivative is: with U the class and f the formula,

    (w_t, s_t) = U(w_{t-1}, s_{t-1}, g_t) + f(w_{t-1}, s_{t-1}, g_t) - stop(f(w_{t-1}, s_{t-1}, g_t))

That f is the formula of U is not taken on trust: the self-test holds f's derivative against finite differences of U.

Letters: K directions at once, P' trainable weights.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trajrec.records import FloatArray, Keyframe, ParamSpec, Row, RunSpec
from trajrec.rules.flat import FlatLayout
from trajrec.rules.step import Rule, State, is_differentiated, with_derivative

STEP = "step"


class ParameterRule(Rule):
    """A class of torch.optim whose values are its own and whose derivative is that of `formula`."""

    def __init__(self, spec: RunSpec, layout: FlatLayout) -> None:
        super().__init__(spec, layout)
        self._table = layout.table(spec)
        self.scalars = frozenset(f"{STEP}/{place}" for place, _ in self._table)

    @abstractmethod
    def first_state(self, param: ParamSpec) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what the class keeps of a parameter, beginning with zeros."""

    @abstractmethod
    def formula(self, weights: Tensor, state: State, gradient: Tensor, options: dict[str, Any]) -> tuple[Tensor, State]:
        """One parameter's step, differentiable, everything in the parameter's own shape."""

    def complete(self, options: dict[str, Any], param: ParamSpec) -> dict[str, Any]:
        """Options of a group, with what the class would take from the dtype of the parameter."""
        return self._defaults | options

    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The state s_t of a keyframe; zeros before the first step."""
        state: State = {}
        for place, param in self._table:
            recorded = recorded_state(keyframe, place, param)
            for name, shape in self.first_state(param).items():
                value = torch.as_tensor(recorded.get(name, np.zeros(shape)), dtype=torch.float64)
                state[f"{name}/{place}"] = value if name == STEP else value.to(device, dtype)
        return state

    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""
        w, g = self.layout.split(weights), self.layout.split(gradient)
        stepped, states = {}, State()
        for place, param in self._table:
            own = {name: state[f"{name}/{place}"] for name in self.first_state(param)}
            if self.rests(hyper, param.group):
                stepped[param.name] = w[param.name]
                states |= {f"{name}/{place}": value for name, value in own.items()}
                continue
            options = self.complete(self.options(hyper, param.group), param)
            stepped[param.name], after = self._step_parameter(param, w[param.name], own, g[param.name], options)
            states |= {f"{name}/{place}": value for name, value in after.items()}
        return self.layout.join(stepped), states

    def _step_parameter(
        self, param: ParamSpec, weights: Tensor, state: State, gradient: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, State]:
        still = {name: value.detach() for name, value in state.items()}
        stepped, after = self._step_group(param.group, weights.detach(), still, gradient.detach(), options)
        if not is_differentiated(weights, gradient, *state.values()):
            return stepped, after
        followed, followed_state = self.formula(weights, state, gradient, options)
        after |= {name: with_derivative(after[name], value) for name, value in followed_state.items()}
        return with_derivative(stepped, followed), after


def recorded_state(keyframe: Keyframe, place: int, param: ParamSpec) -> dict[str, Row]:
    """What a keyframe holds of one parameter's optimizer state: arrays in their own shapes, numbers without one."""
    found: dict[str, Row] = {}
    for path, array in keyframe.arrays.items():
        kind, _, name = path.partition("/")
        if kind != "optimizer":
            continue
        if name.endswith(f"/{place}"):
            found[name.removesuffix(f"/{place}")] = array
        elif name.endswith(".scalar"):
            if not np.isnan(array[place]):
                found.setdefault(name.removesuffix(".scalar"), array[place])
        elif f"{path}.present" in keyframe.arrays and keyframe.arrays[f"{path}.present"][place]:
            found[name] = array[param.span].reshape(param.shape)
    return found
