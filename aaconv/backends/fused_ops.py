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
from triton.runtime.errors import OutOfResources

from aaconv.backends import fused_kernels as kernels
from aaconv.backends.operations import Table, define, empty_gradients, empty_outputs

LOG2E = math.log2(math.e)

# With TRITON_INTERPRET=1 the kernels run in Python, on any device.
INTERPRETED = not isinstance(kernels.attend, triton.JITFunction)

# The minimum number of columns of a product in tl.dot.
MIN_COLUMNS = 8 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 5) else 16

# Per multiprocessor, not necessarily all resident: enough to keep it busy for any resource usage.
PROGRAMS = 4


def _attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Table, rel_w: Table) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(_empty_like, q, v)
    sizes = _sizes("attend", q, v, relative=rel_h is not None)
    work = _tiles(q, sizes)
    programs = min(work, _programs(q.device))
    # (B, N, HW, channels); copies only maps with unusual strides.
    maps = [t.flatten(2, 3) for t in (q, k, v, out)]
    given = (*maps[:3], *_tables(q, rel_h, rel_w), _scratch(q, programs, sizes, 2), maps[3], lse)
    for all_keys in (False, True):
        sizes["ALL"] = all_keys
        _launch("attend", programs, sizes, *given, *map(_strides, maps), q.shape[1], work)
    return out, lse


def _attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Table,
    rel_w: Table,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    gradients = empty_gradients(_empty_like, q, k, v, rel_h, rel_w)
    relative = rel_h is not None
    sizes = _sizes("gradients", q, v, relative=relative)
    atomic = not torch.are_deterministic_algorithms_enabled()
    work = _tiles(q, sizes)
    items = work if atomic else q.shape[0] * q.shape[1]
    programs = min(items, _programs(q.device))
    dk, dv = (t.new_zeros(t.shape, dtype=torch.float32) for t in (k, v))
    offsets = sizes["HP"] + sizes["WP"] if relative else 0
    dtables = q.new_zeros(programs, offsets, sizes["BD"], dtype=torch.float32)
    maps = [t.flatten(2, 3) for t in (grad, q, k, v, out, gradients[0])]
    _launch(
        "gradients",
        programs,
        sizes | {"ATOMIC": atomic, "RP": max(MIN_COLUMNS, sizes["R"])},
        *maps[:4],
        *_tables(q, rel_h, rel_w),
        maps[4],
        lse,
        _scratch(q, programs, sizes, 3),
        maps[5],
        dk,
        dv,
        dtables,
        *map(_strides, maps),
        q.shape[1],
        work,
    )
    factor = q.shape[-1] ** -0.5
    torch.mul(dk, factor, out=gradients[1])
    gradients[2].copy_(dv)
    if relative:
        together = dtables.sum(0)[:, : q.shape[-1]]
        for gradient, first in zip(gradients[3:], (0, sizes["HP"]), strict=True):
            torch.mul(together[first : first + len(gradient)], factor, out=gradient)
    return gradients


def _launch(name: str, programs: int, sizes: dict[str, Any], q: Tensor, *others: object) -> None:
    """Launch a kernel; raise ValueError if the GPU lacks resources for this many channels."""
    try:
        with torch.cuda.device_of(q):
            getattr(kernels, name)[(programs,)](q, *others, **sizes)
    except OutOfResources as error:
        raise ValueError(
            f"backend='fused' with dkh={sizes['D']} and dvh={sizes['E']} needs {error.required} of "
            f"{error.name}, this GPU has {error.limit}; use backend='sdpa'"
        ) from error


def _empty_like(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Like torch.empty_like, but with equal distances between consecutive positions."""
    empty = torch.empty_like(t, dtype=dtype)
    if empty.stride(2) == empty.shape[3] * empty.stride(3):
        return empty
    return torch.empty_like(t, dtype=dtype, memory_format=torch.contiguous_format)


def _strides(t: Tensor) -> tuple[object, ...]:
    """Return the strides, and the largest power of two up to 16 that divides all but the last.

    The strides of positions and channels are compile-time constants, so distances between addresses
    in a tile are known. For the others, the compiler by itself only checks divisibility by 16, but
    heads of 20 channels are 20 apart.
    """
    moved = (s for s, size in zip(t.stride()[:-1], t.shape[:-1], strict=True) if size > 1)
    constants = (*t.stride()[2:], math.gcd(16, *moved))
    return (*t.stride()[:2], *map(tl.constexpr, constants))


def _tables(q: Tensor, rel_h: Table, rel_w: Table) -> tuple[Tensor, Tensor]:
    if rel_h is None or rel_w is None:
        return q, q  # never read
    return rel_h.contiguous(), rel_w.contiguous()


def _scratch(q: Tensor, programs: int, sizes: dict[str, Any], halves: int) -> Tensor:
    """Allocate scratch for ``programs``; a half is one number per query and key row or column."""
    per_query = (sizes["HP"] + sizes["WP"]) // 2 * halves if sizes["RELATIVE"] else 0
    return q.new_empty(programs * sizes["BM"] * per_query, dtype=torch.float32)


def _programs(device: torch.device) -> int:
    """Return how many programs share the tiles of queries. Scratch memory grows with it."""
    if device.type != "cuda":
        return 2  # interpreted
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def _tiles(q: Tensor, sizes: dict[str, Any]) -> int:
    B, N, H, W, _ = q.shape
    return B * N * triton.cdiv(H * W, sizes["BM"])


def _sizes(kernel: str, q: Tensor, v: Tensor, *, relative: bool) -> dict[str, Any]:
    """Return sizes, tile sizes and launch options of a kernel."""
    H, W, D = q.shape[2:]
    E = v.shape[-1]
    BD = _padded(D)
    BE = _padded(E + 2)  # two more: ones in the values, and their factors in the backward pass
    precision = _precision()
    queries, keys, warps, registers = _tile(kernel, q.dtype, precision, BD + BE, H * W)
    BW = min(triton.next_power_of_2(W), 32)
    # No more rows than the map has, but no fewer keys than tl.dot accepts.
    keys = max(16, min(keys, triton.next_power_of_2(H) * BW))
    return {
        "RELATIVE": relative,
        "SCALE": LOG2E * D**-0.5,
        "H": H,
        "W": W,
        "D": D,
        "E": E,
        "BD": BD,
        "BE": BE,
        "BM": queries,
        "R": max(1, keys // BW),
        "BW": BW,
        "HP": _padded(2 * H - 1),
        "WP": _padded(2 * W - 1),
        "PRECISION": precision,
        "num_warps": warps,
        "num_stages": 2,
        "maxnreg": registers,
    }


def _padded(size: int) -> int:
    """Round ``size`` up to a power of two that tl.dot accepts."""
    return max(16, triton.next_power_of_2(size))


def _tile(
    kernel: str, dtype: torch.dtype, precision: str, channels: int, positions: int
) -> tuple[int, int, int, int | None]:
    """Return queries and keys per tile, number of warps, and maximum registers per thread.

    Chosen from compiler output for compute capability 9.0, not from timings: no register spills,
    few instructions per logit, and as many resident warps as that allows, so that some run while
    others wait for a product.
    """
    forward = kernel == "attend"
    if dtype == torch.float32:
        if channels > 128:
            return 32, 32 if forward else 16, 4, None
        if precision == "tf32":
            return 64, 64, 4, None
        return 64 if forward else 32, 32, 4, None
    if forward:
        if positions <= 64 or channels > 192:
            return 64, 64 if channels <= 192 else 32, 4, None
        return 128, 64, 8, 128 if channels <= 64 else None
    if channels > 192:
        return 32, 32, 4, None
    return 64, 64 if channels <= 64 else 32, 4, None


def _precision() -> str:
    """Return the precision that the user has set for torch's float32 matrix products."""
    matmul = torch.backends.cuda.matmul
    # Reading the older setting raises once the newer one (torch 2.9) has been used.
    newer = getattr(matmul, "fp32_precision", None)
    return "tf32" if (matmul.allow_tf32 if newer is None else newer == "tf32") else "ieee"


define("fused", ("CPU", "CUDA"), _attend, _attend_backward, _empty_like)
