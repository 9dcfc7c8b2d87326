"""What forward passes move beside the weights, and whether anything depends on it.

A replay makes every step by itself: from the recorded weights, with the buffers that training began with. That is right
as long as no loss depends on what an earlier pass left behind. BatchNorm's running statistics are such a case: in train
mode the loss is computed from the batch. A normaliser by a running mean, the vectors of a spectral normalisation, a
codebook that follows by moving averages, an observer of ranges, a hidden state, a counter of an annealing are not:
their training is no function of weights and batch, and a derivative without them lacks a part.

So one pass over the first recorded batch is made on a copy, and what it has moved (buffers, and values that modules
keep as attributes) is given other values: those after the pass, and those before it with a little added. If the loss
of the same batch is then another, the training depends on them. So it is with buffers that the training loop itself has
changed, and with target losses, which see the buffers as the run has left them.

What moves and matters to nobody (counters of calls, logs, caches) is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from trajrec.errors import DerivativeError
from trajrec.replay.losses.batches import Samples
from trajrec.replay.losses.function import LossFunction
from trajrec.replay.machine.generators import generators_kept
from trajrec.replay.step import Step

_INNER = frozenset(vars(nn.Module()))
_MOST_LEAVES = 256
_NUDGE = 1e-3
_SPREAD = 4.0  # times what two passes from the same state differ by: sums on a GPU do

Place = tuple[str, str]  # name of the module, and of the buffer or attribute in it
Values = dict[Place, Any]


@dataclass(frozen=True, slots=True)
class Moved:
    """What passes, or the training loop, have moved: places of one module, buffers or attributes.

    Attributes:
        module: its name; "" is the model itself.
        names: of the buffers or attributes.
        after: their values after a pass (or at the end of the run).
        nudged: the names of those that had a value before.
        are_buffers: whether all are buffers.
        by_loop: whether they changed during the run, and not in the pass that was tried: by the loop, as a rule.
    """

    module: str
    names: tuple[str, ...]
    after: Mapping[str, Any]
    nudged: tuple[str, ...]
    are_buffers: bool
    by_loop: bool

    def only(self, names: Sequence[str], are_buffers: bool) -> Moved:
        """Some of the places."""
        return replace(self, names=tuple(name for name in self.names if name in names), are_buffers=are_buffers)


def find_moved(function: LossFunction, losses: Callable[[], Tensor]) -> tuple[Moved, ...]:
    """What moves in a training pass, or in the run, but for the running statistics of torch's own normalisations.

    Args:
        function: the Task's losses; its model is left as it was.
        losses: computes those of the first recorded batch.
    """
    with function.on_a_copy(), _kept(function.model) as start:
        try:
            losses()
        except Exception:  # what a model raises it raises again, where it is told
            return ()
        after = _values(function.model)
        modules = dict(function.model.named_modules())
    first, last = function.buffers_at_ends()
    moved = {place: v for place, v in after.items() if place not in start or _differs(start[place], v)}
    changed = {_place(name): last[name] for name in last if name in first and _differs(first[name], last[name])}
    of_loop = {place: value for place, value in changed.items() if place not in moved}
    return (*_by_module(modules, moved, start, by_loop=False), *_by_module(modules, of_loop, start, by_loop=True))


def check_training(function: LossFunction, losses: Callable[[], Tensor], moved: Sequence[Moved]) -> None:
    """Checks that the training loss does not depend on what moves.

    Raises:
        DerivativeError: naming what does, and what helps.
    """
    if found := _that_matter(function, losses, moved):
        raise DerivativeError(_sentence(found[0], function.model))


def check_targets(function: LossFunction, losses: Callable[[], Tensor], moved: Sequence[Moved]) -> None:
    """Checks that target losses do not depend on what moves, in the mode that the function is in.

    Raises:
        DerivativeError: naming what does, and what helps.
    """
    # A number that the loop sets is a schedule (a temperature, say): it does not depend on the samples.
    suspects = [m for m in moved if not (m.by_loop and all(_is_number(value) for value in m.after.values()))]
    if found := _that_matter(function, losses, suspects):
        what = _what(found[0], function.model)
        raise DerivativeError(
            f"The target loss depends on {what}, which {_mover(found[0])}: how that depends on the training samples is "
            "in no derivative, and would be missing in every contribution. Give Task(measure=...) a loss that does "
            "not use them, or record a training that keeps them fixed."
        )


def _that_matter(function: LossFunction, losses: Callable[[], Tensor], moved: Sequence[Moved]) -> list[Moved]:
    """Those whose values the losses depend on."""
    if not moved:
        return []
    with function.on_a_copy(), _kept(function.model) as start, generators_kept(function.device):

        def found(change: Values) -> Tensor:
            _put(function.model, start)
            _put(function.model, change)
            torch.manual_seed(0)
            return losses().double()

        usual = found({})
        spread = _SPREAD * float((found({}) - usual).abs().max())

        def is_another(change: Values) -> bool:
            try:
                return not bool(((found(change) - usual).abs() <= spread).all())
            except Exception:  # a state of another batch, say, that is not looked at would do no harm
                return True

        def matters(chosen: Sequence[Moved]) -> bool:
            after = {(m.module, name): m.after[name] for m in chosen for name in m.names}
            # A cache that is not there before the first pass is what that pass makes of it, and nothing else.
            nudged = {(m.module, name) for m in chosen for name in m.names if name in m.nudged}
            changed = {place: tree_map(_nudged, start[place]) for place in nudged if place in start}
            return any(is_another(change) for change in (after, changed))

        if not matters(moved):
            return []
        modules = dict(function.model.named_modules())

        def named(one: Moved) -> Moved:
            names = [name for name in one.names if matters([one.only([name], False)])] or one.names
            buffers = [name for name in one.names if name in modules[one.module]._buffers]
            # The buffers of a module belong together; attributes may be anything.
            return one.only(buffers, True) if set(names) & set(buffers) else one.only(names, False)

        return [named(one) for one in moved if matters([one])] or [named(moved[0])]


# -- values that modules keep ------------------------------------------------------------------------------------------


def _values(model: nn.Module) -> Values:
    """Copies of all buffers, and of attributes that are made of tensors and numbers."""
    found: Values = {}
    for module_name, module in model.named_modules():
        kept = {name: value for name, value in vars(module).items() if name not in _INNER}
        for name, value in (*module._buffers.items(), *kept.items()):
            leaves = tree_leaves(value) if isinstance(value, list | tuple | dict) else [value]
            if len(leaves) <= _MOST_LEAVES and all(isinstance(leaf, Tensor | int | float | None) for leaf in leaves):
                found[module_name, name] = tree_map(_copied, value)
    return found


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _put(model: nn.Module, values: Values) -> None:
    """Puts copies of values into their places."""
    modules = dict(model.named_modules())
    for (module, name), value in values.items():
        owner = modules[module]
        place: Any = owner._buffers if name in owner._buffers else vars(owner)
        place[name] = tree_map(_copied, value)


@contextmanager
def _kept(model: nn.Module) -> Iterator[Values]:
    """Inside, values of modules may be changed; a model that cannot be copied has its own back afterwards."""
    start = _values(model)
    try:
        yield start
    finally:
        _put(model, start)


def _differs(a: Any, b: Any) -> bool:
    (left, form), (right, other) = tree_flatten(a), tree_flatten(b)
    return form != other or not all(_same(x, y) for x, y in zip(left, right, strict=True))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def _nudged(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    signs = torch.ones_like(value).flatten()
    signs[::2] = -1.0  # one way everywhere would leave directions as they are
    return value * (1 + _NUDGE) + _NUDGE * signs.view_as(value)


def _is_number(value: Any) -> bool:
    return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, int | float)


# -- by module, and in words -------------------------------------------------------------------------------------------


def _place(buffer: str) -> Place:
    module, _, name = buffer.rpartition(".")
    return module, name


def _by_module(modules: dict[str, nn.Module], moved: Values, start: Values, by_loop: bool) -> Iterator[Moved]:
    for module, places in groupby(sorted(moved), key=lambda place: place[0]):
        owner = modules[module]
        names = tuple(name for _, name in places if not _is_running(owner, name))
        if names:
            buffers = all(name in owner._buffers for name in names)
            had = tuple(name for name in names if start.get((module, name)) is not None)
            yield Moved(module, names, {name: moved[module, name] for name in names}, had, buffers, by_loop)


def _is_running(module: nn.Module, name: str) -> bool:
    """Whether this is a running statistic of a normalisation that computes its training loss from the batch."""
    own = type(module).forward in (_BatchNorm.forward, _InstanceNorm.forward, nn.SyncBatchNorm.forward)
    return own and isinstance(module, _NormBase) and name in ("running_mean", "running_var", "num_batches_tracked")


def _what(moved: Moved, model: nn.Module) -> str:
    """The places in words: "the buffers _u and _v of the spectral normalisation '0.parametrizations.weight.0'"."""
    module = model.get_submodule(moved.module)
    *others, last = moved.names
    noun = ("buffer" if moved.are_buffers else "attribute") + "s" * bool(others)
    names = f"{', '.join(others)} and {last}" if others else last
    kind = "the spectral normalisation" if _is_spectral(module) else f"the {type(module).__name__}"
    return f"the {noun} {names} of {kind}{f' {moved.module!r}' if moved.module else ''}"


def _is_spectral(module: nn.Module) -> bool:
    hooks = [*module._forward_pre_hooks.values()]
    return any("SpectralNorm" in type(one).__name__ for one in (module, *hooks))


def _mover(moved: Moved) -> str:
    if moved.by_loop:
        return "changed on the way, in forward passes or by the training loop"
    return "every forward pass in train mode changes"


def _sentence(moved: Moved, model: nn.Module) -> str:
    kept = "in keyframes only" if moved.are_buffers else "nowhere"
    return (
        f"The training loss depends on {_what(moved, model)}, which {_mover(moved)}: what one step leaves there, the "
        f"next one uses. They are recorded {kept}, so that no step can be made again by itself, and how they depend on "
        f"the samples would be missing in every derivative. {_help(moved, model.get_submodule(moved.module))}"
    )


def _help(moved: Moved, module: nn.Module) -> str:
    kind, names = type(module).__name__.lower(), " ".join(moved.names).lower()
    at = f"model.get_submodule({moved.module!r})" if moved.module else "the model"
    if _is_spectral(module):
        return (
            "Record a training in which the normalisation is in eval mode, after some passes in train mode: its "
            f"vectors then stay as they are ({at}.eval())."
        )
    if any(word in kind for word in ("observer", "quant")) and "vector" not in kind and "vq" not in kind:
        return "Record a training whose ranges are fixed: model.apply(torch.ao.quantization.disable_observer)."
    if any(word in kind + names for word in ("codebook", "embed", "cluster", "quantiz", "vq")):
        return "Record a training that learns the codebook by a gradient (a codebook loss), or keeps it fixed."
    if moved.by_loop:
        return "Record a training that leaves them as they are, or computes with them outside of the model."
    if not moved.are_buffers:
        return (
            "Where it is a hidden state, let the model begin every batch with a new one; where it counts steps, record "
            "a training in which it stays as it is."
        )
    return (
        "Record a training that computes them from the batch alone (as nn.BatchNorm1d does), or that keeps them as "
        f"they are ({at}.eval(), values computed beforehand)."
    )


def losses_of(function: LossFunction, samples: Samples, step: Step) -> Callable[[], Tensor]:
    """Computes the losses [B] of a recorded step, whose batches are fetched once."""
    step = replace(step, parts=tuple(replace(part, batch=samples.part(step, part)) for part in step.parts))

    def losses() -> Tensor:
        with torch.no_grad():
            return torch.cat([part.losses for part in function.parts(step.before, samples, step)])

    return losses
