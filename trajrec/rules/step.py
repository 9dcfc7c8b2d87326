r"""One optimizer step as a pure function, and its derivatives in both directions.

    (w_t, s_t) = U(w_{t-1}, s_{t-1}, g_t; h_t)

U is the optimizer class itself: one instance a group is given clones of the weights and of the state and the gradient
in `.grad`, takes its own `.step()` with gradients enabled (`differentiable=True`, `foreach=False`), and hands weights
and state back. Forward mode is the jvp of that function, reverse mode its vjp; no adjoint is derived by hand.

Letters: G groups, P' trainable weights, K directions at once.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.optim import Optimizer

from trajrec.errors import ReplayError
from trajrec.records import FloatArray, Keyframe, RunSpec
from trajrec.rules.flat import FlatLayout
from trajrec.rules.part import Part

State = dict[str, Tensor]


class Rule(ABC):
    """An optimizer's step on flat vectors.

    A state is a dict of tensors that are differentiated (momentum buffers and the like) and of constants (step counts)
    which are not. A rule that steps group by group has vectors [P'] and constants [G]; one that steps parameter by
    parameter names its state "NAME/INDEX", by place in the parameter table, in whatever shape the class keeps it.
    Cotangents and tangents of states are dicts of the differentiated ones with a leading dimension [K]; a missing name
    is zero.

    Attributes:
        spec: of the run.
        layout: the order of its trainable weights.
        optimizer_class: the class that steps.
        scalars: names of the state's constants.
        needs_state: whether the derivative of a step depends on the values of its state.
        constant: whether the derivative of a step is the same numbers at every point and for all weights of a group.
        tolerance: relative rounding by which a step made again may differ from the class's plain path.
        placeholder_shape: shape of the parameter that an instance is built with.
        differentiable_path: whether the class takes its own differentiable path instead of the plain one.
    """

    optimizer_class: type[Optimizer]
    scalars: frozenset[str] = frozenset()
    needs_state = True
    constant = False
    differentiable_path = False
    tolerance = 0.0
    placeholder_shape: ClassVar[tuple[int, ...]] = (1,)

    def __init__(self, spec: RunSpec, layout: FlatLayout) -> None:
        self.spec = spec
        self.layout = layout
        self.names = spec.hyperparameters
        self._defaults = spec.defaults
        self._optimizers = self._build_all(spec)

    def _build_all(self, spec: RunSpec) -> list[Optimizer]:
        return [self._build() for _ in range(spec.groups)]

    def _build(self) -> Optimizer:
        accepted = inspect.signature(self.optimizer_class).parameters
        options: dict[str, Any] = {k: v for k, v in self._defaults.items() if k in accepted}
        options |= {"foreach": False, "fused": None, "differentiable": True, "capturable": False}
        options = {k: v for k, v in options.items() if k in accepted}
        try:
            optimizer = self.optimizer_class([nn.Parameter(torch.zeros(self.placeholder_shape))], **options)
        except (RuntimeError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            name = self.optimizer_class.__name__
            raise ReplayError(f"{name} cannot be made with the options that the recording notes: {error}.") from error
        # The default lets step() run with gradients enabled; the group's own entry chooses the code path.
        optimizer.param_groups[0]["differentiable"] = self.differentiable_path
        return optimizer

    @abstractmethod
    def initial_state(self, keyframe: Keyframe, hyper: FloatArray, dtype: torch.dtype, device: torch.device) -> State:
        """The state s_t of a keyframe, or what the class begins with; hyper [G, H] are those of step t + 1."""

    def implied_state(self, before: Tensor, after: Tensor, gradient: Tensor, hyper: FloatArray) -> State | None:
        """s_t from w_{t-1}, w_t and g_t [P'], where the weights imply it; else None."""
        return None

    def placeholder_state(self, weights: Tensor) -> State:
        """A state of the right shape, for rules whose derivatives do not depend on its values."""
        raise NotImplementedError(f"{type(self).__name__} needs the state itself.")

    @abstractmethod
    def step(self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray) -> tuple[Tensor, State]:
        """(w_t, s_t) from w_{t-1} [P'], s_{t-1}, g_t [P'] and hyperparameters [G, H]; differentiable."""

    def proving(self) -> AbstractContextManager[None]:
        """The context in which the self-test takes its finite differences."""
        return nullcontext()

    def suspects(self) -> str:
        """What may be wrong with a class that failed its self-test."""
        return "It works on .data, rounds inside or cuts the graph, so exact replay would be wrong."

    def accept(self, proved: Rule) -> None:  # noqa: B027
        """Is told that the self-test was passed, by this rule or by that of a part of its weights."""

    def cut(self, part: Part) -> Rule:
        """The rule of a part of the weights."""
        return type(self)(part.spec, FlatLayout(part.spec))

    def cut_state(self, state: State, part: Part) -> State:
        """The state of a part of the weights."""
        return part.state(state, slice(0, self.layout.size))

    def _step_group(
        self,
        index: int,
        weights: Tensor,
        state: State,
        gradient: Tensor,
        options: dict[str, Any],
        fresh: Collection[str] = (),
    ) -> tuple[Tensor, State]:
        """One group's own `.step()` on clones; the state that is `fresh` is nobody else's, and is not cloned."""
        optimizer = self._optimizers[index]
        parameter = weights.clone()
        parameter.grad = gradient
        group = optimizer.param_groups[0]
        group.update(options)
        group["params"] = [parameter]
        optimizer.state.clear()
        if state:
            optimizer.state[parameter] = {n: v if n in fresh else v.clone() for n, v in state.items()}
        optimizer.step()
        return parameter, {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor)}

    def rests(self, hyper: FloatArray, index: int) -> bool:
        """Whether the step passes a group by: its hyperparameters are all NaN."""
        return hyper.shape[1] > 0 and bool(np.isnan(hyper[index]).all())

    def options(self, hyper: FloatArray, index: int) -> dict[str, Any]:
        """Options of one group as the optimizer wants them: booleans and counts as such, tuples, NaN as None."""
        options: dict[str, Any] = {}
        for name, value in zip(self.names, hyper[index].tolist(), strict=True):
            key, _, position = name.partition(".")
            default = self._defaults.get(key)
            if position:
                # Only numbers are recorded: a tuple's other places (None in Adafactor's eps) are those of its default.
                values = list(options.get(key, default or ()))
                place = int(position)
                values += [None] * (place + 1 - len(values))
                values[place] = _restore(values[place], value)
                options[key] = tuple(values)
            else:
                options[key] = _restore(default, value)
        return options

    def pull(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, lam: Tensor, sigma: State
    ) -> tuple[Tensor, State, Tensor]:
        """The vjp of U: (lam', sigma', gamma), each [K, P'], from cotangents lam [K, P'] of w_t and sigma of s_t."""
        w, g = weights.detach().requires_grad_(), gradient.detach().requires_grad_()
        s = {name: value.detach().requires_grad_() for name, value in self.vectors_of(state).items()}
        with torch.enable_grad():
            stepped, new_state = self.step(w, state | s, g, hyper)
        # A buffer that this step does not use (momentum 0) is a constant: nothing to pull back through.
        names = [name for name, value in new_state.items() if name in sigma and value.requires_grad]
        outputs = [stepped, *(new_state[name] for name in names)]
        inputs = [w, *s.values(), g]
        found = pull_batched(outputs, inputs, [lam, *(sigma[name] for name in names)])
        return found[0], dict(zip(s, found[1:-1], strict=True)), found[-1]

    def push(
        self, weights: Tensor, state: State, gradient: Tensor, hyper: FloatArray, d: Tensor, r: State, k: Tensor
    ) -> tuple[Tensor, State]:
        """The jvp of U: (D_t, R_t), each [K, P'], along D_{t-1} [K, P'], R_{t-1} and k [K, P'] of the gradient."""
        vectors = self.vectors_of(state)
        tangents = {n: r[n] if n in r else v.new_zeros(len(d), *v.shape) for n, v in vectors.items()}

        def step(w: Tensor, s: State, g: Tensor) -> tuple[Tensor, State]:
            stepped, new_state = self.step(w, state | s, g, hyper)
            return stepped, self.vectors_of(new_state)

        def one(d: Tensor, r: State, k: Tensor) -> tuple[Tensor, State]:
            found = jvp(step, (weights, vectors, gradient), (d, r, k))
            return found[1]  # type: ignore[no-any-return]

        return vmap(one)(d, tangents, k)

    def vectors_of(self, state: State) -> State:
        """The part of a state that is differentiated."""
        return {name: value for name, value in state.items() if name not in self.scalars}


def _restore(default: Any, value: float) -> Any:
    if isinstance(default, bool):
        return bool(value)
    if isinstance(default, int) and value.is_integer():
        return int(value)
    return None if value != value else value


def is_differentiated(*values: Tensor) -> bool:
    """Whether a derivative is being taken with respect to any of the values, in reverse or forward mode."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return any((v.requires_grad and torch.is_grad_enabled()) or wrapped(v) for v in values)


def with_derivative(value: Tensor, followed: Tensor) -> Tensor:
    """A value with the derivative of another."""
    return value + (followed - followed.detach())


def pull_batched(
    outputs: list[Tensor], inputs: list[Tensor], cotangents: list[Tensor], retain: bool = False
) -> list[Tensor]:
    """Vjp of `outputs` with respect to `inputs` for K cotangents at once, [K, ...] each; zero where independent."""
    if len(cotangents[0]) == 1:
        # One cotangent needs no vmap: every operator supports it, and it is faster.
        found = torch.autograd.grad(outputs, inputs, [c[0] for c in cotangents], retain, materialize_grads=True)
        return [value[None] for value in found]
    found = torch.autograd.grad(outputs, inputs, cotangents, retain, is_grads_batched=True, allow_unused=True)
    count = len(cotangents[0])
    return [
        value if value is not None else source.new_zeros(count, *source.shape)
        for value, source in zip(found, inputs, strict=True)
    ]
