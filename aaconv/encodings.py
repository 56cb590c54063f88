"""Absolute position encodings of attention's input, which Bello et al. compare to relative ones.

Both encodings are computed from the size of the map: they have no parameters and fit any size.

Letters: B batch, C channels, H x W map.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def add_sine(x: Tensor) -> Tensor:
    """Add sines and cosines of each pixel's row and column to ``x`` (B, C, H, W), C at least 4.

    As in the Image Transformer (Parmar et al., ICML 2018): C // 4 wavelengths per axis, from 2 pi
    to 20000 pi pixels in geometric progression. The channels are sines of the row, cosines of the
    row, sines of the column, cosines of the column; nothing is added to the last C % 4 channels.
    """
    channels, H, W = x.shape[1:]
    count = channels // 4
    step = math.log(1e4) / max(count - 1, 1)
    rates = torch.exp(-step * torch.arange(count, device=x.device, dtype=torch.float32))
    by_row, by_column = (
        torch.cat((angle.sin(), angle.cos()))  # (2 count, L)
        for angle in (rates[:, None] * torch.arange(L, device=x.device) for L in (H, W))
    )
    rest = by_row.new_zeros(channels - 4 * count, H, W)
    waves = (by_row[:, :, None].expand(-1, H, W), by_column[:, None].expand(-1, H, W), rest)
    return x + torch.cat(waves).to(x.dtype)


def append_coordinates(x: Tensor) -> Tensor:
    """Append three channels to ``x`` (B, C, H, W): each pixel's column, row and radius.

    As in CoordConv (Liu et al., NeurIPS 2018): column and row run from -1 to 1, and are 0 on an
    axis of one pixel; the radius is the distance from the center in these coordinates.
    """
    B, _, H, W = x.shape
    row, column = (
        (2 * torch.arange(L, device=x.device, dtype=torch.float32) - (L - 1)) / max(L - 1, 1)
        for L in (H, W)
    )
    row, column = row[:, None].expand(H, W), column.expand(H, W)
    coordinates = torch.stack((column, row, (row.square() + column.square()).sqrt())).to(x.dtype)
    # torch.cat returns channels_last only if all of its inputs are.
    memory_format = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    out = torch.cat((x, coordinates.expand(B, -1, -1, -1)), dim=1)
    return out.contiguous(memory_format=memory_format)


# Name: (function, number of channels it appends).
ABSOLUTE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "none": (lambda x: x, 0),
    "sine": (add_sine, 0),
    "coord": (append_coordinates, 3),
}
