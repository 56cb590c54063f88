"""Fit relative position tables made for one map size to maps of another size."""

import torch
from torch import Tensor


def fit_table(table: Tensor, length: int, pool: int = 1) -> Tensor:
    """Convert a table of relative positions to an axis of ``length`` positions.

    ``table`` is (2L-1, dkh), with the embedding of offset o in row o + L - 1. A shorter axis has
    fewer offsets: it gets the middle rows, and every offset keeps its embedding. A longer axis has
    offsets without a learned embedding: the rows are interpolated linearly so that the largest
    offsets of both lengths coincide. Offset o then gets the embedding at o * (L-1) / (length-1) of
    the original, and only offset 0 and the two largest ones keep theirs.

    With ``pool``, only every pool-th position exists, and only offsets that are multiples of it.

    Returns:
        (2 * n - 1, dkh) for n = ceil(length / pool) positions; ``table`` itself if all of its rows
        are used unchanged.
    """
    # Exported and traced programs must work at other sizes, so they get no size-dependent branch.
    fixed = not (torch.compiler.is_exporting() or torch.jit.is_tracing())
    if fixed and table.shape[0] == 2 * length - 1:
        return table if pool == 1 else table[(length - 1) % pool :: pool]
    own = (table.shape[0] - 1) // 2  # the largest offset
    last = (length - 1) // pool  # the last position
    offsets = pool * (torch.arange(2 * last + 1, device=table.device) - last)
    most = torch.arange(length, device=table.device).amax(dim=0).clamp(min=1)
    # The row of offset o in the original, times ``most``: a non-negative integer.
    places = offsets * most.clamp(max=own) + own * most
    below = places // most
    exact = torch.promote_types(table.dtype, torch.float32)
    share = (places - below * most).to(exact) / most.to(exact)
    low, high = (table[row].to(exact) for row in (below, (places + most - 1) // most))
    return torch.lerp(low, high, share[:, None]).to(table.dtype)
