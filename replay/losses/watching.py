"""One pass over the first recorded batch, watched: what a loss does that its values do not show.

It may change parameters in place, outside of autograd and of the optimizer. `Embedding(max_norm=...)` shortens the rows
that it looks up, others clamp or normalise `weight.data`. The derivative of such a change is in no graph, and the
weights that a replay was given would change under it. The pass shows, on copies, what operators write to and whose
`.data` is given another value, also where that happens to change nothing at the first step.

It may take derivatives itself (`torch.autograd.grad`: physics, gradient penalties). Then the forms of derivative that
see through it are fewer (`replay.methods.adjoint`), and normalisations are composed (`replay.derivatives.composed`).

It may have kinks (`replay.losses.kinks`), which no derivative sees.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trajrec.errors import DerivativeError
from trajrec.records import Json
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.kinks import SMOOTH, Kinks
from trajrec.replay.step import Step

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the names of the tensors whose storages operators write to inside."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: set[str] = set()
        self._places = {_place(value): name for name, value in named.items() if value.numel()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the operator."""
        kwargs = kwargs or {}
        places = (_place(value) for value in _written(func, args, kwargs))
        self.names |= {self._places[place] for place in places if place in self._places}
        return func(*args, **kwargs)


def _written(func: Any, args: Any, kwargs: Json) -> Iterator[Tensor]:
    """The tensors that an operator's schema says it writes to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


class _Calls(TorchFunctionMode):
    """Notes the names of the tensors whose `.data` is assigned to inside, and whether derivatives are taken."""

    def __init__(self, named: dict[str, Tensor], kinks: Kinks) -> None:
        super().__init__()
        self._kinks = kinks
        self.names: set[str] = set()
        self.derivatives = False
        self._names = {id(value): name for name, value in named.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        self.derivatives |= func is torch.autograd.grad
        if func == _SET_DATA and id(args[0]) in self._names:
            self.names.add(self._names[id(args[0])])
        with self._kinks.resting() if func in SMOOTH else nullcontext():
            return func(*args, **(kwargs or {}))


def watch(function: LossFunction, samples: Samples, step: Step) -> None:
    """Watches the loss of a step: tells the function whether it takes derivatives itself, and its kinks.

    Raises:
        DerivativeError: if it changes parameters in place; names them, and the module.
    """
    named = {name: value.clone() for name, value in function.layout.split(step.before).items()}
    writes, kinks = _Writes(named), Kinks(named.values())
    calls = _Calls(named, kinks)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), function.on_a_copy():
            # Data are fetched before: they may take many operators, all watched.
            parts = tuple(replace(part, batch=samples.part(step, part)) for part in step.parts)
            with calls, writes, kinks:
                list(function.parts(named, samples, replace(step, parts=parts)))
        function.kinks = tuple(sorted(kinks.names))
    except Exception:  # what a model raises it raises again, where it is told
        pass
    function.takes_derivatives = calls.derivatives
    if changed := [name for name in named if name in writes.names | calls.names]:
        raise _refusal(function.model, changed)


def _refusal(model: nn.Module, names: list[str]) -> DerivativeError:
    return DerivativeError(
        f"The forward pass changes {_shown(names)} in place{_limited(model, names)}: outside of autograd "
        "and of the optimizer, so no replay can differentiate it. Record a training that computes with a changed "
        "copy instead (for max_norm: torch.renorm of the weight), or changes weights in the optimizer's step."
    )


def _shown(names: list[str]) -> str:
    several = f"parameters {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
    return several if len(names) > 1 else f"parameter {names[0]}"


def _limited(model: nn.Module, names: list[str]) -> str:
    """The module with a `max_norm` that one of the parameters belongs to, in words."""
    for name, module in model.named_modules():
        limit = getattr(module, "max_norm", None)
        if limit is not None and any(owner.rpartition(".")[0] == name for owner in names):
            return f" ({type(module).__name__} {name!r} has max_norm={limit})"
    return ""
