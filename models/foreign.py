"""Weights of torchvision's and timm's ResNets, whose blocks are ours under other names."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from models.fields import UnreadableError
from models.weight_files import COUNTER, FLOATS, tensor_fault

# A tensor that each of these networks has, and none of ours.
KNOWN_BY = "layer1.0.conv1.weight"
# Applied one after the other.
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
    """Weights of a ResNet of torchvision's or timm's, all of them finite.

    Attributes:
        tensors: by the names that `models.ResNet` has for them; others have their own.
        file: where they are from.
    """

    tensors: dict[str, Tensor]
    file: Path


def find_foreign(state: Any, file: Path) -> ForeignWeights | None:
    """The weights of such a ResNet in what ``file`` holds; None where there are none.

    They are the value itself, or one inside it such as ``state_dict``, and may have a common prefix
    such as ``module.``.

    Raises:
        UnreadableError: they are damaged; one line that names the tensor.
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
    """What `models.ResNet` calls the tensor of this name; what it has none for stays as it is."""
    for pattern, ours in RENAMED:
        name = re.sub(pattern, ours, name)
    return name
