"""Single precision that is single: TensorFloat-32 is switched off while a replay computes.

On recent GPUs torch lets convolutions (by default) and matrix products (on request) round their inputs to ten bits.
Second derivatives do not survive that, so a replay computes without it. A training that was recorded with it can then
be made again only to some 1e-3 of a step: its certificate is given that much room.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from trajrec.records import RunSpec

TF32_TOLERANCE = 2e-2


@contextmanager
def full_single_precision() -> Iterator[None]:
    """Inside, float32 means float32 on a GPU, too."""
    backends: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    try:
        for backend in backends:
            backend.allow_tf32 = False
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.allow_tf32 = value


def tolerance_of(spec: RunSpec) -> float:
    """The relative drift that the recording's own arithmetic explains: 0 but for TensorFloat-32."""
    return TF32_TOLERANCE if spec.data.get("tf32") else 0.0
