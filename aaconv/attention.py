"""Two-dimensional relative self-attention (Bello et al., ICCV 2019, equations 2 to 5).

Every way to compute it is one function below and one name in BACKENDS; they agree on the
arguments and on the result.

Letters in the shape comments:
    B  batch                H, W  height and width of the map (g, u: those of the key)
    N  heads (Nh)           D, E  channels per head of queries and keys (dkh), of values (dvh)
"""

import importlib.util
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from aaconv.autocast import without_autocast
from aaconv.tiled import TiledAttention

BACKENDS = ("auto", "reference", "fold", "tiled", "fused", "flex")

_HAS_TRITON = importlib.util.find_spec("triton") is not None

# Folded into the queries, position terms are numbers of the queries' dtype. They are kept smaller
# by this factor, a power of two and so without rounding, until they are sums in float32: 65504, the
# largest number of fp16, then stands for logits of four million.
_HEADROOM = 64.0


def attention_2d(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None = None,
    rel_w: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention over all positions of a map, with learned relative positions.

    For every head, ``softmax((Q K^T + S_H + S_W) / sqrt(dkh)) V`` with
    ``S_H[i, j] = q_i . rel_h[jy - iy + H - 1]`` and ``S_W[i, j] = q_i . rel_w[jx - ix + W - 1]``
    (Bello et al. 2019, equations 3 to 5). Without tables it is plain attention (equation 1).

    Args:
        q: queries, not yet scaled, (B, Nh, H, W, dkh).
        k: keys, (B, Nh, H, W, dkh).
        v: values, (B, Nh, H, W, dvh).
        rel_h: row offsets -(H-1) .. H-1, (2H-1, dkh), shared by the heads.
        rel_w: column offsets -(W-1) .. W-1, (2W-1, dkh). Given together with ``rel_h`` or not
            at all.
        backend: the same values, computed differently.
            ``"reference"`` writes all logits out, (B, Nh, HW, HW), in at least float32.
            ``"tiled"`` does the same a few at a time and computes them anew for the gradients
            (which cannot be differentiated again).
            ``"fold"`` writes the position terms as extra channels of query and key and calls
            ``scaled_dot_product_attention``, which keeps no logits where it has a flash kernel.
            ``"fused"`` adds the position terms to the logits inside Triton kernels of our own,
            which keep none, on a GPU (nor can it be differentiated again).
            ``"flex"`` has them added by PyTorch's FlexAttention: compiled on a GPU; on the CPU
            without gradients and with all logits written out.
            ``"auto"`` is the fastest measured, see `choose_backend`.

    Returns:
        (B, Nh, H, W, dvh), in the dtype of ``v``.

    Raises:
        ValueError: a shape does not fit the others, there is no such backend, or it cannot
            compute this here, see `missing`.
    """
    _check_shapes(q, k, v, rel_h, rel_w)
    if backend == "auto":
        backend = choose_backend(q, relative=rel_h is not None)
    given = (q, k, v) if rel_h is None or rel_w is None else (q, k, v, rel_h, rel_w)
    needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    check_backend(backend, q.device, q.dtype, needs_grad=needs_grad)
    if backend == "fold":
        return _fold(q, k, v, rel_h, rel_w)
    if backend == "fused":
        return _fused(q, k, v, rel_h, rel_w)
    if backend == "flex":
        return _flex(q, k, v, rel_h, rel_w)
    return _in_single(_tiled if backend == "tiled" else _reference, q, k, v, rel_h, rel_w)


def check_backend(
    backend: str, device: torch.device, dtype: torch.dtype, *, needs_grad: bool
) -> None:
    """Raise ValueError, in one line, unless ``backend`` computes with such tensors here."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")
    lack = missing(backend, device, dtype, needs_grad=needs_grad)
    if lack is not None:
        raise ValueError(f"backend={backend!r} needs {lack}; use backend='auto'")


def missing(
    backend: str, device: torch.device, dtype: torch.dtype, *, needs_grad: bool
) -> str | None:
    """What ``backend`` needs and does not have, in words; None if it can be used.

    Args:
        backend: one of BACKENDS.
        device: of queries, keys and values.
        dtype: of the queries as attention gets them, under autocast that of autocast.
        needs_grad: whether gradients will be asked for.
    """
    if backend == "fused":
        return _missing_for_fused(device, dtype)
    if backend == "flex" and device.type == "cpu":
        return "a GPU for gradients (on the CPU FlexAttention has none)" if needs_grad else None
    if backend == "flex" and device.type != "cuda":
        return f"the CPU or a CUDA GPU, not the device {device}"
    if backend == "flex" and dtype == torch.float64:
        return "float32 or less, not float64, on a GPU"
    if backend == "flex" and not _HAS_TRITON:
        return "the package triton"
    return None


def _missing_for_fused(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "the package triton"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"float32, bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    from aaconv.fused import INTERPRETED

    if INTERPRETED:
        # It multiplies the bits of bfloat16 as if they were integers (triton 3.7 and 3.9).
        return "float32 or float16 in Triton's interpreter" if dtype == torch.bfloat16 else None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"a CUDA GPU, not the device {device}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"a GPU of compute capability 8.0, not {major}.{minor}"
    return None


def choose_backend(q: Tensor, *, relative: bool) -> str:
    """What ``"auto"`` stands for with queries such as these.

    On the CPU (two cores of an AMD EPYC, torch 2.13, forward and backward, batch 8): tiles take
    88 % of the fold's time at 16x16, 50 % at 32x32 and 40 % at 64x64; at 8x8 all three are within
    the noise, and the simplest is taken. On other devices the fold: neither it nor "fused" and
    "flex" were measured on a GPU yet. docs/benchmarks.md has the whole table.
    """
    # A compiler would unroll the loop over the tiles.
    if q.device.type != "cpu" or not relative or torch.compiler.is_compiling():
        return "fold"
    return "tiled" if q.shape[2] * q.shape[3] > 64 else "reference"


def _check_shapes(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
) -> None:
    if q.dim() != 5 or q.shape != k.shape or q.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            "q, k and v must be (B, Nh, H, W, channels per head) and agree in all but the last; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if (rel_h is None) != (rel_w is None):
        raise ValueError("rel_h and rel_w go together: give both or neither")
    height, width, dkh = q.shape[2:]
    for name, table, size in (("rel_h", rel_h, height), ("rel_w", rel_w, width)):
        if table is not None and table.shape != (2 * size - 1, dkh):
            raise ValueError(
                f"{name} must be {(2 * size - 1, dkh)} for a {height}x{width} map with "
                f"dkh={dkh}; got {tuple(table.shape)}"
            )


def _position_terms(q: Tensor, table: Tensor, axis: int) -> Tensor:
    """Each query times the row of ``table`` for its offset to every key row (or column).

    (B, N, H, W, D) and (2L-1, D) give (B, N, H, W, L), L being the size of ``axis`` (2 or 3).
    """
    length = q.shape[axis]
    place = torch.arange(length, device=q.device)
    by_offset = table.to(q.dtype)[place - place[:, None] + length - 1]  # (L query, L key, D)
    return torch.einsum("bnhwd,hgd->bnhwg" if axis == 2 else "bnhwd,wud->bnhwu", q, by_offset)


def _in_single(
    compute: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
) -> Tensor:
    """``compute`` in at least float32, in which large logits do not overflow."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    # Autocast would take the products of float32 tensors in half precision all the same.
    with without_autocast(q.device.type):
        out = compute(*(t if t is None else t.to(dtype) for t in (q, k, v, rel_h, rel_w)))
    return out.to(v.dtype)


def _reference(
    q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None
) -> Tensor:
    B, N, H, W, D = q.shape
    q = q * D**-0.5
    logits = torch.matmul(q.flatten(2, 3), k.flatten(2, 3).mT)  # (B, N, HW, HW)
    if rel_h is not None and rel_w is not None:
        rows = _position_terms(q, rel_h, axis=2)  # (B, N, H, W, g)
        columns = _position_terms(q, rel_w, axis=3)  # (B, N, H, W, u)
        logits = logits.view(B, N, H, W, H, W) + rows[..., None] + columns[..., None, :]
        logits = logits.flatten(4, 5).flatten(2, 3)
    weights = torch.softmax(logits, dim=-1)
    return torch.matmul(weights, v.flatten(2, 3)).unflatten(2, (H, W))


def _tiled(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    B, N, H, W, D = q.shape
    # (B, N, H, W, D) to (B N, D, HW): channels before positions.
    scaled = q * (D**-0.5 * math.log2(math.e))
    channels_first = [t.flatten(2, 3).mT.flatten(0, 1) for t in (scaled, k, v)]
    tables = None if rel_h is None or rel_w is None else torch.cat((rel_h, rel_w))
    out = TiledAttention.apply(*channels_first, tables, (H, W))
    return out.unflatten(0, (B, N)).mT.unflatten(2, (H, W))


def _fold(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    B, N, H, W, D = q.shape
    E = v.shape[-1]
    q = q * (D**-0.5 / _HEADROOM)
    if rel_h is not None and rel_w is not None:
        # [q, q.r_rows, q.r_columns] . [k, onehot(row), onehot(column)] is the whole logit.
        q = torch.cat((q, _position_terms(q, rel_h, 2), _position_terms(q, rel_w, 3)), dim=-1)
        row = torch.eye(H, dtype=k.dtype, device=k.device)[:, None, :].expand(B, N, H, W, H)
        column = torch.eye(W, dtype=k.dtype, device=k.device).expand(B, N, H, W, W)
        k = torch.cat((k, row, column), dim=-1)
    # The flash kernels want queries, keys and values of one width.
    width = max(q.shape[-1], E)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])).flatten(2, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=_HEADROOM)
    return out[..., :E].unflatten(2, (H, W))


def _fused(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    # Importing triton takes a while, and not every platform has it.
    from aaconv.fused import LOG2E, fused_attention

    # In fp16 position terms could overflow, and autocast would take them in it.
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    with without_autocast(q.device.type):
        rows, columns = _scaled_terms(q, rel_h, rel_w, LOG2E, dtype)
        return fused_attention(q * (q.shape[-1] ** -0.5 * LOG2E), k, v, rows, columns)


def _flex(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    from aaconv.flex import attend

    # The terms' gradients are sums that FlexAttention takes in the terms' dtype.
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device.type):
        return attend(q, k, v, *_scaled_terms(q, rel_h, rel_w, 1.0, dtype))


def _scaled_terms(
    q: Tensor, rel_h: Tensor | None, rel_w: Tensor | None, factor: float, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """What rows and columns of the keys add to softmax's logits, times ``factor``, or nothing."""
    if rel_h is None or rel_w is None:
        return None, None
    q = q.to(dtype) * (q.shape[-1] ** -0.5 * factor)
    return _position_terms(q, rel_h, 2), _position_terms(q, rel_w, 3)
