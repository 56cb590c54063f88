"""Attention by PyTorch's FlexAttention, which adds the position bias as a score_mod.

On a GPU it compiles a kernel that keeps no logits. On the CPU it runs uncompiled, holds all logits
and has no gradients.

Letters: B batch, N heads, H x W map, D and E channels per head of queries/keys and of values.
"""

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from aaconv.backends.position_bias import scaled_position_bias
from aaconv.backends.precision import without_autocast

HAS_TRITON = importlib.util.find_spec("triton") is not None

# The fewest channels per head that FlexAttention's GPU kernels accept.
_MIN_CHANNELS = 16
_MAX_COMPILATIONS = 64


def unavailable_reason(device: torch.device, dtype: torch.dtype, *, needs_grad: bool) -> str | None:
    """Why FlexAttention cannot be used, or None; see `aaconv.backends.Backend`."""
    if device.type == "cpu":
        if needs_grad:
            return "needs a GPU for gradients (on the CPU FlexAttention has none)"
        return None
    if device.type != "cuda":
        return f"needs the CPU or a CUDA GPU, not the device {device}"
    if dtype == torch.float64:
        return "needs float32 or less, not float64, on a GPU"
    if not HAS_TRITON:
        return "needs the package triton"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """`aaconv.attention_2d` in one call of flex_attention."""
    # FlexAttention sums the gradients of the bias in the dtype of the bias.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device.type):
        row_bias, col_bias = scaled_position_bias(q, rel_h, rel_w, 1.0, dtype)
        return _attend_with_bias(q, k, v, row_bias, col_bias)


def _attend_with_bias(
    q: Tensor, k: Tensor, v: Tensor, row_bias: Tensor | None, col_bias: Tensor | None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + row_bias + col_bias) v, (B, N, H, W, E)."""
    H, W, D = q.shape[2:]
    E = v.shape[-1]
    q, k, v = (
        F.pad(t, (0, max(0, _MIN_CHANNELS - t.shape[-1]))).flatten(2, 3).contiguous()
        for t in (q, k, v)
    )
    score_mod = None
    if row_bias is not None and col_bias is not None:
        score_mod = _score_mod(row_bias.flatten(2, 3), col_bias.flatten(2, 3))
    call: Any = flex_attention if torch.compiler.is_compiling() else _compiled
    out = call(q, k, v, score_mod=score_mod, scale=D**-0.5)
    return out[..., :E].unflatten(2, (H, W))


def _score_mod(row_bias: Tensor, col_bias: Tensor) -> Any:
    """A score_mod that adds row_bias (B, N, HW, H) and col_bias (B, N, HW, W) to the logits."""
    W = col_bias.shape[-1]

    def add(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + row_bias[b, n, query, key // W] + col_bias[b, n, query, key % W]

    return add


def _compiled(q: Tensor, *args: Any, **options: Any) -> Any:
    """flex_attention, compiled.

    Each combination of batch, map, heads, channels and dtype, with and without gradients, is
    compiled separately. A network of several stages soon exceeds dynamo's default limit, and then
    flex_attention raises (without fullgraph it would hold all logits instead).
    """
    with torch._dynamo.config.patch(recompile_limit=_MAX_COMPILATIONS):
        return _compiler(q.device.type)(q, *args, **options)


@cache
def _compiler(device_type: str) -> Any:
    # On the CPU operation by operation: its compiled kernel needs a C++ compiler.
    backend = "inductor" if device_type == "cuda" else "eager"
    # No dynamic sizes: torch 2.13 makes code for them that does not compile on the CPU.
    return torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=False)
