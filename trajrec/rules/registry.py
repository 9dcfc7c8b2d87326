"""Which rule steps like which optimizer class: torch.optim's by name, a user's own by registration.

A recording names its optimizer and is never asked where to import it from. A name of torch.optim means torch's own
class; any other has to be brought by the user's code, as `Task(optimizer=MyOptimizer)` or by
`register_rule(MyOptimizer)` in a file that is imported anyway. A registered class is tried when its recording begins,
on small made-up weights: what cannot be replayed should be known before the training, not after.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch
from torch.optim import LBFGS, Optimizer, SparseAdam

from trajrec.errors import TaskError, UnsupportedOptimizerError
from trajrec.records import FloatArray, Keyframe, ParamSpec, RunSpec
from trajrec.rules.adaptive import KEPT, AdaptiveRule
from trajrec.rules.composed.several import JointRule, parts_of
from trajrec.rules.flat import FlatLayout
from trajrec.rules.matrix.adafactor import AdafactorRule
from trajrec.rules.matrix.muon import MuonRule
from trajrec.rules.selftest import self_test
from trajrec.rules.sgd import SGDRule
from trajrec.rules.step import Rule
from trajrec.rules.users.own import OwnRule

RULES: dict[str, type[Rule]] = {
    "SGD": SGDRule,
    **dict.fromkeys(KEPT, AdaptiveRule),
    "Adafactor": AdafactorRule,
    "Muon": MuonRule,
}

_registered: dict[type[Optimizer], type[Rule]] = {}
_SMALL = 16


def register_rule(optimizer_class: type[Optimizer], rule: type[Rule] | None = None) -> type[Optimizer]:
    """Makes an optimizer class of your own known, so that its trainings can be recorded and replayed.

    Call it in the training script before recording, and in the Task's file (or pass `Task(optimizer=...)`). It can
    stand above the class as a decorator.

    Args:
        optimizer_class: a subclass of torch.optim.Optimizer.
        rule: how it steps; default: its own `step()`, which has to be plain torch code (`trajrec.rules.OwnRule`).

    Returns:
        The class.

    Raises:
        UnsupportedOptimizerError: if these are not an optimizer class and a rule, or the class cannot have one.
    """
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, Optimizer)):
        raise UnsupportedOptimizerError(
            f"register_rule takes a subclass of torch.optim.Optimizer, not {optimizer_class!r}."
        )
    if rule is not None and not (isinstance(rule, type) and issubclass(rule, Rule)):
        raise UnsupportedOptimizerError(f"A rule is a subclass of trajrec.rules.Rule, not {rule!r}.")
    _check_gradients(optimizer_class, ())
    _registered[optimizer_class] = _bound(optimizer_class, rule or OwnRule)
    return optimizer_class


def _bound(optimizer_class: type[Optimizer], rule: type[Rule]) -> type[Rule]:
    return type(rule.__name__, (rule,), {"optimizer_class": optimizer_class, "__doc__": rule.__doc__})


def check_recordable(optimizer: Optimizer) -> None:
    """Checks that a run of this optimizer could be replayed.

    Raises:
        UnsupportedOptimizerError: if no rule can differentiate its steps.
    """
    kind = type(optimizer)
    _check_gradients(kind, [p for group in optimizer.param_groups for p in group["params"]])
    _check_texts(optimizer)
    if kind in _registered or (_is_torchs(kind.__module__) and kind.__name__ in RULES):
        return
    name = kind.__name__
    raise UnsupportedOptimizerError(
        f"There is no rule for the optimizer {name} of {kind.__module__}. If its step() is plain torch code, call "
        f"trajrec.register_rule({name}) before recording, and in the Task's file; otherwise write its step as a rule, "
        f"and call trajrec.register_rule({name}, MyRule). Without either, trajrec knows torch.optim's {_known()}."
    )


def _check_gradients(kind: type[Optimizer], params: Sequence[torch.Tensor]) -> None:
    if issubclass(kind, LBFGS | SparseAdam):
        raise UnsupportedOptimizerError(
            f"{kind.__name__} cannot be recorded: LBFGS takes several gradients a step, SparseAdam sparse ones. Train "
            "with an optimizer that takes one dense gradient a step."
        )
    if any(p.grad is not None and p.grad.layout is not torch.strided for p in params):
        raise UnsupportedOptimizerError(
            "A parameter has a sparse gradient, which cannot be recorded: sparse steps leave out weights and moments "
            "by which sample was in the batch. Use dense gradients, as with nn.Embedding(..., sparse=False)."
        )


def _check_texts(optimizer: Optimizer) -> None:
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            default = optimizer.defaults.get(key, value)
            if isinstance(value, str) and key != "name" and value != default:
                raise UnsupportedOptimizerError(
                    f"Parameter group {index} has {key}={value!r}, and the optimizer's default is {default!r}. Options "
                    "that are words are recorded once for all groups: pass it to the optimizer itself."
                )


def rule_for(spec: RunSpec, layout: FlatLayout, optimizer_class: type[Optimizer] | None = None) -> Rule:
    """The rule that steps like the run's optimizer.

    Args:
        spec: of the run.
        layout: the order of its trainable weights.
        optimizer_class: the class that the Task brings, if it does; one of several optimizers' where there are.

    Raises:
        TaskError: if the Task's class is not the run's.
        UnsupportedOptimizerError: if there is no rule.
    """
    names = [o.name for o in spec.optimizers]
    if names and (optimizer_class is None or optimizer_class.__name__ in names):
        return JointRule(spec, layout, lambda own, piece: rule_for(own, piece, _if_of(own, optimizer_class)))
    if optimizer_class is not None and optimizer_class.__name__ != spec.optimizer:
        raise TaskError(
            f"The run was trained with {spec.optimizer} (of {spec.optimizer_module}), but the Task says "
            f"optimizer={optimizer_class.__name__}."
        )
    return _rule_class(spec, optimizer_class)(spec, layout)


def _if_of(spec: RunSpec, kind: type[Optimizer] | None) -> type[Optimizer] | None:
    return kind if kind is not None and kind.__name__ == spec.optimizer else None


def _rule_class(spec: RunSpec, given: type[Optimizer] | None) -> type[Rule]:
    if given is None or _is_torchs(given.__module__):
        given = _find(spec)
    if given is not None:
        return _registered.get(given) or _bound(given, OwnRule)
    if _is_torchs(spec.optimizer_module) and spec.optimizer in RULES:
        return RULES[spec.optimizer]
    raise UnsupportedOptimizerError(
        f"The run was trained with {spec.optimizer} (of {spec.optimizer_module}), which is none of torch.optim's "
        f"{_known()}. Give the class to the Task, Task(..., optimizer={spec.optimizer}), or call "
        f"trajrec.register_rule({spec.optimizer}) in the Task's file."
    )


def _find(spec: RunSpec) -> type[Optimizer] | None:
    """The registered class of that name; of several that of the same module, or else the last."""
    named = [kind for kind in _registered if kind.__name__ == spec.optimizer]
    same = [kind for kind in named if kind.__module__ == spec.optimizer_module]
    if _is_torchs(spec.optimizer_module):
        named = []
    return next(reversed(same or named), None)


def rehearse(spec: RunSpec, hyper: FloatArray) -> None:
    """Lets the rule of a registered class prove itself on small made-up weights, when its recording begins.

    Raises:
        UnsupportedOptimizerError: if it does not.
    """
    if spec.optimizers:
        for part in parts_of(spec, FlatLayout(spec)):
            rehearse(part.spec, part.hyper(hyper))
        return
    kind = _find(spec)
    if kind is None:
        return
    small = replace(spec, params=_shrunk(spec.params), dtype="float64")
    layout = FlatLayout(small)
    random = torch.Generator().manual_seed(2)
    weights, gradient = torch.randn(2, layout.size, generator=random, dtype=torch.float64)
    # Recording must not draw from the training's generator.
    with torch.random.fork_rng(devices=[]):
        rule = rule_for(small, layout)
        state = rule.initial_state(Keyframe(0, {}), hyper, torch.float64, torch.device("cpu"))
        self_test(rule, weights, state, gradient, hyper)


def _shrunk(params: Sequence[ParamSpec]) -> tuple[ParamSpec, ...]:
    """The parameters with no dimension longer than a few, in double precision."""
    small = [replace(p, shape=tuple(min(n, _SMALL) for n in p.shape), dtype="float64") for p in params]
    offsets = accumulate((p.size for p in small), initial=0)
    return tuple(replace(p, offset=offset) for p, offset in zip(small, offsets, strict=False))


def _is_torchs(module: str) -> bool:
    return module == "torch.optim" or module.startswith("torch.optim.")


def _known() -> str:
    return ", ".join(sorted(RULES))
