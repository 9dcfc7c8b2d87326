r"""Gradients that hide a part of their loss, differentiated as the functions of the weights that they are.

The exact form needs the derivative of the training's gradient g(w). Autograd of autograd gives it where g is the plain
gradient of a loss. It is not where the training hid something from its backward pass: a stop-gradient (`detach`,
`.data`, `no_grad`) makes a part a constant, a backward hook changes what goes by, an autograd.Function of the user's
has a backward of its own (straight-through estimators, gradient reversal). Such a part is no constant of g: it moves
with the weights. So the losses are made anew, inside `hidden_parts`, in such a way that

    while g is made             stops give nothing back, hooks act, functions use their own backward
    while g is differentiated   stops give everything back, hooks are silent, functions give back what the derivative
                                of their forward pass says                                     (`differentiating`)

The values, and g, are the same to the bit. J = dg/dw is no symmetric matrix then: going backwards needs J' gamma, and
going forwards J D (`replay.derivatives.reverse`). In forward mode a stop keeps the value and drops the tangent.

What leaves the graph otherwise (`.item()`, numpy, values saved on a context) is not seen, and is found by the second
proof (`replay.proof.derivative`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from trajrec.errors import TrajrecError, first_line
from trajrec.replay.derivatives.composed import applied, composed
from trajrec.replay.derivatives.operators import UNSEEN, operator_without
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.losses.watching import (
    CUTS,
    CUTS_IN_PLACE,
    LEAVING,
    Apply,
    cuts_a_derivative,
    functions_applied,
    writes_to,
)

Stop = Callable[[Tensor], Tensor]


class _Direction:
    """Whether the gradient is differentiated at the moment; of the process, for a backward pass has its own threads."""

    second = False


@contextmanager
def differentiating(hides: bool = True) -> Iterator[None]:
    """Inside, backward passes differentiate the gradient."""
    before, _Direction.second = _Direction.second, hides
    try:
        yield
    finally:
        _Direction.second = before


@contextmanager
def hidden_parts(function: LossFunction, *, forward: bool = False) -> Iterator[None]:
    """Inside, the losses of a function are made so that their gradient can be differentiated.

    Args:
        function: per-sample losses; what they do has been watched.
        forward: tangents are carried forwards, and hooks and functions have no part in it.
    """
    seen = function.seen

    @contextmanager
    def within() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(composed(seen, function.smoothing))
            if seen.hides:
                stack.callback(_forget_graphs, function.model)
                stack.enter_context(_told())
                stack.enter_context(_Seeing(_value_of if forward else _stopped, function.model))
            if seen.hooks and not forward:
                stack.enter_context(_silent_hooks(function.model))
            if seen.functions and not forward:
                stack.enter_context(functions_applied(_with_two_backward_passes))
            yield

    with function.evaluated(within):
        yield


@contextmanager
def _told() -> Iterator[None]:
    """What the user's code raises where its constants are none, inside, is a derivative that is not to be had."""
    try:
        yield
    except TrajrecError:
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and operator_without(error) is not None:
            raise
        raise RuntimeError(f"{UNSEEN} ({type(error).__name__}: {first_line(error)})") from error


class _Stop(Function):
    """A value that gives nothing back while the gradient is made, and everything while it is differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Any) -> Any:
        return value.clone()  # a view may not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, bar: Any) -> Any:
        return bar if _Direction.second else None


class _StopInPlace(Function):
    """The same, of a value that is cut off where it is."""

    @staticmethod
    def forward(ctx: Any, value: Any) -> Any:
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, bar: Any) -> Any:
        return bar if _Direction.second else None


class _Fork(Function):
    """Values with two backward passes: the first of the pair's while the gradient is made, then the second's."""

    @staticmethod
    def forward(ctx: Any, own: Any, plain: Any) -> Any:
        return own.view_as(own)

    @staticmethod
    def backward(ctx: Any, bar: Any) -> Any:
        return (None, bar) if _Direction.second else (bar, None)


def _stopped(value: Tensor) -> Tensor:
    return applied(_Stop, value) if value.requires_grad else value.detach()


def _value_of(value: Tensor) -> Tensor:
    return fwd.unpack_dual(value).primal  # type: ignore[no-any-return, no-untyped-call]


class _Seeing(TorchFunctionMode):
    """Puts stops where the loss cuts a value off, and silences the hooks that it registers."""

    def __init__(self, stop: Stop, model: nn.Module) -> None:
        super().__init__()
        self._stop = stop
        self._kept = {id(value) for value in model.buffers()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function."""
        kwargs = kwargs or {}
        if func in CUTS:
            return self._stop(args[0])
        if func in CUTS_IN_PLACE and args[0].requires_grad and not args[0].is_leaf:
            return applied(_StopInPlace, args[0])
        if func is Tensor.requires_grad_ and (False in args[1:] or False in kwargs.values()):
            return args[0]
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            return args[1].setdefault(id(args[0]), self._stop(args[0]))
        if func is torch.autograd.grad and cuts_a_derivative(args, kwargs):
            return self._derivative(*args[:4], **kwargs | {"create_graph": True})
        if func in LEAVING:
            return func(args[0].detach(), *args[1:], **kwargs)
        if func is Tensor.register_hook:
            return func(args[0], _silenced(args[1]))  # type: ignore[no-untyped-call]
        if func is functional.gumbel_softmax:
            return self._gumbel(*args, **kwargs)
        if torch.is_grad_enabled() or func is torch._C._set_grad_enabled:
            return func(*args, **kwargs)
        return self._without_grad(func, args, kwargs)

    def _without_grad(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Inside of `no_grad`: made of stopped values."""
        if kwargs.get("out") is not None:
            return func(*args, **kwargs)  # has no derivative
        written = writes_to(func, args, kwargs)
        if written is not None and (id(written) in self._kept or (written.requires_grad and not _is_local(written))):
            return func(*args, **kwargs)  # what goes on from one step to the next, or is changed unseen by the gradient

        def stopped(value: Any) -> Any:
            live = isinstance(value, Tensor) and value is not written and not _is_local(value)
            return self._stop(value) if live else value

        with torch.enable_grad():
            found = func(*tree_map(stopped, args), **tree_map(stopped, kwargs))
            return found if written is not None else tree_map(_local, found)

    def _derivative(self, *args: Any, **kwargs: Any) -> Any:
        """One that the loss takes itself, as a constant."""
        return tuple(None if d is None else self._stop(d) for d in torch.autograd.grad(*args, **kwargs))

    def _gumbel(self, logits: Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1) -> Tensor:
        soft = functional.gumbel_softmax(logits, tau, False, eps, dim)
        if not hard:
            return soft
        one = torch.zeros_like(soft).scatter_(dim, soft.argmax(dim, keepdim=True), 1.0)
        return one - self._stop(soft) + soft


def _local(value: Any) -> Any:
    """A value that was made of stopped ones, marked; a copy, which may be changed in place without harm."""
    if isinstance(value, Tensor):
        value = value.clone() if value.requires_grad and not value._is_view() else value
        value._made_without_grad = True
    return value


def _is_local(value: Tensor) -> bool:
    return getattr(value, "_made_without_grad", False)


def _forget_graphs(model: nn.Module) -> None:
    """Buffers that a forward pass gave new values hold no graph of them."""
    for module in model.modules():
        for name, value in module._buffers.items():
            if value is not None and value.requires_grad:
                module._buffers[name] = value.detach()


def _silenced(hook: Callable[..., Any]) -> Callable[..., Any]:
    def call(*given: Any) -> Any:
        return None if _Direction.second else hook(*given)

    return call


@contextmanager
def _silent_hooks(model: nn.Module) -> Iterator[None]:
    """Inside, backward hooks of a model's modules are such that are silent while the gradient is differentiated."""
    tables = [hooks for m in model.modules() for hooks in (m._backward_hooks, m._backward_pre_hooks) if hooks]
    kept = [dict(table) for table in tables]
    for table in tables:
        table.update({key: _silenced(hook) for key, hook in table.items()})
    try:
        yield
    finally:
        for table, hooks in zip(tables, kept, strict=True):
            table.update(hooks)


def _with_two_backward_passes(cls: type[Function], own_way: Apply) -> Apply:
    """How a function of the user's is applied: with its own backward pass, and that of what its forward computes."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        before = torch.get_rng_state()
        with torch._C.DisableTorchFunction():
            own = own_way(*args, **kwargs)
        after = torch.get_rng_state()
        torch.set_rng_state(before)
        plain = _forward_of(cls, args, kwargs)
        torch.set_rng_state(after)
        if isinstance(own, Tensor):
            return _forked(own, plain)
        return type(own)(map(_forked, own, plain)) if isinstance(own, tuple | list) else own

    return apply


def _forked(own: Any, plain: Any) -> Any:
    """A value with its own backward and that of its forward computation."""
    if not (isinstance(own, Tensor) and own.is_floating_point()):
        return own
    return applied(_Fork, own, plain)


def _forward_of(cls: Any, args: Any, kwargs: Any) -> Any:
    """What the forward pass of an autograd.Function computes, as an ordinary computation."""
    # Clones: some change what they are given.
    given = tree_map(lambda value: value.clone() if isinstance(value, Tensor) else value, args)
    with torch.enable_grad():
        if cls.setup_context is not Function.setup_context:
            return cls.forward(*given, **kwargs)
        return cls.forward(_Context(args), *given, **kwargs)


class _Context:
    """Stands in for a function's context in a forward pass that needs none."""

    def __init__(self, args: Any) -> None:
        self.needs_input_grad = tuple(isinstance(value, Tensor) and value.requires_grad for value in args)

    def _nothing(self, *_: Any) -> None:
        """Takes what a context is told."""

    save_for_backward = save_for_forward = mark_dirty = mark_non_differentiable = set_materialize_grads = _nothing
