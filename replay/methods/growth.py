"""How the adjoint grew on its way to the beginning of the run."""

from __future__ import annotations

import numpy as np
import torch

from trajrec.replay.methods.adjoint import Adjoint
from trajrec.replay.session import Session

GROWTH_POINTS = 100


class Norms:
    """The largest norm of the adjoint over its targets, relative to the start, at 100 points of the way."""

    def __init__(self, adjoint: Adjoint, session: Session, growth: list[float], keep: bool) -> None:
        self._adjoint, self._growth, self._keep = adjoint, growth, keep
        steps = session.run.steps
        points = np.linspace(1, steps, min(steps, GROWTH_POINTS)).round().astype(int)
        self._points = frozenset(points.tolist())
        self._steps = steps
        self._start = adjoint.norms()

    def note(self) -> None:
        """Notes the norm if this is one of the points."""
        if not self._keep or self._steps - self._adjoint.first not in self._points:
            return
        ratio = self._adjoint.norms() / self._start.clamp_min(torch.finfo(self._start.dtype).tiny)
        self._growth.append(float(ratio.max()))
