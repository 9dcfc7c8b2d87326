"""Gradient checkpointing is switched off while a replay computes: the same values, more memory.

A checkpointed piece of a model runs again in the backward pass, when the recorded weights have been taken out of the
module; and it cannot be differentiated twice. The function is replaced where the model's own modules know it.

cuDNN's recurrent layers have no second derivative either; torch's own have.

Single precision is single (`trajrec.tf32`): second derivatives do not survive products that are rounded to ten bits, so
a replay computes without. A training that was recorded with it can then be made again only to some 1e-3 of a step: its
certificate is given that much room.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch.utils.checkpoint
from torch import nn

from trajrec.records import RunSpec

TF32_TOLERANCE = 2e-2
_OPTIONS = ("use_reentrant", "context_fn", "determinism_check", "debug", "preserve_rng_state", "early_stop")


def _plainly(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Calls a function at once, in place of `torch.utils.checkpoint.checkpoint`."""
    return function(*args, **{name: value for name, value in options.items() if name not in _OPTIONS})


class PlainCheckpoints:
    """Knows the places where a model's code finds torch's checkpoint function."""

    def __init__(self, model: nn.Module) -> None:
        modules = {sys.modules.get(type(module).__module__) for module in model.modules()}
        self._original = torch.utils.checkpoint.checkpoint
        self._places: list[tuple[ModuleType, str]] = [(torch.utils.checkpoint, "checkpoint")]
        for module in modules - {None, torch.utils.checkpoint}:
            assert module is not None
            self._places += [(module, name) for name, value in vars(module).items() if value is self._original]

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, checkpointed functions are simply called."""
        for module, name in self._places:
            setattr(module, name, _plainly)
        try:
            yield
        finally:
            for module, name in self._places:
                setattr(module, name, self._original)


class PlainRecurrence:
    """Knows whether a model has recurrent layers that cuDNN would compute."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._is_needed = device.type == "cuda" and any(isinstance(module, nn.RNNBase) for module in model.modules())

    @contextmanager
    def active(self) -> Iterator[None]:
        """Inside, such a model computes without cuDNN."""
        if not self._is_needed:
            yield
            return
        cudnn: Any = torch.backends.cudnn
        before = cudnn.enabled
        cudnn.enabled = False
        try:
            yield
        finally:
            cudnn.enabled = before


def tolerance_of(spec: RunSpec) -> float:
    """The relative drift that the recording's own arithmetic explains: 0 but for TensorFloat-32."""
    return TF32_TOLERANCE if spec.data.get("tf32") else 0.0
