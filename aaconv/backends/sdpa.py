"""Attention by PyTorch's scaled_dot_product_attention, position bias included.

Its flash kernels store no logits and accept no bias, so the position bias is part of the inner
product of query and key, as extra channels:
``[q, row_bias, col_bias] . [k, onehot(row), onehot(column)]`` is the complete logit. In half
precision, rounding the bias would make large logits wrong, so each term there has two channels, the
second for the rounding error of the first.

Letters: B batch, N heads, H x W map, D and E channels per head of queries/keys and of values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aaconv.backends.position_bias import position_bias
from aaconv.backends.precision import without_autocast

# The query's extra channels are divided by this factor and the key's ones multiplied by it. A power
# of two adds no rounding, and fp16's largest number, 65504, then means a logit of four million.
_HEADROOM = 64.0


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: always available; see `aaconv.backends.Backend`."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """Compute `aaconv.attention_2d` in one call of scaled_dot_product_attention."""
    H, W, D = q.shape[2:]
    E, given = v.shape[-1], v.dtype
    dtype = _autocast_dtype(q)
    with without_autocast(q.device.type):
        queries, keys, values = (t.to(dtype) for t in (q, k, v))
        if rel_h is not None and rel_w is not None:
            # The one-hot key channels are constants: no gradient flows through them.
            terms = [*_terms(q, rel_h, 2, dtype), *_terms(q, rel_w, 3, dtype)]
            queries = torch.cat((queries, *terms), dim=-1)
            row = torch.eye(H, dtype=dtype, device=k.device)[:, None, :].expand(*k.shape[:-1], H)
            column = torch.eye(W, dtype=dtype, device=k.device).expand(*k.shape[:-1], W)
            each = len(terms) // 2
            keys = torch.cat((keys, *[_HEADROOM * row] * each, *[_HEADROOM * column] * each), -1)
        # The flash kernels need queries, keys and values of equal width, which on a GPU must be a
        # multiple of 8 in half precision. Exported programs must work on maps of other sizes, so
        # nothing is padded there.
        if not (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            width = max(queries.shape[-1], E)
            width = width if dtype.itemsize > 2 else -(-width // 8) * 8
            queries, keys, values = (_widened(t, width) for t in (queries, keys, values))
        queries, keys, values = (t.flatten(2, 3) for t in (queries, keys, values))
        out = F.scaled_dot_product_attention(queries, keys, values, scale=D**-0.5)
    return out[..., :E].unflatten(2, (H, W)).to(given if dtype == q.dtype else dtype)


def _autocast_dtype(q: Tensor) -> torch.dtype:
    """Return the dtype in which scaled_dot_product_attention would compute."""
    kind = q.device.type
    if q.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return q.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else q.dtype


def _terms(q: Tensor, table: Tensor, axis: int, dtype: torch.dtype) -> list[Tensor]:
    """Return the position bias over _HEADROOM and, in half precision, its rounding error."""
    exact = torch.promote_types(dtype, torch.float32)
    bias = position_bias(q.to(exact), table, axis) / _HEADROOM
    rounded = bias.to(dtype)
    if dtype == exact:
        return [rounded]
    return [rounded, (bias - rounded).detach().to(dtype)]


def _widened(t: Tensor, width: int) -> Tensor:
    """Pad with zeros to ``width`` channels, contiguous in memory."""
    if t.shape[-1] < width:
        return F.pad(t, (0, width - t.shape[-1]))
    return t if t.stride(-1) == 1 else t.contiguous()
