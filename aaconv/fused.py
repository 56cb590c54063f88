"""Exact attention over a map in Triton kernels that never store a logit."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from aaconv import kernels

LOG2E = math.log2(math.e)

# Under TRITON_INTERPRET=1 the kernels run in Python, on any device.
INTERPRETED = not isinstance(kernels.attend, triton.JITFunction)


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """2^(q k^T + rows + columns), normalised, times v: softmax with logits in powers of two.

    q, k: (B, N, H, W, D); v: (B, N, H, W, E); rows (B, N, H, W, H) and columns (B, N, H, W, W)
    are added to the logits of every key in that row and column. q, rows and columns carry the
    softmax's scale and the factor LOG2E. Any strides; returns (B, N, H, W, E).
    """
    if rows is None or columns is None:
        nothing = q.new_zeros(())
        rows, columns = (nothing.expand(*q.shape[:-1], size) for size in q.shape[2:4])
    return _attend(q, k, v, rows, columns)[0]


@torch.library.custom_op("aaconv::attend", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    out, lse = _empty_outputs(q, k, v, rows, columns)
    maps = (q, k, v, rows, columns, out)
    sizes = _sizes("attend", q, v)
    with torch.cuda.device_of(q):
        kernels.attend[_query_grid(q, sizes)](*maps, lse, *map(_strides, maps), q.shape[1], **sizes)
    return out, lse


@_attend.register_fake
def _empty_outputs(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("aaconv::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    lse: Tensor,
    relative: bool,
) -> list[Tensor]:
    """Gradients of q, k and v, and of rows and columns if ``relative``."""
    dq, dk, dv, *dterms = gradients = _empty_gradients(
        grad, q, k, v, rows, columns, out, lse, relative
    )
    drows, dcolumns = dterms if relative else (rows, columns)
    delta = torch.empty_like(lse)
    given, N, W = (grad, q, k, v, rows, columns), q.shape[1], q.shape[3]
    sizes = _sizes("query_gradients", q, v)
    parts = drows[None]
    if sizes["BW"] < W:  # a map wider than a tile
        parts = drows.new_empty(triton.cdiv(W, sizes["BW"]), *drows.shape, dtype=torch.float32)
    maps = (*given, out, dq, parts[0], dcolumns)
    with torch.cuda.device_of(q):
        kernels.query_gradients[_query_grid(q, sizes)](
            *given,
            out,
            lse,
            delta,
            dq,
            parts,
            dcolumns,
            *map(_strides, maps),
            parts.stride(0),
            N,
            RELATIVE=relative,
            **sizes,
        )
        sizes = _sizes("key_gradients", q, v)
        kernels.key_gradients[_key_grid(q, sizes)](
            *given, lse, delta, dk, dv, *map(_strides, (*given, dk, dv)), N, **sizes
        )
    if relative and len(parts) > 1:
        drows.copy_(parts.sum(0))
    return gradients


@_attend_backward.register_fake
def _empty_gradients(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    lse: Tensor,
    relative: bool,
) -> list[Tensor]:
    return [torch.empty_like(t) for t in ((q, k, v, rows, columns) if relative else (q, k, v))]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs, *output)


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    relative = any(ctx.needs_input_grad[3:])
    gradients = _attend_backward(grad, *ctx.saved_tensors, relative)
    return (*gradients, *[None] * (5 - len(gradients)))


_attend.register_autograd(_differentiate, setup_context=_save)


def _strides(t: Tensor) -> tuple[object, ...]:
    """Strides, and behind them a power of two up to 16 that divides all but the channels'.

    The compiler looks for factors of 16 alone; heads of 20 channels lie 20 apart.
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
    """Shapes, tile sizes and launch options of a kernel."""
    H, W, D = q.shape[2:]
    E = v.shape[-1]
    BD, BE = (max(16, triton.next_power_of_2(n)) for n in (D, E))
    precision = _precision()
    queries, keys, warps, registers = _tile(kernel, q.dtype, precision, BD + BE, H * W)
    BW = min(triton.next_power_of_2(W), 64)
    # No more rows than the map has, and no fewer keys than the product of two tiles takes.
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
    """Queries and keys of a tile, warps, and the most registers of a thread.

    Chosen by what the compiler makes of them for compute capability 9.0, not by timing: no
    spilled registers, few instructions for each logit, and 12 to 16 warps at a time on a
    multiprocessor, whose other warps go on while one waits for a product.
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
    """How products of float32 are taken, as the user has set it for matrix products."""
    matmul = torch.backends.cuda.matmul
    # Asking for the older of the two names raises once the newer (torch 2.9) was used.
    newer = getattr(matmul, "fp32_precision", None)
    return "tf32" if (matmul.allow_tf32 if newer is None else newer == "tf32") else "ieee"
