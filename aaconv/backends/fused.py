"""Attention in this project's Triton kernels, which add the position bias and store no logits.

The kernels are in `fused_kernels`, the torch operations that launch them in `fused_ops`. Both
import triton, which is slow and not available on every platform, so this module imports them only
when they are used.
"""

import importlib.util

import torch
from torch import Tensor

from aaconv.backends.precision import without_autocast

HAS_TRITON = importlib.util.find_spec("triton") is not None


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernels cannot be used, or None; see `aaconv.backends.Backend`."""
    if not HAS_TRITON:
        return "needs the package triton"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"needs float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    from aaconv.backends.fused_ops import INTERPRETED

    if INTERPRETED:
        # The interpreter multiplies bfloat16 bits as if they were integers (triton 3.7 and 3.9).
        if dtype == torch.bfloat16:
            return "needs float32 or float16 in Triton's interpreter"
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"needs a CUDA GPU, not the device {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"needs a GPU of compute capability 8.0 or higher, not {major}.{minor}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """Compute `aaconv.attention_2d` in one kernel, which cannot be differentiated twice."""
    import aaconv.backends.fused_ops  # noqa: F401 (defines the operation)

    with without_autocast(q.device.type):
        # The kernels multiply the tables with the queries, which needs equal dtypes.
        tables = (table if table is None else table.to(q.dtype) for table in (rel_h, rel_w))
        out, _ = torch.ops.aaconv.fused_attend(q, k, v, *tables)
        return out.to(v.dtype)
