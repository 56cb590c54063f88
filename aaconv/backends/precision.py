"""Compute in float32 where the inputs or autocast would lead to half precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor

Attend = Callable[..., Tensor]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Return a context in which matrix products keep the dtype of their inputs.

    It does nothing on device types without autocast.
    """
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def in_float32(attend: Attend) -> Attend:
    """Decorate ``attend`` to compute in at least float32, where large logits do not overflow.

    The result has the dtype of ``v``.
    """

    @wraps(attend)
    def wrapped(q: Tensor, k: Tensor, v: Tensor, *others: Tensor | float | None) -> Tensor:
        dtype = torch.promote_types(v.dtype, torch.float32)
        # Autocast would compute products of float32 tensors in half precision.
        with without_autocast(q.device.type):
            given = [t.to(dtype) if isinstance(t, Tensor) else t for t in (q, k, v, *others)]
            out = attend(*given)
        return out.to(v.dtype)

    return wrapped
