"""The terms that relative positions add to the logits (Bello et al. 2019, section 3.2).

A query's bias is the sum of a term for the key's row and one for its column, kept as two tensors,
``row_bias`` (B, N, H, W, H) and ``col_bias`` (B, N, H, W, W): one number per query and key row,
and one per query and key column. They are called bias because they are added to the logits, but
they are computed from the queries.

Letters: B batch, N heads, H x W map, D channels per head of queries and keys.
"""

import torch
from torch import Tensor


def position_bias(q: Tensor, table: Tensor, axis: int) -> Tensor:
    """Return products of each query with the embeddings of its offsets to all key rows or columns.

    Args:
        q: queries, (B, N, H, W, D).
        table: (2L-1, D), with the embedding of offset o in row o + L - 1, where L is the size of
            ``axis``.
        axis: 2 for key rows, 3 for key columns.

    Returns:
        (B, N, H, W, L), in the dtype of ``q``.
    """
    length = q.shape[axis]
    index = torch.arange(length, device=q.device)
    by_offset = table.to(q.dtype)[index - index[:, None] + length - 1]  # (L query, L key, D)
    bias = torch.einsum("bnhwd,hgd->bnhwg" if axis == 2 else "bnhwd,wud->bnhwu", q, by_offset)
    if torch.compiler.is_exporting():
        # Otherwise, the layout of later results would depend on the size, as for a batch of 1.
        return bias.clone(memory_format=torch.contiguous_format)
    return bias
