"""Exact attention in tiles of the logits that stay in the processor's cache.

Letters: G heads of all images together, L = H * W positions, D and E channels per head of
queries/keys and of values. Channels come before positions throughout: the products of a tile with
a few channels are several times faster that way round. Powers are of two because exp2 takes half
the time of exp.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aaconv.autocast import without_autocast

# Logits of one tile, in bytes: small enough for the cache beside its gradient, large enough that
# starting an operation costs little against it.
TILE_BYTES = 2**23


class Tile(NamedTuple):
    """Some heads, and for each of them some queries, that are computed at once."""

    heads: slice
    queries: slice

    def of(self, t: Tensor) -> Tensor:
        """The tile's part of a tensor (G, channels, L)."""
        return t[self.heads, :, self.queries]


class Positions(NamedTuple):
    """The map's size (H, W), and what positions add to a query's logits.

    tables (2H-1 + 2W-1, D), that of the rows before that of the columns, or None; table_row
    (L, H + W), the row of them for each query and every key row, then every key column.
    """

    size: tuple[int, int]
    tables: Tensor | None
    table_row: Tensor

    @classmethod
    def of(cls, size: tuple[int, int], tables: Tensor | None, device: torch.device) -> "Positions":
        H, W = size
        query = torch.arange(H * W, device=device)[:, None]
        by_row = torch.arange(H, device=device) - query // W + H - 1
        by_column = torch.arange(W, device=device) - query % W + W - 1 + 2 * H - 1
        return cls(size, tables, torch.cat((by_row, by_column), dim=1))


class TiledAttention(torch.autograd.Function):
    """Attention in powers of two, 2^(q^T (k + positions)), without ever holding the (L, L) logits.

    q (G, D, L), scaled by what softmax's logits want and by log2(e); k (G, D, L); v (G, E, L);
    tables and size as in `Positions`. Returns (G, E, L). The backward pass computes each tile of
    the weights anew from their normalisers; what is kept for it, and what it needs, grows like L.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        out = torch.empty_like(v)
        normaliser = q.new_empty(q.shape[0], 1, q.shape[2])
        positions = Positions.of(size, tables, q.device)
        buffer = q.new_empty(_tile_size(q))
        for tile in _tiles(q):
            logits = _logits(tile, q, k, positions, buffer)
            peak = logits.amax(dim=-1, keepdim=True)
            weights = logits.sub_(peak).exp2_()
            total = weights.sum(dim=-1, keepdim=True)
            tile.of(out).copy_(torch.bmm(v[tile.heads], weights.mT)).div_(total.mT)
            tile.of(normaliser).copy_(total.log2_().add_(peak).mT)
        ctx.save_for_backward(q, k, v, tables, out, normaliser)
        ctx.size = size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):
            return *_backward(grad, ctx.size, *ctx.saved_tensors), None


def _backward(
    grad: Tensor,
    size: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor | None,
    out: Tensor,
    normaliser: Tensor,
) -> tuple[Tensor | None, ...]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dtables = None if tables is None else torch.zeros_like(tables)
    # With these in the products, no pass over a tile is needed to subtract them.
    delta = (grad * out).sum(dim=1, keepdim=True)
    grad_and_delta = torch.cat((grad, -delta), dim=1) * math.log(2)
    v_and_one = torch.cat((v, torch.ones_like(delta)), dim=1)
    positions = Positions.of(size, tables, q.device)
    buffer, second = q.new_empty(2, _tile_size(q)).unbind()
    for tile in _tiles(q):
        heads = tile.heads
        weights = _logits(tile, q, k, positions, buffer, minus=normaliser).exp2_()
        dv[heads] += torch.bmm(tile.of(grad), weights)
        dweights = second[: weights.numel()].view_as(weights)
        torch.bmm(tile.of(grad_and_delta).mT, v_and_one[heads], out=dweights)
        dlogits = weights.mul_(dweights)
        dq_tile = torch.bmm(k[heads], dlogits.mT)
        dk[heads] += torch.bmm(tile.of(q), dlogits)
        if tables is not None and dtables is not None:
            on_map = dlogits.unflatten(-1, size)
            dterms = torch.cat((on_map.sum(dim=-1), on_map.sum(dim=-2)), dim=-1)
            index = positions.table_row[tile.queries].expand_as(dterms)
            by_row = dterms.new_zeros(*dterms.shape[:2], len(tables)).scatter_(2, index, dterms)
            dq_tile += (by_row @ tables).mT
            dtables += (tile.of(q) @ by_row).sum(dim=0).T
        tile.of(dq).copy_(dq_tile)
    return dq, dk, dv, dtables


def _split(q: Tensor) -> tuple[int, int]:
    """How many heads and how many queries a tile has."""
    heads, _, positions = q.shape
    budget = max(1, TILE_BYTES // q.element_size())
    if positions**2 <= budget:
        return min(heads, budget // positions**2), positions
    return 1, min(positions, max(1, budget // positions))


def _tile_size(q: Tensor) -> int:
    heads, queries = _split(q)
    return heads * queries * q.shape[2]


def _tiles(q: Tensor) -> list[Tile]:
    """Tiles that cover all heads and queries once."""
    heads, queries = _split(q)
    return [
        Tile(slice(h, h + heads), slice(i, min(i + queries, q.shape[2])))
        for h in range(0, q.shape[0], heads)
        for i in range(0, q.shape[2], queries)
    ]


def _logits(
    tile: Tile,
    q: Tensor,
    k: Tensor,
    positions: Positions,
    buffer: Tensor,
    minus: Tensor | None = None,
) -> Tensor:
    """The tile's logits (heads, queries, L), in ``buffer``, less its queries' part of ``minus``."""
    queries = tile.of(q).mT
    heads, count, keys = *queries.shape[:2], k.shape[2]
    logits = buffer[: heads * count * keys].view(heads, count, keys)
    start = queries.new_zeros(1, 1, 1) if minus is None else -tile.of(minus).mT
    if positions.tables is None:
        logits.copy_(start.expand_as(logits))
    else:
        index = positions.table_row[tile.queries].expand(heads, -1, -1)
        terms = (queries @ positions.tables.T).gather(2, index)
        rows, columns = terms.split(positions.size, dim=2)
        on_map = logits.unflatten(2, positions.size)
        torch.add((rows + start)[..., :, None], columns[..., None, :], out=on_map)
    return torch.baddbmm(logits, queries, k[tile.heads], out=logits)
