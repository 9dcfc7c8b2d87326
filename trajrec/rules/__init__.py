"""Optimizer steps as pure functions (w_t, s_t) = U(w_{t-1}, s_{t-1}, g_t; h_t), made from torch.optim's classes."""

from __future__ import annotations

from torch.optim import LBFGS, Optimizer, SparseAdam

from trajrec.errors import UnsupportedOptimizerError
from trajrec.records import RunSpec
from trajrec.rules.adafactor import AdafactorRule
from trajrec.rules.adaptive import KEPT, AdaptiveRule
from trajrec.rules.flat import FlatLayout
from trajrec.rules.muon import MuonRule
from trajrec.rules.sgd import SGDRule
from trajrec.rules.step import Rule

__all__ = ["FlatLayout", "Rule", "check_recordable", "rule_for"]

RULES: dict[str, type[Rule]] = {
    "SGD": SGDRule,
    **dict.fromkeys(KEPT, AdaptiveRule),
    "Adafactor": AdafactorRule,
    "Muon": MuonRule,
}


def check_recordable(optimizer: Optimizer) -> None:
    """Checks that a run of this optimizer could be replayed.

    Raises:
        UnsupportedOptimizerError: if no rule can differentiate its steps.
    """
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS | SparseAdam):
        raise UnsupportedOptimizerError(
            f"{name} cannot be recorded: LBFGS takes several gradients a step, SparseAdam sparse ones. Train with an "
            "optimizer that takes one dense gradient a step."
        )
    if name not in RULES or not type(optimizer).__module__.startswith("torch.optim"):
        raise UnsupportedOptimizerError(_no_rule(name))


def rule_for(spec: RunSpec, layout: FlatLayout) -> Rule:
    """The rule that steps like the run's optimizer.

    Raises:
        UnsupportedOptimizerError: if there is none.
    """
    if spec.optimizer not in RULES:
        raise UnsupportedOptimizerError(_no_rule(spec.optimizer))
    return RULES[spec.optimizer](spec, layout)


def _no_rule(name: str) -> str:
    return f"There is no rule for the optimizer {name}; trajrec can differentiate steps of: {', '.join(RULES)}."
