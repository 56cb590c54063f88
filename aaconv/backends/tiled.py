"""Exact attention in tiles of logits that fit into the CPU cache.

Letters: G = B * N heads of all images, L = H * W positions, D and E channels per head of
queries/keys and of values. Channels come before positions in every tensor: products of a tile with
a few channels are several times faster that way. Weights are powers of 2 because exp2 takes half
the time of exp.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aaconv.backends.operations import refuse_second
from aaconv.backends.precision import in_float32, without_autocast

# Bytes of the logits of one tile: small enough to fit into the cache with their gradients, large
# enough that the overhead of launching operations hardly matters.
TILE_BYTES = 2**23


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return None: always available; see `aaconv.backends.Backend`."""
    return None


@in_float32
def attend(q: Tensor, k: Tensor, v: Tensor, rel_h: Tensor | None, rel_w: Tensor | None) -> Tensor:
    """Compute `aaconv.attention_2d` tile by tile. It cannot be differentiated twice."""
    B, N, H, W, D = q.shape
    # (B, N, H, W, D) to (B N, D, HW): channels before positions.
    scaled = q * (D**-0.5 * math.log2(math.e))
    channels_first = [t.flatten(2, 3).mT.flatten(0, 1) for t in (scaled, k, v)]
    tables = None if rel_h is None or rel_w is None else torch.cat((rel_h, rel_w))
    out = TiledAttention.apply(*channels_first, tables, (H, W))
    return out.unflatten(0, (B, N)).mT.unflatten(2, (H, W))


class Tile(NamedTuple):
    """The heads and queries that are computed together."""

    heads: slice
    queries: slice

    def of(self, t: Tensor) -> Tensor:
        """Return the tile's part of a tensor (G, channels, L)."""
        return t[self.heads, :, self.queries]


class Positions(NamedTuple):
    """The size (H, W) of the map and its relative position embeddings.

    tables is (2H-1 + 2W-1, D), the row offsets before the column offsets, or None. table_row is
    (L, H + W): for each query, the index into tables for every key row, then for every key column.
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
    """Attention with weights 2^(q^T (k + positions)), without ever storing the (L, L) logits.

    q is (G, D, L), scaled by log2(e) / sqrt(D); k is (G, D, L); v is (G, E, L); tables and size are
    as in `Positions`. Returns (G, E, L). The backward pass recomputes each tile of weights from the
    saved normalizers; the memory of both passes grows in proportion to L.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, tables: Tensor | None, size: tuple[int, int]
    ) -> Tensor:
        out = torch.empty_like(v)
        normalizer = q.new_empty(q.shape[0], 1, q.shape[2])
        positions = Positions.of(size, tables, q.device)
        buffer = q.new_empty(_tile_size(q))
        for tile in _tiles(q):
            logits = _logits(tile, q, k, positions, buffer)
            peak = logits.amax(dim=-1, keepdim=True)
            weights = logits.sub_(peak).exp2_()
            total = weights.sum(dim=-1, keepdim=True)
            tile.of(out).copy_(torch.bmm(v[tile.heads], weights.mT)).div_(total.mT)
            tile.of(normalizer).copy_(total.log2_().add_(peak).mT)
        ctx.save_for_backward(q, k, v, tables, out, normalizer)
        ctx.size = size
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        batched = torch._C._functorch.is_legacy_batchedtensor
        if not torch.compiler.is_compiling() and batched(grad):
            raise NotImplementedError(
                "backend='tiled' cannot be used with is_grads_batched; use backend='reference'"
            )
        return *Gradients.apply(grad, ctx.size, *ctx.saved_tensors), None


class Gradients(torch.autograd.Function):
    """The backward pass of `TiledAttention`, as a separate node in the graph.

    This makes a second derivative an error. With once_differentiable, second derivatives from
    torch.autograd.grad would be silently wrong: the contribution of attention would be missing.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *saved: Any) -> tuple[Tensor | None, ...]:
        with without_autocast(grad.device.type):
            return _backward(grad, *saved)

    backward = staticmethod(refuse_second("tiled"))


def _backward(
    grad: Tensor,
    size: tuple[int, int],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: Tensor | None,
    out: Tensor,
    normalizer: Tensor,
) -> tuple[Tensor | None, ...]:
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    dtables = None if tables is None else torch.zeros_like(tables)
    # With delta inside the matrix product, no extra pass over each tile is needed to subtract it.
    delta = (grad * out).sum(dim=1, keepdim=True)
    grad_and_delta = torch.cat((grad, -delta), dim=1) * math.log(2)
    v_and_one = torch.cat((v, torch.ones_like(delta)), dim=1)
    positions = Positions.of(size, tables, q.device)
    buffer, second = q.new_empty(2, _tile_size(q)).unbind()
    for tile in _tiles(q):
        heads = tile.heads
        weights = _logits(tile, q, k, positions, buffer, minus=normalizer).exp2_()
        dv[heads] += torch.bmm(tile.of(grad), weights)
        dweights = second[: weights.numel()].view_as(weights)
        torch.bmm(tile.of(grad_and_delta).mT, v_and_one[heads], out=dweights)
        dlogits = weights.mul_(dweights)
        dq_tile = torch.bmm(k[heads], dlogits.mT)
        dk[heads] += torch.bmm(tile.of(q), dlogits)
        if tables is not None and dtables is not None:
            on_map = dlogits.unflatten(-1, size)
            dbias = torch.cat((on_map.sum(dim=-1), on_map.sum(dim=-2)), dim=-1)
            index = positions.table_row[tile.queries].expand_as(dbias)
            by_row = dbias.new_zeros(*dbias.shape[:2], len(tables)).scatter_(2, index, dbias)
            dq_tile += (by_row @ tables).mT
            dtables += (tile.of(q) @ by_row).sum(dim=0).T
        tile.of(dq).copy_(dq_tile)
    return dq, dk, dv, dtables


def _split(q: Tensor) -> tuple[int, int]:
    """Return the number of heads and of queries per tile."""
    heads, _, positions = q.shape
    budget = max(1, TILE_BYTES // q.element_size())
    if positions**2 <= budget:
        return min(heads, budget // positions**2), positions
    return 1, min(positions, max(1, budget // positions))


def _tile_size(q: Tensor) -> int:
    heads, queries = _split(q)
    return heads * queries * q.shape[2]


def _tiles(q: Tensor) -> list[Tile]:
    """Return tiles that together cover every head and query exactly once."""
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
    """Compute the tile's logits, (heads, queries, L), in ``buffer``.

    ``minus``, (G, 1, L), is subtracted from the logits of each query.
    """
    queries = tile.of(q).mT
    heads, count, keys = *queries.shape[:2], k.shape[2]
    logits = buffer[: heads * count * keys].view(heads, count, keys)
    start = queries.new_zeros(1, 1, 1) if minus is None else -tile.of(minus).mT
    if positions.tables is None:
        logits.copy_(start.expand_as(logits))
    else:
        index = positions.table_row[tile.queries].expand(heads, -1, -1)
        bias = (queries @ positions.tables.T).gather(2, index)
        row_bias, col_bias = bias.split(positions.size, dim=2)
        on_map = logits.unflatten(2, positions.size)
        torch.add((row_bias + start)[..., :, None], col_bias[..., None, :], out=on_map)
    return torch.baddbmm(logits, queries, k[tile.heads], out=logits)
