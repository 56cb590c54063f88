"""Exact attention in tiles of the logits that stay in the processor's cache.

Letters: G heads of all images together, L = H * W positions, D and E channels per head of
queries/keys and of values. Channels come before positions throughout: the products of a tile with
a few channels are several times faster that way round.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aaconv.autocast import without_autocast

# Logits of one tile, in bytes: small enough for the cache beside its gradient, large enough that
# starting an operation costs little against it.
TILE_BYTES = 2**23


class TiledAttention(torch.autograd.Function):
    """softmax(q^T k + rows + columns) v^T without ever holding the (L, L) logits.

    q (G, D, L), already scaled; k (G, D, L); v (G, E, L); rows (G, L, H) and columns (G, L, W) are
    added to the logits of every key in that row and column. Returns (G, E, L). The backward pass
    computes each tile of the weights anew from their normalisers.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        out = torch.empty_like(v)
        normaliser = rows.new_empty(rows.shape[:2])
        buffer = rows.new_empty(_tile_size(rows))
        for heads, queries in _tiles(rows):
            here, over = (heads, queries), (heads, slice(None), queries)
            logits = _logits(q[over], k[heads], rows[here], columns[here], buffer)
            peak = logits.amax(dim=-1, keepdim=True)
            weights = logits.sub_(peak).exp_()
            total = weights.sum(dim=-1, keepdim=True)
            out[over] = torch.bmm(v[heads], weights.mT).div_(total.mT)
            normaliser[here] = total.log_().add_(peak).squeeze(-1)
        ctx.save_for_backward(q, k, v, rows, columns, out, normaliser)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        with without_autocast(grad.device.type):
            return _backward(grad, *ctx.saved_tensors)


def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    out: Tensor,
    normaliser: Tensor,
) -> tuple[Tensor, ...]:
    dq, drows, dcolumns = (torch.empty_like(t) for t in (q, rows, columns))
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    # With these in the products, no pass over a tile is needed to subtract them.
    rows = rows - normaliser[..., None]
    delta = (grad * out).sum(dim=1, keepdim=True)
    grad_and_delta = torch.cat((grad, -delta), dim=1)
    v_and_one = torch.cat((v, torch.ones_like(delta)), dim=1)
    buffer, second = rows.new_empty(2, _tile_size(rows)).unbind()
    for heads, queries in _tiles(rows):
        here, over = (heads, queries), (heads, slice(None), queries)
        weights = _logits(q[over], k[heads], rows[here], columns[here], buffer).exp_()
        dv[heads] += torch.bmm(grad[over], weights)
        dweights = second[: weights.numel()].view_as(weights)
        torch.bmm(grad_and_delta[over].mT, v_and_one[heads], out=dweights)
        dlogits = weights.mul_(dweights)
        dq[over] = torch.bmm(k[heads], dlogits.mT)
        dk[heads] += torch.bmm(q[over], dlogits)
        on_map = dlogits.unflatten(-1, (rows.shape[-1], columns.shape[-1]))
        drows[here] = on_map.sum(dim=-1)
        dcolumns[here] = on_map.sum(dim=-2)
    return dq, dk, dv, drows, dcolumns


def _split(rows: Tensor) -> tuple[int, int]:
    """How many heads and how many queries a tile has."""
    heads, positions, _ = rows.shape
    budget = max(1, TILE_BYTES // rows.element_size())
    if positions**2 <= budget:
        return min(heads, budget // positions**2), positions
    return 1, min(positions, max(1, budget // positions))


def _tile_size(rows: Tensor) -> int:
    heads, queries = _split(rows)
    return heads * queries * rows.shape[1]


def _tiles(rows: Tensor) -> list[tuple[slice, slice]]:
    """Slices of heads and of queries that cover all of them once."""
    heads, queries = _split(rows)
    return [
        (slice(h, h + heads), slice(i, i + queries))
        for h in range(0, rows.shape[0], heads)
        for i in range(0, rows.shape[1], queries)
    ]


def _logits(q: Tensor, k: Tensor, rows: Tensor, columns: Tensor, buffer: Tensor) -> Tensor:
    """The logits (heads, queries, L) of a tile, in ``buffer``."""
    heads, queries, H = rows.shape
    W = columns.shape[-1]
    logits = buffer[: heads * queries * H * W].view(heads, queries, H, W)
    torch.add(rows[..., :, None], columns[..., None, :], out=logits)
    logits = logits.flatten(2)
    return torch.baddbmm(logits, q.mT, k, out=logits)
