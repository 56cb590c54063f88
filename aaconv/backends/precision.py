"""Computing in float32 where the inputs, or autocast, would make it half precision."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps

import torch
from torch import Tensor

Attend = Callable[..., Tensor]


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which products keep the dtype of their factors.

    It does nothing on device types that have no autocast.
    """
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def in_float32(attend: Attend) -> Attend:
    """``attend`` computed in at least float32, in which large logits do not overflow.

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
