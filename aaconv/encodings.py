"""Absolute positions for the input of the attention, which Bello et al. compare relative ones with.

Both are computed anew for every size: they have no parameters and fit any map.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def add_sine(x: Tensor) -> Tensor:
    """``x`` (B, C, H, W) plus sines and cosines of each pixel's row and column.

    As the Image Transformer does (Parmar et al., ICML 2018): C // 4 wavelengths per axis, from 2 pi
    to 20000 pi pixels in geometric steps, as sines and cosines of the row, then of the column;
    0 to 3 channels at the end get nothing.

    Raises:
        ValueError: ``x`` has fewer than 4 channels.
    """
    channels, H, W = x.shape[1:]
    count = channels // 4
    if count == 0:
        raise ValueError(f"sine positions need at least 4 input channels, not {channels}")
    step = math.log(1e4) / max(count - 1, 1)
    rates = torch.exp(-step * torch.arange(count, device=x.device, dtype=torch.float32))
    rows, columns = (
        torch.cat((angle.sin(), angle.cos()))  # (2 count, L)
        for angle in (rates[:, None] * torch.arange(L, device=x.device) for L in (H, W))
    )
    rest = rows.new_zeros(channels - 4 * count, H, W)
    waves = (rows[:, :, None].expand(-1, H, W), columns[:, None].expand(-1, H, W), rest)
    return x + torch.cat(waves).to(x.dtype)


def append_coordinates(x: Tensor) -> Tensor:
    """``x`` (B, C, H, W) with three more channels: its column, row and distance to the centre.

    CoordConv (Liu et al., NeurIPS 2018): column and row run from -1 to 1, and are 0 where there is
    only one.
    """
    B, _, H, W = x.shape
    row, column = (
        (2 * torch.arange(L, device=x.device, dtype=torch.float32) - (L - 1)) / max(L - 1, 1)
        for L in (H, W)
    )
    row, column = row[:, None].expand(H, W), column.expand(H, W)
    coordinates = torch.stack((column, row, torch.hypot(row, column))).to(x.dtype)
    # Concatenation takes the layout of channels_last inputs only if all are so.
    layout = torch.channels_last if x.stride(1) == 1 else torch.contiguous_format
    return torch.cat((x, coordinates.expand(B, -1, -1, -1)), dim=1).contiguous(memory_format=layout)


# The function, and how many channels it adds.
ABSOLUTE: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "none": (lambda x: x, 0),
    "sine": (add_sine, 0),
    "coord": (append_coordinates, 3),
}
