"""What runs afterwards: from a recording to contributions, scores and reports.

The scores and reports know no torch, so names are imported on first use here too.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_PUBLIC = {
    "Contrasts": "trajrec.replay.losses.chosen",
    "Contributions": "trajrec.replay.methods.contributions",
    "Hypergradients": "trajrec.replay.methods.hypergradients",
    "Tokens": "trajrec.replay.losses.chosen",
    "Validation": "trajrec.replay.validation.validate",
    "contributions": "trajrec.replay.methods.contributions",
    "hypergradients": "trajrec.replay.methods.hypergradients",
    "validate": "trajrec.replay.validation.validate",
}

__all__ = [
    "Contrasts",
    "Contributions",
    "Hypergradients",
    "Tokens",
    "Validation",
    "contributions",
    "hypergradients",
    "validate",
]

if TYPE_CHECKING:
    from trajrec.replay.losses.chosen import Contrasts as Contrasts
    from trajrec.replay.losses.chosen import Tokens as Tokens
    from trajrec.replay.methods.contributions import Contributions as Contributions
    from trajrec.replay.methods.contributions import contributions as contributions
    from trajrec.replay.methods.hypergradients import Hypergradients as Hypergradients
    from trajrec.replay.methods.hypergradients import hypergradients as hypergradients
    from trajrec.replay.validation.validate import Validation as Validation
    from trajrec.replay.validation.validate import validate as validate


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'trajrec.replay' has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)
