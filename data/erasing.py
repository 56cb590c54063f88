"""Rectangles of the mean color: cutout (DeVries and Taylor, 2017) and random erasing."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# For random erasing, as in Zhong et al. (AAAI 2020) and torchvision.
AREAS, LOG_RATIOS, ATTEMPTS = (0.02, 0.33), (math.log(0.3), math.log(3.3)), 10


def cutout_boxes(row: Tensor, column: Tensor, side: int) -> Tensor:
    """Return squares of ``side`` pixels around the given pixels (B,), as boxes for `inside`."""
    top, left = row - side // 2, column - side // 2
    return torch.stack([top, top + side, left, left + side], 1)


def draw(
    probability: float, number: int, size: tuple[int, int], generator: torch.Generator
) -> dict[str, Tensor]:
    """Draw what random erasing erases in each of ``number`` samples of (height, width) ``size``.

    Returns "erased" (number, 4), boxes for `inside`, empty with probability 1 - ``probability``.
    Area and aspect ratio are drawn ten times, and the first rectangle that is smaller than the
    image is used; if there is none, the box is empty.
    """
    height, width = size

    def uniform(low: float, high: float, rows: int = 1) -> Tensor:
        drawn = torch.rand(rows, number, dtype=torch.float64, generator=generator)
        return low + (high - low) * drawn

    erased = uniform(0, 1)[0] < probability
    area = uniform(*AREAS, ATTEMPTS) * (height * width)
    ratio = uniform(*LOG_RATIOS, ATTEMPTS).exp()
    rows, columns = (area * ratio).sqrt().round().long(), (area / ratio).sqrt().round().long()
    fits = (rows < height) & (columns < width)
    first = fits.int().argmax(dim=0, keepdim=True)
    rows, columns = rows.gather(0, first)[0], columns.gather(0, first)[0]
    top = (uniform(0, 1)[0] * (height - rows + 1)).long()
    left = (uniform(0, 1)[0] * (width - columns + 1)).long()
    boxes = torch.stack([top, top + rows, left, left + columns], 1)
    return {"erased": boxes * (erased & fits.any(dim=0))[:, None]}


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return a mask (B, 1, H, W), true inside the boxes (B, 4): top, bottom, left, right.

    Bottom and right are exclusive; a box may extend past the image.
    """
    top, bottom, left, right = boxes[:, :, None].unbind(1)
    rows = torch.arange(height, device=boxes.device)
    columns = torch.arange(width, device=boxes.device)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
