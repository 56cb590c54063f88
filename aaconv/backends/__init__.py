"""The backends of `aaconv.attention_2d`, one module each, all with the functions of `Backend`.

To add a backend, write its module and add its name to NAMES; to drop one, do the reverse.
"""

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

NAMES = ("reference", "sdpa", "tiled", "native", "fused")


class Backend(Protocol):
    """What the module of a backend provides."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
    ) -> Tensor:
        """`aaconv.attention_2d` for arguments whose shapes have been checked."""

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why such tensors cannot be used here ("needs a GPU"), or None if they can.

        Args:
            device: of queries, keys and values.
            dtype: of the queries that `attend` gets, which under autocast is autocast's.
        """


MODULES = {name: cast(Backend, import_module(f"{__name__}.{name}")) for name in NAMES}
