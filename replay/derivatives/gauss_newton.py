r"""The Gauss-Newton form of the Hessian: the curvature of the loss in the model's outputs, without that of the model.

With z(w) the outputs of the model in a step, J = dz/dw, and the step's objective as a function of z,

    G = J^T (d^2 objective / dz^2) J + hess R           R the Task's penalty, which sees the weights alone

G is positive semi-definite where the loss is convex in the outputs (cross entropy, squared error). It leaves out the
second derivatives of the model, which are zero almost everywhere in a ReLU network and blow up at its kinks: a
middle way between the exact form and none at all (Martens 2020, "New insights and perspectives on the natural gradient
method", section 8). Gradients and inner products are those of the exact form.

The outputs are what `model(...)` returns inside the Task's loss, of every call. A loss that uses the weights beside the
model's outputs has no curvature by them.

A loss that takes derivatives of the outputs itself (physics: u, u', u'') has those among z. There the outputs cannot be
cut off, or nothing could be differentiated through them; a zero is added to each instead, and the objective is a
function of these zeros. That is the same where no derivative within depends on an output's zero, as of outputs that
were summed; else (a penalty on the slope of the loss itself) it is refused.

Letters: K directions, P' trainable weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from trajrec.errors import ReplayError
from trajrec.replay.derivatives.composed import composed
from trajrec.replay.derivatives.derivatives import Derivatives
from trajrec.replay.derivatives.reverse import ReversePoint
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.objective import Objective
from trajrec.replay.step import Step


class GaussNewton:
    """G of a step at w_{t-1}.

    Args:
        function: per-sample losses.
        samples: the training set.
        step: where.

    Raises:
        ReplayError: if the loss does not call the model.
    """

    def __init__(self, function: LossFunction, samples: Samples, step: Step) -> None:
        self._weights = step.before.detach().requires_grad_()
        seen = function.seen
        cutting = _shifted(function.model) if seen.derivatives else _cut(function.model)
        with torch.enable_grad(), composed(seen), cutting as cuts:
            objective = function.objective(self._weights, samples, step)
            if not cuts:
                raise ReplayError("curvature='ggn' needs a Task.loss that calls the model: its outputs were not seen.")
        with torch.enable_grad():
            self._outputs = [output for output, _ in cuts]
            self._leaves = [leaf for _, leaf in cuts]
            self._slopes = _gradients(_weighted(objective), self._leaves)
            # J^T v is linear in v, so its derivative by v along a direction is J direction, whatever v is.
            self._dummies = [torch.zeros_like(output, requires_grad=True) for output in self._outputs]
            (self._pulled,) = torch.autograd.grad(
                self._outputs, self._weights, self._dummies, create_graph=True, materialize_grads=True
            )
            self._penalty = None if objective.penalty is None else _gradients(objective.penalty, [self._weights])[0]

    def products(self, directions: Tensor) -> Tensor:
        """G direction [K, P'] for directions [K, P']."""
        return torch.stack([self._product(direction) for direction in directions])

    def _product(self, direction: Tensor) -> Tensor:
        pushed = torch.autograd.grad(self._pulled, self._dummies, direction, retain_graph=True, materialize_grads=True)
        curved = _along(self._slopes, self._leaves, pushed)
        (product,) = torch.autograd.grad(
            self._outputs, self._weights, curved, retain_graph=True, materialize_grads=True
        )
        if self._penalty is None:
            return product
        return product + _along([self._penalty], [self._weights], [direction])[0]


def _weighted(objective: Objective) -> Tensor:
    return torch.dot(objective.shares.detach(), objective.losses)


def _gradients(value: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The gradients of a scalar, ready to be differentiated again."""
    return list(torch.autograd.grad(value, inputs, create_graph=True, materialize_grads=True))


def _along(gradients: list[Tensor], inputs: list[Tensor], directions: Any) -> list[Tensor]:
    """The Hessian-vector product of whatever has these gradients; zero where they are constant."""
    pairs = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
    if not pairs:
        return [torch.zeros_like(value) for value in inputs]
    outputs, cotangents = zip(*pairs, strict=True)
    return list(torch.autograd.grad(outputs, inputs, cotangents, retain_graph=True, materialize_grads=True))


@contextmanager
def _cut(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, floating-point outputs of the model are cut from it; gives the pairs (output, what stands in for it)."""
    cuts: list[tuple[Tensor, Tensor]] = []

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        cuts.append((value, leaf))
        return leaf

    def check(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if cuts and any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(inputs)):
            raise ReplayError(
                "curvature='ggn' is not defined for this loss: it feeds the model its own outputs. Put the repetition "
                "into the model, or ask for the Hessian."
            )

    handles = [
        model.register_forward_pre_hook(check),
        model.register_forward_hook(lambda module, inputs, output: tree_map(cut, output)),
    ]
    try:
        yield cuts
    finally:
        for handle in handles:
            handle.remove()


class _Shifted(TorchFunctionMode):
    """Adds a zero to what the model and `torch.autograd.grad` give; `cuts` holds the pairs (result, zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, and shifts the derivatives that it gives."""
        found = func(*args, **(kwargs or {}))
        return tree_map(self.shift, found) if func is torch.autograd.grad else found

    def shift(self, value: Any) -> Any:
        """A result with its zero added; constants as they are."""
        if not isinstance(value, Tensor) or not value.requires_grad:
            return value
        zeros = [zero for _, zero in self.cuts]
        with torch._C.DisableTorchFunction():
            within = torch._C._functorch.is_functorch_wrapped_tensor(value)
            if within or (zeros and any(slope is not None for slope in _slopes(value, zeros))):
                raise ReplayError(
                    "curvature='ggn' is not defined for this loss: it takes derivatives by torch.func, or such as "
                    "depend on the model's outputs themselves (those of a loss, say). Ask for the Hessian, or for none."
                )
        zero = torch.zeros_like(value, requires_grad=True)
        self.cuts.append((value, zero))
        return value + zero


def _slopes(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value.sum(), inputs, retain_graph=True, allow_unused=True)


@contextmanager
def _shifted(model: nn.Module) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, zeros are added to the model's outputs and their derivatives; gives the pairs (result, zero)."""
    mode = _Shifted()
    handle = model.register_forward_hook(lambda module, inputs, output: tree_map(mode.shift, output))
    try:
        with mode:
            yield mode.cuts
    finally:
        handle.remove()


class GaussNewtonPoint(ReversePoint):
    """Reverse over reverse mode with G in place of the Hessian."""

    def __init__(self, function: LossFunction, samples: Samples, step: Step, chunk: int = 0) -> None:
        super().__init__(function, samples, step, chunk)
        self._form = GaussNewton(function, samples, step)

    def along(self, directions: Tensor, *, hessian: bool, gradient: bool) -> Derivatives:
        """Derivatives along directions [K, P']."""
        found = super().along(directions, hessian=False, gradient=gradient)
        return replace(found, hvp=self._form.products(directions)) if hessian else found

    def forced(self, directions: Tensor | None, multipliers: Tensor) -> Tensor:
        """G directions + sum_i multipliers[k, i] grad l_i: [K, P'] from [K, P'] and [K, B]; None drops the first."""
        force = super().forced(None, multipliers)
        return force if directions is None else force + self._form.products(directions)
