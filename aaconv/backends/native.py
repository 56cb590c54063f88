"""Attention on the CPU in one compiled kernel, forward and backward; see native.cpp.

It holds one tile of logits per thread, computes in float32, and its results do not depend on the
number of threads, bit for bit.

Letters: B batch, N heads, H x W map, D and E channels per head of queries/keys and of values.
"""

import ctypes

import torch
from torch import Tensor

from aaconv.backends import native_build
from aaconv.backends.operations import Table, define, empty_outputs
from aaconv.backends.precision import without_autocast

# In the order of the type numbers in native.cpp.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why the kernel cannot be used, or None; see `aaconv.backends.Backend`.

    Compiles the kernel if that has not been done yet.
    """
    if device.type != "cpu":
        return f"needs the CPU, not the device {device}"
    if dtype not in DTYPES:
        return f"needs float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    found = native_build.load()
    return str(found) if isinstance(found, native_build.UnavailableError) else None


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """Compute `aaconv.attention_2d` in one kernel, which cannot be differentiated twice."""
    maps = (t if t.dtype in DTYPES else t.float() for t in (q, k, v))
    with without_autocast(q.device.type):
        out, _ = torch.ops.aaconv.native_attend(*maps, rel_h, rel_w)
        return out.to(v.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Table, rel_w: Table) -> tuple[Tensor, Tensor]:
    out, lse = empty_outputs(_empty_like, q, v)
    _call("aaconv_attend", (q, k, v), (rel_h, rel_w), (out, lse))
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
) -> tuple[Tensor, ...]:
    # Restore the memory layout from `_attend`, which a compiler may have changed.
    out, lse = out.permute(0, 1, 4, 2, 3).contiguous(), lse.contiguous()
    maps = [_empty_like(t) for t in (q, k, v)]
    heads, channels = q.shape[0] * q.shape[1], q.shape[-1]
    # One table gradient per head, so that their sum does not depend on the number of threads.
    tables = [
        q.new_empty(heads, channels, 0 if table is None else len(table), dtype=torch.float32)
        for table in (rel_h, rel_w)
    ]
    _call("aaconv_attend_backward", (q, k, v, grad), (rel_h, rel_w), (out, lse, *maps, *tables))
    return (*maps, *(table.sum(0).T.contiguous() for table in tables))


def _empty_like(t: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate (B, N, H, W, channels), with channels before positions in memory."""
    B, N, H, W, channels = t.shape
    return t.new_empty(B, N, channels, H, W, dtype=dtype).permute(0, 1, 3, 4, 2)


def _call(
    function: str, maps: tuple[Tensor, ...], tables: tuple[Table, ...], rest: tuple[Tensor, ...]
) -> None:
    library = native_build.load()
    if isinstance(library, native_build.UnavailableError):
        raise RuntimeError(f"backend='native' {library}")
    q, _, v = maps[:3]
    numbers = [*q.shape, v.shape[-1], torch.get_num_threads()]
    for t in maps:
        numbers += [DTYPES.index(t.dtype), *t.stride()]
    # The kernel reads float32 tables, whatever the dtype of the parameters.
    exact = [None if t is None else t.to(torch.float32).contiguous() for t in tables]
    given = [*maps, *[None] * (4 - len(maps)), *exact, *rest]
    addresses = [None if t is None else t.data_ptr() for t in given]
    getattr(library, function)(
        (ctypes.c_void_p * len(addresses))(*addresses), (ctypes.c_long * len(numbers))(*numbers)
    )


define("native", ("CPU",), _attend, _attend_backward, _empty_like)
