"""Relative position tables of one map size, for maps of another."""

import torch.nn.functional as F
from torch import Tensor


def fit_table(table: Tensor, length: int) -> Tensor:
    """The table for an axis of ``length`` positions from one made for another length.

    ``table`` is (2L-1, dkh), its row o + L - 1 for the offset o. A shorter axis has fewer offsets:
    it gets the middle rows, each offset its own. A longer axis has offsets that no row was learned
    for: the rows are interpolated linearly so that the farthest offsets of both lengths agree,
    offset o taking the place of o * (L-1) / (length-1); the result differs from the original at
    every offset but 0 and the two ends.

    Returns:
        (2 * length - 1, dkh), ``table`` itself where the length is its own.
    """
    rows = 2 * length - 1
    beyond = (table.shape[0] - rows) // 2
    if beyond == 0:
        return table
    if beyond > 0:
        return table[beyond : beyond + rows]
    resized = F.interpolate(table.T[None], size=rows, mode="linear", align_corners=True)
    return resized[0].T
