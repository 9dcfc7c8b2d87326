r"""The running statistics of a model's normalisations, as a part b of what the training moves.

In training mode BatchNorm computes with the statistics of its batch, and keeps a running mean of them for later:

    b_t = (1 - m) b_{t-1} + m stat(w_{t-1}, batch_t)

The loss of a step does not depend on b, but that of a target in eval mode does, and so does that of a step whose
normalisations were put into eval mode. So b is state, like the optimizer's: here it is read off the calls of torch's
normalisations, made differentiable, and put into calls in eval mode, whose own derivative by b torch leaves out.

Letters: C channels, Q running statistics, all together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode


def tracking(model: nn.Module) -> dict[str, _NormBase]:
    """The normalisations of a model that keep running statistics, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _NormBase) and module.running_mean is not None and module.running_var is not None
    }


class RunningStatistics:
    """The running statistics b [Q] of a model: mean and variance of one normalisation after the other.

    Attributes:
        spans: of each normalisation in b; its mean is the first half.
        momenta: m of each; None stands for 1/n at the n-th forward pass.
        size: Q.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = tracking(model)
        self.names = tuple(norms)
        self.momenta = tuple(_momentum(module) for module in norms.values())
        self.spans: list[slice] = []
        self.size = 0
        for module in norms.values():
            self.spans.append(slice(self.size, self.size + 2 * module.num_features))
            self.size = self.spans[-1].stop

    def counts(self, buffers: dict[str, Tensor]) -> tuple[int, ...]:
        """How many forward passes each normalisation has seen, by the model's buffers."""
        found = (buffers.get(f"{name}.num_batches_tracked" if name else "num_batches_tracked") for name in self.names)
        return tuple(0 if count is None else int(count) for count in found)

    def vector(self, model: nn.Module) -> Tensor:
        """B [Q], as it stands in a model."""
        norms = tracking(model)
        both = (v for name in self.names for v in (norms[name].running_mean, norms[name].running_var))
        return torch.cat([v for v in both if v is not None])

    def moved_in(self, eval_modules: tuple[str, ...]) -> bool:
        """Whether one of them moves while these modules of the model are in eval mode."""
        return "" not in eval_modules and any(name not in eval_modules for name in self.names)

    def noted(self, model: nn.Module, b: Tensor | None = None) -> Noted:
        """Notes what the normalisations of a model do."""
        return Noted(self, model, b)


def _momentum(module: _NormBase) -> float | None:
    """What torch's normalisation takes for its momentum."""
    # Of instances torch counts no passes: without a momentum their statistics stay.
    return 0.0 if module.momentum is None and isinstance(module, _InstanceNorm) else module.momentum


class Noted(TorchFunctionMode):
    """What normalisations that keep statistics do inside.

    Attributes:
        updates: which of them went through a batch in training mode, in order, with the batch's mean and variance [2C].
        b: [Q] taken for the running statistics in eval mode; those of the model, where none are given; None until then.
    """

    def __init__(self, statistics: RunningStatistics, model: nn.Module, b: Tensor | None) -> None:
        super().__init__()
        self.updates: list[tuple[int, Tensor]] = []
        self.b = b
        self.norms = len(statistics.names)
        self._statistics, self._model = statistics, model
        norms = tracking(model)
        self._places = {id(norms[name].running_mean): place for place, name in enumerate(statistics.names)}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        kwargs = kwargs or {}
        if func in (functional.batch_norm, functional.instance_norm):
            call = _Call(func, *args, **kwargs)
            place = self._places.get(id(call.running_mean), -1)
            if place >= 0 and call.training:
                self.updates.append((place, _in_graph(call.statistics())))
            elif place >= 0:
                if self.b is None:
                    self.b = self._statistics.vector(self._model).detach().clone().requires_grad_()
                return call.normalised(*self.b[self._statistics.spans[place]].chunk(2))
        return func(*args, **kwargs)


def _in_graph(statistics: Tensor) -> Tensor:
    """Statistics that may be differentiated, also where no weight moves them (a normalisation of the inputs)."""
    if statistics.requires_grad:
        return statistics
    with torch.inference_mode(False):
        return statistics.clone().requires_grad_()


class _Call:
    """A call of torch's batch_norm or instance_norm, whose arguments are the same but for their defaults."""

    def __init__(
        self,
        func: Any,
        x: Any = None,
        running_mean: Any = None,
        running_var: Any = None,
        weight: Any = None,
        bias: Any = None,
        training: bool | None = None,
        momentum: float = 0.1,
        eps: float = 1e-5,
        **named: Any,
    ) -> None:
        self.x = named.get("input", x)
        self.running_mean, self.weight, self.bias, self.eps = running_mean, weight, bias, eps
        self._instances = func is functional.instance_norm
        self.training = named.get("use_input_stats", self._instances if training is None else training)

    def statistics(self) -> Tensor:
        """Mean and unbiased variance [2C] of the batch, of the mean over its instances."""
        x = fwd.unpack_dual(self.x).primal  # type: ignore[no-untyped-call]
        dims = range(2, x.dim()) if self._instances else [d for d in range(x.dim()) if d != 1]
        variance, mean = torch.var_mean(x, tuple(dims), correction=1)
        if self._instances:
            variance, mean = variance.mean(0), mean.mean(0)
        return torch.cat([mean, variance])

    def normalised(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The result with other running statistics, differentiable by them."""
        shape = [-1] + [1] * (self.x.dim() - 2)
        found = (self.x - mean.view(shape)) * torch.rsqrt(variance + self.eps).view(shape)
        found = found if self.weight is None else found * self.weight.view(shape)
        return found if self.bias is None else found + self.bias.view(shape)  # type: ignore[no-any-return]


Updates: TypeAlias = Sequence[tuple[int, Tensor]]


@dataclass(frozen=True, slots=True)
class Carried:
    """A cotangent or tangent of the running statistics between two steps.

    Attributes:
        statistics: of the model.
        values: [K, Q].
        counts: how many forward passes each normalisation has seen.
    """

    statistics: RunningStatistics
    values: Tensor
    counts: tuple[int, ...]

    def pulled(self, updates: Updates) -> tuple[list[Tensor], Carried]:
        """The cotangents [K, 2C] of a step's updates, in their order, and what is carried to the step before."""
        values, counts, bars = self.values.clone(), list(self.counts), []
        for place, _ in reversed(updates):
            span, m = self.statistics.spans[place], self._momentum(place, counts[place])
            bars.append(m * values[:, span])
            values[:, span] *= 1 - m
            counts[place] -= 1
        return bars[::-1], replace(self, values=values, counts=tuple(counts))

    def pushed(self, updates: Updates, changes: Sequence[Tensor]) -> Carried:
        """What is carried to the step after, from the changes [K, 2C] of a step's updates."""
        values, counts = self.values.clone(), list(self.counts)
        for (place, _), change in zip(updates, changes, strict=True):
            counts[place] += 1
            span, m = self.statistics.spans[place], self._momentum(place, counts[place])
            values[:, span] = (1 - m) * values[:, span] + m * change
        return replace(self, values=values, counts=tuple(counts))

    def row(self, k: int) -> Carried:
        """That of direction k alone."""
        return replace(self, values=self.values[k : k + 1])

    @classmethod
    def rows(cls, found: Sequence[Carried]) -> Carried | None:
        """Those of several directions together; None of none."""
        return replace(found[0], values=torch.cat([each.values for each in found])) if found else None

    def plus(self, values: Tensor) -> Carried:
        """With values [K, Q] added."""
        return replace(self, values=self.values + values)

    def _momentum(self, place: int, count: int) -> float:
        momentum = self.statistics.momenta[place]
        return 1 / max(count, 1) if momentum is None else momentum
