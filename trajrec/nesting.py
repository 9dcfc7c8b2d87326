"""Whether a step of an optimizer was called by a step of the same optimizer, as by a class that calls `super().step()`.

torch wraps `step` of every class that was ever built, the parent's too, so that hooks may hear one step twice. The step
of the training is the outer one.
"""

from __future__ import annotations

import sys
from types import FrameType

from torch.optim import Optimizer
from torch.optim import optimizer as library


def is_within_step(optimizer: Optimizer) -> bool:
    """Whether more than one `step` of the optimizer is being run; looks at the stack, so for rare use."""
    running = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_code.co_filename == library.__file__:
            running += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return running > 1
