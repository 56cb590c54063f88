"""Weights of torchvision and timm ResNets, which have the same blocks under different names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.fields import UnreadableError
from models.weight_files import COUNTER, FLOATS, tensor_fault

# The name of a tensor that all of these networks have, but none of this project's.
KNOWN_BY = "layer1.0.conv1.weight"
# Applied in this order.
RENAMED: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"^conv1\.", "conv."),
    (r"^bn1\.", "bn_in."),
    (r"^fc\.", "head."),
    (r"^layer(\d+)\.", lambda match: f"stages.{int(match[1]) - 1}."),
    (r"\.downsample\.0\.weight$", ".shortcut.0.conv.weight"),
    (r"\.downsample\.", ".shortcut."),
)


@dataclass(frozen=True)
class ForeignWeights:
    """Weights of a torchvision or timm ResNet, all finite.

    Attributes:
        tensors: keyed by their names in `models.ResNet`; other tensors keep their own names.
        file: the file they come from.
    """

    tensors: dict[str, Tensor]
    file: Path


def find_foreign(state: Any, file: Path) -> ForeignWeights | None:
    """Return the weights of a torchvision or timm ResNet in ``state``, read from ``file``, or None.

    They may be ``state`` itself or one of its values, such as ``state_dict``, and their names may
    have a common prefix such as ``module.``.

    Raises:
        UnreadableError: if they are damaged; one line that names the tensor.
    """
    inside = [state, *state.values()] if isinstance(state, dict) else []
    for tensors in (value for value in inside if isinstance(value, dict)):
        names = [name for name in tensors if isinstance(name, str)]
        known = next((name for name in names if f".{name}".endswith(f".{KNOWN_BY}")), None)
        if known is None:
            continue
        prefix = known.removesuffix(KNOWN_BY)
        for name in names:
            value = tensors[name]
            fault = tensor_fault(name, value)
            if fault is None and value.dtype not in FLOATS and not name.endswith(COUNTER):
                fault = f"is {value.dtype}, not of floating-point numbers"
            if fault is not None:
                raise UnreadableError(f"{file}: {name} {fault}")
        return ForeignWeights({our_name(n.removeprefix(prefix)): tensors[n] for n in names}, file)
    return None


def our_name(name: str) -> str:
    """Return the name of a tensor in `models.ResNet`; unknown names stay unchanged."""
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name
