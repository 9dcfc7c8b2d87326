"""One pass over the first recorded batch, watched: what a loss does that its values do not show.

It may change parameters in place, outside of autograd and of the optimizer. `Embedding(max_norm=...)` shortens the rows
that it looks up, others clamp or normalise `weight.data`. The derivative of such a change is in no graph, and the
weights that a replay was given would change under it. The pass shows, on copies, what operators write to and whose
`.data` is given another value, also where that happens to change nothing at the first step.

It may take derivatives itself (`torch.autograd.grad`: physics, gradient penalties). Then the forms of derivative that
see through it are fewer (`replay.derivatives.choice`), and normalisations are composed (`replay.derivatives.composed`).

It may hide a part of itself from its own gradient (`replay.derivatives.through`), and values may leave the graph
(`.item()`, numpy), which nothing sees through: where they did is kept for the refusal (`replay.proof.derivative`).

It may have kinks (`replay.losses.kinks`), which no derivative sees.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trajrec.errors import DerivativeError
from trajrec.records import Json
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.kinks import SMOOTH, Kinks
from trajrec.replay.losses.seen import Seen
from trajrec.replay.losses.targets import Targets
from trajrec.replay.machine.generators import generators_kept
from trajrec.replay.step import Step

_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]
# What cuts a value off from its graph.
CUTS = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]
CUTS_IN_PLACE = (Tensor.detach_, torch.detach_)
# What makes a value a number, or an array, that is in no graph.
LEAVING = (Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__float__, Tensor.__dlpack__)
_EXITS = {
    Tensor.item: ".item()",
    Tensor.tolist: ".tolist()",
    Tensor.numpy: ".numpy()",
    Tensor.__array__: "numpy",
    Tensor.__float__: "float()",
    Tensor.__dlpack__: "dlpack",
    torch.tensor: "torch.tensor()",
}
_OURS, _TORCH = str(Path(__file__).parent.parent.parent), str(Path(torch.__file__).parent)


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


Apply: TypeAlias = Callable[..., Any]


@contextmanager
def functions_applied(by: Callable[[type[Function], Apply], Apply]) -> Iterator[None]:
    """Inside, the user's own autograd functions are applied as `by` says, of a function and its own way.

    Also those whose bound `apply` somebody kept: what is replaced is what it calls.
    """

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        own = super(_SingleLevelFunction, cls).apply  # type: ignore[misc]
        # Neither torch's nor ours.
        theirs = not cls.__module__.startswith(("torch.", "trajrec."))
        return (by(cls, own) if theirs else own)(*args, **kwargs)

    _SingleLevelFunction.apply = classmethod(apply)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del _SingleLevelFunction.apply  # type: ignore[attr-defined]


class _Calls(TorchFunctionMode):
    """Notes what the user's code calls inside: assignments to `.data` of tensors, derivatives, stops, ways out."""

    def __init__(self, named: dict[str, Tensor], kinks: Kinks) -> None:
        super().__init__()
        self._kinks = kinks
        self.names: set[str] = set()
        self.called: set[Any] = set()
        self.exits: list[str] = []
        self.functions: list[str] = []
        self.stops, self.raised = False, True
        self._names = {id(value): name for name, value in named.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        kwargs = kwargs or {}
        self.called.add(func)
        if func == _SET_DATA and id(args[0]) in self._names:
            self.names.add(self._names[id(args[0])])
        if func in CUTS or func in CUTS_IN_PLACE:
            self.stops |= args[0].requires_grad
        elif func is functional.gumbel_softmax or (func is torch.autograd.grad and cuts_a_derivative(args, kwargs)):
            self.stops = True
        elif func in _EXITS:
            self._exit(func, args)
        elif not torch.is_grad_enabled():
            self.stops |= any(isinstance(v, Tensor) and v.requires_grad for v in tree_leaves((args, kwargs)))
        with self._kinks.resting() if func in SMOOTH else nullcontext():
            return func(*args, **kwargs)

    @contextmanager
    def of(self, function: LossFunction, *others: AbstractContextManager[Any]) -> Iterator[None]:
        """Inside, what the losses of a function call is noted, by others as well."""

        @contextmanager
        def within() -> Iterator[None]:
            with ExitStack() as stack:
                for each in (self, functions_applied(self._function), *others):
                    stack.enter_context(each)
                yield

        with function.evaluated(within):
            yield

    def _function(self, cls: type[Function], own: Apply) -> Apply:
        self.functions.append(cls.__name__)
        return own

    def tell(self, function: LossFunction) -> Seen:
        """Adds what was noted to what is known of a function, and returns it."""
        seen = Seen(
            derivatives=torch.autograd.grad in self.called,
            stops=self.stops,
            functions=tuple(dict.fromkeys(self.functions)),
            hooks=Tensor.register_hook in self.called or _has_backward_hooks(function.model),
            called=frozenset(self.called),
            exits=tuple(dict.fromkeys(self.exits)),
            raised=self.raised,
        )
        function.seen |= seen
        return seen

    def _exit(self, func: Any, args: Any) -> None:
        if isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.exits.append(f"{_EXITS[func]} in {_line_of_the_user()}")


def _line_of_the_user() -> str:
    """FILE, line N of the user's code that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_OURS, _TORCH)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}, line {frame.f_lineno}"


def cuts_a_derivative(args: Any, kwargs: Json) -> bool:
    """Whether a call of torch.autograd.grad gives a derivative that is a constant to what is made of it."""
    return not (args[4] if len(args) > 4 else kwargs.get("create_graph", False))


def writes_to(func: Any, args: Any, kwargs: Json) -> Tensor | None:
    """The tensor that a function of torch changes in place, or None."""
    if isinstance(kwargs.get("out"), Tensor):
        return kwargs["out"]  # type: ignore[no-any-return]
    name = getattr(func, "__name__", "")
    changes = name in ("__setitem__", "__set__") or (name.startswith("__i") and name not in ("__int__", "__index__"))
    changes |= name.endswith("_") and not name.endswith("__")
    return args[0] if changes and args and isinstance(args[0], Tensor) else None


def watch(function: LossFunction, samples: Samples, step: Step) -> None:
    """Watches the loss of a step, and tells the function what was seen.

    Raises:
        DerivativeError: if it changes parameters in place; names them, and the module.
    """
    named = {name: value.clone().requires_grad_() for name, value in function.layout.split(step.before).items()}
    writes, kinks = _Writes(named), Kinks(named.values())
    calls = _Calls(named, kinks)
    # Data are fetched before: they may take many operators, all watched.
    with suppress(Exception):  # what a model raises it raises again, where it is told
        parts = tuple(replace(part, batch=samples.part(step, part)) for part in step.parts)
        with _unharmed(function), calls.of(function, writes, kinks):
            list(function.parts(named, samples, replace(step, parts=parts)))
        calls.raised = False
    calls.tell(function)
    function.kinks = None if function.seen.raised else tuple(sorted({*(function.kinks or ()), *kinks.names}))
    if changed := [name for name in named if name in writes.names | calls.names]:
        raise _refusal(function.model, changed)


@contextmanager
def _unharmed(function: LossFunction) -> Iterator[None]:
    with generators_kept(function.device), torch.enable_grad(), function.on_a_copy():
        yield


def watch_targets(targets: Targets, function: LossFunction, samples: Samples, weights: Tensor) -> Seen:
    """Watches a target's loss: in eval mode that of the training may go other ways, too. Returns what it showed."""
    calls, ids = _Calls({}, Kinks(())), targets.groups[0][:1]
    function.eval_mode()
    with suppress(Exception):
        batch = samples.batch(ids)
        with _unharmed(function), calls.of(function):
            measures = function.measures if targets.spans is None else function.token_measures
            measures(weights.detach().requires_grad_(), batch, len(ids))
        calls.raised = False
    function.train_mode()
    return calls.tell(function)


def _has_backward_hooks(model: nn.Module) -> bool:
    return any(module._backward_hooks or module._backward_pre_hooks for module in model.modules())


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
