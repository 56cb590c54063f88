"""Attention over a map by PyTorch's FlexAttention, to which position terms are a score_mod."""

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

# FlexAttention takes no fewer channels on a GPU.
_LEAST_CHANNELS = 16
_MOST_VARIANTS = 64


def attend(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """softmax(q k^T / sqrt(D) + rows + columns) v.

    q, k: (B, N, H, W, D); v: (B, N, H, W, E); rows (B, N, H, W, H) and columns (B, N, H, W, W)
    are added to the logits of every key in that row and column. Returns (B, N, H, W, E).
    """
    H, W, D = q.shape[2:]
    E = v.shape[-1]
    q, k, v = (
        F.pad(t, (0, max(0, _LEAST_CHANNELS - t.shape[-1]))).flatten(2, 3).contiguous()
        for t in (q, k, v)
    )
    score_mod = None
    if rows is not None and columns is not None:
        score_mod = _adding(rows.flatten(2, 3), columns.flatten(2, 3))
    call: Any = flex_attention if torch.compiler.is_compiling() else _compiled
    out = call(q, k, v, score_mod=score_mod, scale=D**-0.5)
    return out[..., :E].unflatten(2, (H, W))


def _adding(rows: Tensor, columns: Tensor) -> Any:
    """score_mod that adds a query's terms (B, N, queries, H) and (B, N, queries, W)."""
    width = columns.shape[-1]

    def add(score: Tensor, b: Tensor, n: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + rows[b, n, query, key // width] + columns[b, n, query, key % width]

    return add


def _compiled(q: Tensor, *args: Any, **options: Any) -> Any:
    """flex_attention, compiled.

    Each size of batch and map, number of heads and channels, dtype, and whether there are
    gradients, gets kernels of its own. A network of several stages would soon be over dynamo's
    limit, behind which flex_attention raises (were it not for fullgraph, it would write the
    logits out).
    """
    with torch._dynamo.config.patch(recompile_limit=_MOST_VARIANTS):
        return _compiler(q.device.type)(q, *args, **options)


@cache
def _compiler(device: str) -> Any:
    # On the CPU the steps one by one: its compiled kernel wants a C++ compiler.
    backend = "inductor" if device == "cuda" else "eager"
    # Not with sizes as variables: torch 2.13 makes code of that which does not compile on the CPU.
    return torch.compile(flex_attention, backend=backend, fullgraph=True, dynamic=False)
