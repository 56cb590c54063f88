"""The backends of `aaconv.attention_2d`: one module each, with the functions of `Backend`.

To add a backend, write its module and add its name to NAMES; to remove one, do the reverse.
"""

from importlib import import_module
from typing import Protocol, cast

import torch
from torch import Tensor

NAMES = ("reference", "sdpa", "tiled", "native", "fused")


class Backend(Protocol):
    """The functions that each backend module provides."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
    ) -> Tensor:
        """Compute `aaconv.attention_2d` for arguments whose shapes have been checked."""

    def unavailable_reason(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Return why the backend cannot be used for such tensors ("needs a GPU"), or None.

        Args:
            device: device of queries, keys and values.
            dtype: dtype of the queries passed to `attend`; under autocast, autocast's dtype.
        """


MODULES = {name: cast(Backend, import_module(f"{__name__}.{name}")) for name in NAMES}
