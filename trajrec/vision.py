"""Makes torchvision importable beside a torch build without CUDA.

torchvision's package is linked to CUDA; beside a CPU build of torch its compiled operators do not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". Transforms, models, data sets and
make_grid need none of these operators. With their schemas defined, the import works.

    from trajrec.vision import import_torchvision
    torchvision = import_torchvision()
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None


def import_torchvision() -> ModuleType:
    """The module torchvision, imported with the cure above only where it is needed.

    Raises:
        ImportError: if torchvision is not installed.
    """
    try:
        return import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
    _define_schemas()
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    return import_module("torchvision")


def _define_schemas() -> None:
    global _library
    # The definitions live as long as the library object does.
    _library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in _SCHEMAS:
        _library.define(schema)  # type: ignore[no-untyped-call]
