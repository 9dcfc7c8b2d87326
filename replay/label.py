"""What numbers are called wherever they are written: exact, or an approximation. Imports nothing heavy.

A certificate proves that the recorded training was replayed; it says nothing about what the formula left out. So a
label goes with every number: only the whole Hessian is exact, and every other curvature is an approximation.
"""

from __future__ import annotations

EXACT = "exact"
APPROXIMATION = "approximation, not checked against exact"
_NAMES = {"hessian": EXACT, "ggn": "Gauss-Newton", "kinks": "with smoothed kinks", "none": "Hessian-free"}


def label_of(curvature: str) -> str:
    """The label of numbers with this curvature."""
    return EXACT if curvature == "hessian" else APPROXIMATION


def name_of(curvature: str) -> str:
    """What a form is called in a word."""
    return _NAMES.get(curvature, curvature)
