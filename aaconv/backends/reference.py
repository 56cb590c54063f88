"""Attention with all logits in memory, (B, Nh, HW, HW), in at least float32.

Letters: B batch, N heads, H x W map (g, u: the key's row and column), D channels per head.
"""

import torch
from torch import Tensor

from aaconv.backends.position_bias import position_bias
from aaconv.backends.precision import in_float32


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: always available; see `aaconv.backends.Backend`."""
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """Compute `aaconv.attention_2d` by its formula."""
    return attend_with_dropout(q, k, v, rel_h, rel_w, 0.0)


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rel_h: Tensor | None,
    rel_w: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute equations 3 to 5 of Bello et al. 2019 as written, each step in the dtype of ``q``."""
    B, N, H, W, D = q.shape
    q = q * D**-0.5
    logits = torch.matmul(q.flatten(2, 3), k.flatten(2, 3).mT)  # (B, N, HW, HW)
    if rel_h is not None and rel_w is not None:
        row_bias = position_bias(q, rel_h, axis=2)  # (B, N, H, W, g)
        col_bias = position_bias(q, rel_w, axis=3)  # (B, N, H, W, u)
        logits = logits.view(B, N, H, W, H, W) + row_bias[..., None] + col_bias[..., None, :]
        logits = logits.flatten(4, 5).flatten(2, 3)
    weights = torch.dropout(torch.softmax(logits, dim=-1), dropout, train=dropout > 0)
    return torch.matmul(weights, v.flatten(2, 3)).unflatten(2, (H, W))


attend_with_dropout = in_float32(formula)  # no other backend supports dropout
