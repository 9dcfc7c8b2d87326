"""Parameters that a forward pass changes in place: outside of autograd and of the optimizer, so nothing of it is known.

`Embedding(max_norm=...)` shortens the rows that it looks up, others clamp or normalise `weight.data`. The derivative of
such a change is in no graph, and the weights that a replay was given would change under it. One pass over the first
recorded batch, on copies, shows what operators write to and whose `.data` is given another value, also where that
happens to change nothing at the first step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trajrec.errors import DerivativeError
from trajrec.replay.model import LossFunction
from trajrec.replay.samples import Samples
from trajrec.replay.trajectory import Step

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


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors that an operator's schema says it writes to."""
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[number] if number < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def _place(value: Tensor) -> int:
    return value.untyped_storage().data_ptr()


class _Assignments(TorchFunctionMode):
    """Notes the names of the tensors whose `.data` is assigned to inside."""

    def __init__(self, named: dict[str, Tensor]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._names = {id(value): name for name, value in named.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        if func is _SET_DATA and id(args[0]) in self._names:
            self.names.add(self._names[id(args[0])])
        return func(*args, **(kwargs or {}))


def check_in_place(function: LossFunction, samples: Samples, step: Step) -> None:
    """Checks that the forward pass of a step leaves the parameters alone.

    Raises:
        DerivativeError: naming those that it changes, and the module.
    """
    names = _changed(function, samples, step)
    if names:
        raise DerivativeError(
            f"The forward pass changes {_shown(names)} in place{_limited(function.model, names)}: outside of autograd "
            "and of the optimizer, so no replay can differentiate it. Record a training that computes with a changed "
            "copy instead (for max_norm: torch.renorm of the weight), or changes weights in the optimizer's step."
        )


def _changed(function: LossFunction, samples: Samples, step: Step) -> list[str]:
    """Names of the parameters that a pass over a step changes; none where the pass cannot be made."""
    named = {name: value.clone() for name, value in function.layout.split(step.before).items()}
    writes, assignments = _Writes(named), _Assignments(named)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            # Data are fetched before: they may take many operators, all watched.
            parts = tuple(replace(part, batch=samples.part(step, part)) for part in step.parts)
            with assignments, writes:
                list(function.parts(named, samples, replace(step, parts=parts)))
    except Exception:  # what a model raises it raises again, where it is told
        return []
    finally:
        function.train_mode()
    return [name for name in named if name in writes.names | assignments.names]


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
