"""Import torchvision.datasets, even if torchvision was built for another torch.

A CUDA build of torchvision next to a CPU build of torch cannot load its C++ operators, and its
import fails at the first operator it describes to torch. The data sets need none of them, so the
two missing schemas are declared here and the import is repeated.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

_MISSING_OPERATOR = "operator torchvision::nms does not exist"
# torch forgets a library's operators when the object is garbage-collected.
_declared: list[torch.library.Library] = []


def _forget_torchvision() -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "torchvision":
            del sys.modules[name]


def _declare_operators() -> None:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declared.append(library)


def import_datasets() -> ModuleType:
    """Return torchvision.datasets; import errors other than the known one are passed on."""
    try:
        return import_module("torchvision.datasets")
    except RuntimeError as error:
        if str(error) != _MISSING_OPERATOR:
            raise
    _forget_torchvision()
    _declare_operators()
    with warnings.catch_warnings():
        # The image codecs are C++ too, and the CIFAR files are not image files.
        warnings.filterwarnings("ignore", "Failed to load image Python extension")
        return import_module("torchvision.datasets")


datasets = import_datasets()


def import_transforms() -> Any:
    """Return torchvision.transforms with v2; the import takes a second, so only some runs do it."""
    import_module("torchvision.transforms.v2")
    return import_module("torchvision.transforms")
