"""Torch operations that launch the kernels of `aaconv.backends.fused_kernels`.

Importing this module imports triton.

Letters: B batch, N heads, H x W map, D and E channels per head of queries/keys and of values.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aaconv.backends import fused_kernels as kernels

LOG2E = math.log2(math.e)

# With TRITON_INTERPRET=1 the kernels run in Python, on any device.
INTERPRETED = not isinstance(kernels.attend, triton.JITFunction)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, row_bias: Tensor | None, col_bias: Tensor | None
) -> Tensor:
    """Attention with weights 2^(q k^T + row_bias + col_bias), normalised over the keys.

    q and k are (B, N, H, W, D), v is (B, N, H, W, E), row_bias (B, N, H, W, H) and col_bias
    (B, N, H, W, W), with any strides. q and both biases are scaled by LOG2E / sqrt(D) already.
    Returns (B, N, H, W, E).
    """
    if row_bias is None or col_bias is None:
        zero = q.new_zeros(())
        row_bias, col_bias = (zero.expand(*q.shape[:-1], size) for size in q.shape[2:4])
    return _attend(q, k, v, row_bias, col_bias)[0]


@torch.library.custom_op("aaconv::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, row_bias: Tensor, col_bias: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q, k, v, row_bias, col_bias)
    maps = (q, k, v, row_bias, col_bias, out)
    sizes = _sizes("attend", q, v)
    with torch.cuda.device_of(q):
        kernels.attend[_query_grid(q, sizes)](*maps, lse, *map(_strides, maps), q.shape[1], **sizes)
    return out, lse


@_attend.register_fake
def _empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, row_bias: Tensor, col_bias: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("aaconv::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_bias: Tensor,
    col_bias: Tensor,
    out: Tensor,
    lse: Tensor,
    relative: bool,
) -> list[Tensor]:
    """Gradients of q, k and v, and if ``relative`` of row_bias and col_bias."""
    dq, dk, dv, *dbias = gradients = _empty_gradients(
        grad, q, k, v, row_bias, col_bias, out, lse, relative
    )
    drow_bias, dcol_bias = dbias if relative else (row_bias, col_bias)
    delta = torch.empty_like(lse)
    given, N, W = (grad, q, k, v, row_bias, col_bias), q.shape[1], q.shape[3]
    sizes = _sizes("query_gradients", q, v)
    partial_sums = drow_bias[None]
    if sizes["BW"] < W:  # the map is wider than a tile
        count = triton.cdiv(W, sizes["BW"])
        partial_sums = drow_bias.new_empty(count, *drow_bias.shape, dtype=torch.float32)
    maps = (*given, out, dq, partial_sums[0], dcol_bias)
    with torch.cuda.device_of(q):
        kernels.query_gradients[_query_grid(q, sizes)](
            *given,
            out,
            lse,
            delta,
            dq,
            partial_sums,
            dcol_bias,
            *map(_strides, maps),
            partial_sums.stride(0),
            N,
            RELATIVE=relative,
            **sizes,
        )
        sizes = _sizes("key_gradients", q, v)
        kernels.key_gradients[_key_grid(q, sizes)](
            *given, lse, delta, dk, dv, *map(_strides, (*given, dk, dv)), N, **sizes
        )
    if relative and len(partial_sums) > 1:
        drow_bias.copy_(partial_sums.sum(0))
    return gradients


@_attend_backward.register_fake
def _empty_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_bias: Tensor,
    col_bias: Tensor,
    out: Tensor,
    lse: Tensor,
    relative: bool,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in ((q, k, v, row_bias, col_bias) if relative else (q, k, v))]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    relative = any(ctx.needs_input_grad[3:])
    gradients = _attend_backward(grad, *ctx.saved_tensors, relative)
    return (*gradients, *[None] * (5 - len(gradients)))


_attend.register_autograd(_differentiate, setup_context=_save)


def _strides(t: Tensor) -> tuple[object, ...]:
    """The strides, then the largest power of two up to 16 that divides all but the last of them.

    The compiler by itself looks only for factors of 16, but heads of 20 channels are 20 apart.
    """
    moved = (s for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    return (*t.stride(), tl.constexpr(math.gcd(16, *moved)))


def _query_grid(q: Tensor, sizes: dict[str, Any]) -> tuple[int]:
    B, N, H, W, _ = q.shape
    return (B * N * triton.cdiv(H * W, sizes["BM"]),)


def _key_grid(q: Tensor, sizes: dict[str, Any]) -> tuple[int]:
    B, N, H, W, _ = q.shape
    return (B * N * triton.cdiv(H, sizes["R"]) * triton.cdiv(W, sizes["BW"]),)


def _sizes(kernel: str, q: Tensor, v: Tensor) -> dict[str, Any]:
    """Sizes, tile sizes and launch options of a kernel."""
    H, W, D = q.shape[2:]
    E = v.shape[-1]
    BD, BE = (max(16, triton.next_power_of_2(n)) for n in (D, E))
    precision = _precision()
    queries, keys, warps, registers = _tile(kernel, q.dtype, precision, BD + BE, H * W)
    BW = min(triton.next_power_of_2(W), 64)
    # No more rows than the map has, but no fewer keys than tl.dot accepts.
    keys = max(16, min(keys, triton.next_power_of_2(H) * BW))
    return {
        "H": H,
        "W": W,
        "D": D,
        "E": E,
        "BD": BD,
        "BE": BE,
        "BM": queries,
        "R": max(1, keys // BW),
        "BW": BW,
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": 2,
        "maxnreg": registers,
    }


def _tile(
    kernel: str, dtype: torch.dtype, precision: str, channels: int, positions: int
) -> tuple[int, int, int, int | None]:
    """Queries and keys per tile, number of warps, and maximum registers per thread.

    Chosen from the compiler's output for compute capability 9.0, not from timings: no spilled
    registers, few instructions per logit, and 12 to 16 resident warps per multiprocessor, so that
    some run while others wait for a product.
    """
    if dtype == torch.float32:
        if channels > 128:
            return 32, 32, 4, None
        return 64, 64 if precision == "tf32" else 32, 4, None
    if positions <= 64:
        return 64, 64, 4, None
    if kernel == "attend":
        return 128, 64, 8, 128 if channels <= 128 else None
    if kernel == "query_gradients":
        return 64, 64, 4, 168 if channels <= 64 else None
    if channels > 128:
        return 32, 64, 4, None
    return 32, 128, 4, 168 if channels <= 48 else None


def _precision() -> str:
    """The precision of float32 products that the user has set for torch's matrix products."""
    matmul = torch.backends.cuda.matmul
    # Reading the older setting raises once the newer one (torch 2.9) has been used.
    newer = getattr(matmul, "fp32_precision", None)
    return "tf32" if (matmul.allow_tf32 if newer is None else newer == "tf32") else "ieee"
