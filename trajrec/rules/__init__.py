"""Optimizer steps as pure functions (w_t, s_t) = U(w_{t-1}, s_{t-1}, g_t; h_t). Imports no capture, no run file.

They are made from the optimizers' own classes.
"""

from trajrec.rules.flat import FlatLayout
from trajrec.rules.registry import RULES, check_recordable, register_rule, rehearse, rule_for
from trajrec.rules.step import Rule
from trajrec.rules.users.own import OwnRule
from trajrec.rules.users.rounded import RoundedRule

__all__ = [
    "RULES",
    "FlatLayout",
    "OwnRule",
    "RoundedRule",
    "Rule",
    "check_recordable",
    "register_rule",
    "rehearse",
    "rule_for",
]
