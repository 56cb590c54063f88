"""Relative position tables made for one map size, used on maps of another."""

import torch.nn.functional as F
from torch import Tensor


def fit_table(table: Tensor, length: int) -> Tensor:
    """Convert a table of relative positions to an axis of ``length`` positions.

    ``table`` is (2L-1, dkh), its row o + L - 1 for the offset o. A shorter axis has fewer offsets:
    it gets the middle rows, and every offset keeps its embedding. A longer axis has offsets for
    which no embedding was learned: the rows are interpolated linearly so that the largest offsets
    of both lengths agree, which gives offset o the embedding at o * (L-1) / (length-1) in the
    original. Only offset 0 and the two largest ones then keep their embedding.

    Returns:
        (2 * length - 1, dkh); ``table`` itself if it is made for ``length``.
    """
    rows = 2 * length - 1
    surplus = (table.shape[0] - rows) // 2
    if surplus == 0:
        return table
    if surplus > 0:
        return table[surplus : surplus + rows]
    resized = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=True)
    return resized[0].T
