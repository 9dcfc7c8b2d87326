"""Finds the model that a script trains, and its optimizers, for recordings that are started from outside the script.

Until the first optimizer step every module call is watched; the model is the outermost called module that holds all of
the optimizer's parameters. After that step nothing but this model is watched any more.

Other optimizers that exist by then, and hold other parameters of that model for which there are gradients, are taken to
step together with the first one. One of another model, as in adversarial training, is none of the recording's business.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as library
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer

from trajrec.capture.guard import Guard
from trajrec.capture.observing.observer import Observer
from trajrec.capture.stopwatch import Stopwatch
from trajrec.errors import RecordingError
from trajrec.snapshot.generators import Generators, States


def _states_for(module: nn.Module) -> Callable[[], States]:
    """Reads the generators that this module's forward pass may use."""
    parameter = next(module.parameters(), None)
    return Generators(torch.device("cpu") if parameter is None else parameter.device).states


def _named_inputs() -> dict[str, Any]:
    """What the module that is being called was given by name.

    Torch's hooks of all modules are not told. The hook was called by `Module._call_impl`, where it stands.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != library.__file__:
        frame = frame.f_back
    named = {} if frame is None else frame.f_locals.get("kwargs", {})
    return named if isinstance(named, dict) else {}


def companions(optimizer: Optimizer, model: nn.Module) -> list[Optimizer]:
    """The optimizer, and others that hold other parameters of the model, with gradients."""
    gc.collect()
    others = {id(p) for p in model.parameters()} - {id(p) for p in parameters_of(optimizer)}
    found = [optimizer]
    for candidate in [value for value in gc.get_objects() if issubclass(type(value), Optimizer)]:
        held = {id(p) for p in parameters_of(candidate)}
        if held and held <= others and any(p.grad is not None for p in parameters_of(candidate)):
            found.append(candidate)
            others -= held
    return found


def parameters_of(optimizer: Optimizer) -> list[Any]:
    """The parameters of all its groups; none of one that is still being made."""
    return [p for group in getattr(optimizer, "param_groups", ()) for p in group["params"]]


class Discovery:
    """Finds the model that a script trains: the outermost module whose parameters the optimizer holds."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self._called: dict[int, nn.Module] = {}
        self._depth = 0
        self._outermost: nn.Module | None = None
        self._handles: list[Any] = []

    def install(self, guarded: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Watches every module until the first optimizer step, with hooks that `guarded` makes harmless."""
        self._handles = [
            register_module_forward_pre_hook(guarded(self._enter)),
            register_module_forward_hook(guarded(self._leave), always_call=True),
        ]

    def remove(self) -> None:
        """Stops watching."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._depth += 1
        if self._depth > 1 or isinstance(module, nn.modules.loss._Loss):
            return
        gradients = torch.is_grad_enabled()
        named = _named_inputs()
        given = (*inputs, named) if named else inputs
        self.observer.forward(gradients, module.training, given, _states_for(module))
        if gradients:
            self._called[id(module)] = module
            self._outermost = module

    def _leave(self, module: nn.Module, _: Any, outputs: Any) -> None:
        self._depth -= 1
        if self._depth == 0 and module is self._outermost:
            self._outermost = None
            self.observer.forwarded(outputs)

    def model_of(self, *optimizers: Optimizer) -> nn.Module:
        """The called module that holds all parameters of the optimizers.

        Raises:
            RecordingError: if no single module does.
        """
        wanted = {id(p) for optimizer in optimizers for p in parameters_of(optimizer)}
        for module in self._called.values():
            if wanted <= {id(p) for p in module.parameters()}:
                return module
        raise RecordingError(
            f"No module that was called holds all {len(wanted)} parameters of the {type(optimizers[0]).__name__} "
            "optimizer, so the model cannot be told. Use trajrec.record(model=..., optimizer=...) in the script."
        )


class ModelHook:
    """Stands in the model's hooks; copies and pickles of the model do not take the recorder along."""

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        """Before or after a forward pass."""
        self._call(*args)

    def __deepcopy__(self, _: Any) -> ModelHook:
        return self

    def __reduce__(self) -> Any:
        # A hook that hands everything on as it is, and needs nothing of ours where the model is loaded.
        return getattr, (nullcontext(), "__exit__")


def watch_model(model: nn.Module, observer: Observer, guard: Guard, watch: Stopwatch) -> list[Any]:
    """Tells the observer of every forward pass of the model, by hooks that can be removed.

    Raises:
        RecordingError: if the model has nothing to train.
    """
    if next(model.parameters(), None) is None:
        raise RecordingError(f"model= has no parameters: a {type(model).__name__} does not train.")
    states = _states_for(model)

    def enter(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        if module is model:  # a copy (an average of weights, say) brings its hooks along
            given = (*inputs, named) if named else inputs
            observer.forward(torch.is_grad_enabled(), module.training, given, states)

    def leave(module: nn.Module, _: Any, outputs: Any) -> None:
        if module is model and torch.is_grad_enabled():
            observer.forwarded(outputs)

    before, after = [ModelHook(guard.around(hook, watch)) for hook in (enter, leave)]
    handles: list[Any] = [model.register_forward_pre_hook(before, with_kwargs=True)]
    if getattr(model, "_compiled_call_impl", None) is None:  # else a compiler would look into the outputs
        handles.append(model.register_forward_hook(after))
    return handles
