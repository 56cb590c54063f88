"""Attention by PyTorch's scaled_dot_product_attention, position bias included.

Its flash kernels keep no logits and take no bias of their own, so the position bias goes into the
inner product of query and key, as extra channels:
``[q, row_bias, col_bias] . [k, onehot(row), onehot(column)]`` is the whole logit.

Letters: B batch, N heads, H x W map, D and E channels per head of queries/keys and of values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from aaconv.backends.position_bias import position_bias

# The extra channels have the dtype of the queries. They are smaller by this factor, a power of two
# and so without rounding, until they are part of a logit in float32: 65504, the largest number of
# fp16, then stands for a logit of four million.
_HEADROOM = 64.0


def unavailable_reason(device: torch.device, dtype: torch.dtype, *, needs_grad: bool) -> str | None:
    """Always None; see `aaconv.backends.Backend`."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """`aaconv.attention_2d` in one call of scaled_dot_product_attention."""
    B, N, H, W, D = q.shape
    E = v.shape[-1]
    q = q * (D**-0.5 / _HEADROOM)
    if rel_h is not None and rel_w is not None:
        q = torch.cat((q, position_bias(q, rel_h, 2), position_bias(q, rel_w, 3)), dim=-1)
        row = torch.eye(H, dtype=k.dtype, device=k.device)[:, None, :].expand(B, N, H, W, H)
        column = torch.eye(W, dtype=k.dtype, device=k.device).expand(B, N, H, W, W)
        k = torch.cat((k, row, column), dim=-1)
    # The flash kernels need queries, keys and values of one width.
    width = max(q.shape[-1], E)
    q, k, v = (F.pad(t, (0, width - t.shape[-1])).flatten(2, 3) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, scale=_HEADROOM)
    return out[..., :E].unflatten(2, (H, W))
