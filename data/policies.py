"""TrivialAugment, RandAugment and AutoAugment's CIFAR policy on batches of uint8 pixels.

Operations, magnitudes and policies are torchvision's, and results equal those of its transforms of
PIL images. Computed in integers or single float32 operations, they are the same on every device.
What is done to each sample is decided on the CPU, so that nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

POLICIES = ("trivial", "rand", "auto")
MAX_MAGNITUDE = 30  # of RandAugment; TrivialAugment has as many steps
AUTO_BINS = 10


def draw(
    policy: str,
    number: int,
    size: tuple[int, int],
    generator: torch.Generator,
    rand_ops: int,
    rand_magnitude: int,
) -> dict[str, Tensor]:
    """Draw what ``policy`` does to each of ``number`` samples of height and width ``size``.

    Returns "operations" (number, S), indices into `OPERATIONS` in order, and "magnitudes"
    (number, S) float64; S is 1 for trivial, ``rand_ops`` for rand and 2 for auto.
    """

    def integers(stop: int) -> Tensor:
        return torch.randint(stop, (number,), generator=generator)

    steps = []
    if policy == "trivial":
        table = magnitudes(MAX_MAGNITUDE + 1, size, wide=True)
        operations, levels = integers(CHOSEN_AT_RANDOM), integers(MAX_MAGNITUDE + 1)
        steps.append((operations, table[operations, levels], integers(2)))
    elif policy == "rand":
        table = magnitudes(MAX_MAGNITUDE + 1, size, wide=False)
        for _ in range(rand_ops):
            operations = integers(CHOSEN_AT_RANDOM)
            steps.append((operations, table[operations, rand_magnitude], integers(2)))
    else:
        table, pairs = magnitudes(AUTO_BINS, size, wide=False), _auto_policies()
        chosen = integers(len(pairs))
        for step in range(2):
            operations, probabilities, levels = pairs[chosen, step].unbind(-1)
            left_out = torch.rand(number, generator=generator) > probabilities
            operations = operations.long().masked_fill(left_out, 0)
            steps.append((operations, table[operations, levels.long()], integers(2)))
    operations, strengths, signs = (torch.stack(part, 1) for part in zip(*steps, strict=True))
    signed = torch.tensor([name in SIGNED for name in OPERATIONS])[operations]
    return {
        "operations": operations,
        "magnitudes": torch.where(signed & (signs == 1), -strengths, strengths),
    }


def apply(pixels: Tensor, operations: Tensor, magnitudes: Tensor) -> Tensor:
    """Return ``pixels`` (B, H, W, 3) uint8 after the (B, S) operations that `draw` returned.

    In each of the S steps, an operation is called once, on all samples that have it.
    """
    functions, pixels = list(OPERATIONS.values()), pixels.clone()
    for step in range(operations.shape[1]):
        chosen = operations[:, step]
        for operation in chosen.unique().tolist():
            if operation == 0:  # identity
                continue
            samples = (chosen == operation).nonzero()[:, 0]
            index = samples.to(pixels.device, non_blocking=True)
            changed = functions[operation](pixels.index_select(0, index), magnitudes[samples, step])
            pixels.index_copy_(0, index, changed)
    return pixels


def magnitudes(bins: int, size: tuple[int, int], wide: bool) -> Tensor:
    """(operations, bins) float64: the magnitudes of each, from weakest to strongest."""
    height, width = size
    shear, rotation, enhancement, dropped_bits = (0.99, 135, 0.99, 6) if wide else (0.3, 30, 0.9, 4)
    fraction = 150 / 331  # 150 pixels of a side of 331 in the paper
    strongest = {
        "ShearX": shear,
        "ShearY": shear,
        "TranslateX": 32 if wide else fraction * width,
        "TranslateY": 32 if wide else fraction * height,
        "Rotate": rotation,
        **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), enhancement),
    }
    ranges = {name: torch.linspace(0, value, bins) for name, value in strongest.items()}
    ranges["Posterize"] = 8 - (torch.arange(bins) / ((bins - 1) / dropped_bits)).round()
    ranges["Solarize"] = torch.linspace(255, 0, bins)
    none = torch.zeros(bins)
    return torch.stack([ranges.get(name, none) for name in OPERATIONS]).double()


def _auto_policies() -> Tensor:
    """(25, 2, 3): index, probability and magnitude level of each operation of the 25 pairs."""
    from data.vision import import_transforms

    transforms = import_transforms()
    index = {name: number for number, name in enumerate(OPERATIONS)}
    pairs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies
    return torch.tensor([[(index[n], p, level or 0) for n, p, level in pair] for pair in pairs])


def _on_device(values: Tensor, pixels: Tensor) -> Tensor:
    """Move one number per sample to the device, shaped to broadcast over the sample's pixels."""
    return values.to(pixels.device, non_blocking=True)[:, None, None, None]


def pick(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return images whose pixel (b, i, j) is pixel (rows[b, i, j], columns[b, i, j]) of image b.

    ``pixels`` is (B, H, W, C); rows and columns are broadcast against each other.
    """
    number, height, width, channels = pixels.shape
    image = torch.arange(number, device=pixels.device)[:, None, None]
    flat = (image * height + rows) * width + columns
    # One flat index takes a quarter of the time of three broadcast ones.
    picked = pixels.reshape(-1, channels).index_select(0, flat.flatten())
    return picked.view(*flat.shape, channels)


def _warp(pixels: Tensor, *matrix: Tensor | float) -> Tensor:
    """Return images whose pixel (x, y) is pixel (a x + b y + c, d x + e y + f), black outside.

    Pillow's fixed-point arithmetic finds the nearest pixel, with 16 bits on each side of the point.
    """
    _, height, width, _ = pixels.shape
    rows_of_matrix = [torch.as_tensor(value, dtype=torch.float64) for value in matrix]
    a, b, c, d, e, f = torch.broadcast_tensors(*rows_of_matrix)
    from_centers = torch.stack([a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2])
    fixed = (from_centers * 2**16 + 0.5).floor().int().to(pixels.device, non_blocking=True)
    a, b, c, d, e, f = fixed[:, :, None, None]
    x = torch.arange(width, device=pixels.device, dtype=torch.int32)
    y = torch.arange(height, device=pixels.device, dtype=torch.int32)[:, None]
    columns, rows = (a * x + b * y + c) >> 16, (d * x + e * y + f) >> 16
    inside = (columns >= 0) & (columns < width) & (rows >= 0) & (rows < height)
    picked = pick(pixels, rows.clamp_(0, height - 1), columns.clamp_(0, width - 1))
    return picked.mul_(inside[..., None])


def _rotate(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Rotate counterclockwise around the center; magnitudes in degrees."""
    y, x = pixels.shape[1] / 2, pixels.shape[2] / 2
    angles = -magnitudes.deg2rad()
    # As Pillow does, so that a quarter turn is exact and not off by 1e-17.
    cos, sin = angles.cos().round(decimals=15), angles.sin().round(decimals=15)
    return _warp(pixels, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _blend(pixels: Tensor, weakest: Tensor | float, magnitudes: Tensor) -> Tensor:
    """Interpolate from ``weakest`` (magnitude -1) to ``pixels`` (0), extrapolate above 0."""
    factors = _on_device((1 + magnitudes).float(), pixels)
    blended = weakest + factors * (pixels.float() - weakest)
    return blended.clamp_(0, 255).byte()


def _gray(pixels: Tensor) -> Tensor:
    """Luma (B, H, W, 1) by ITU-R 601, int32."""
    red, green, blue = pixels.int().split(1, dim=-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16


def _contrast(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Scale around the mean of the gray image, rounded as in Pillow."""
    number = pixels.shape[1] * pixels.shape[2]
    total = _gray(pixels).sum(dim=(1, 2), keepdim=True)
    mean = (2 * total + number) // (2 * number)
    return _blend(pixels, mean.float(), magnitudes)


def _sharpness(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Blend with the mean over 3x3 pixels, weight 5 in the center; edge pixels stay the same."""
    exact = pixels.short()
    rows = exact[:, :-2] + exact[:, 1:-1] + exact[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * exact[:, 1:-1, 1:-1]
    smooth = exact.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # rounded
    return _blend(pixels, smooth.float(), magnitudes)


def _posterize(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Keep as many upper bits as the magnitude says."""
    return pixels & _on_device((256 - 2 ** (8 - magnitudes)).byte(), pixels)


def _solarize(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Invert values that are at least the magnitude."""
    return torch.where(pixels < _on_device(magnitudes.float(), pixels), pixels, 255 - pixels)


def _autocontrast(pixels: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0 to 255, rounding down.

    The quotient is exact; Pillow's is sometimes just below an integer, and its result 1 less.
    """
    values = pixels.float()
    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    stretched = (255 * (values - low) / (high - low).clamp_(min=1)).byte()
    return torch.where(high > low, stretched, pixels)


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    from data.vision import import_transforms

    functional = import_transforms().v2.functional
    return functional.equalize(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# Each takes pixels (B, H, W, 3) uint8 and their magnitudes (B,), which are on the CPU.
OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Identity": lambda pixels, _: pixels,
    "ShearX": lambda pixels, by: _warp(pixels, 1, by, 0, 0, 1, 0),
    "ShearY": lambda pixels, by: _warp(pixels, 1, 0, 0, by, 1, 0),
    "TranslateX": lambda pixels, by: _warp(pixels, 1, 0, -by.trunc(), 0, 1, 0),
    "TranslateY": lambda pixels, by: _warp(pixels, 1, 0, 0, 0, 1, -by.trunc()),
    "Rotate": _rotate,
    "Brightness": lambda pixels, by: _blend(pixels, 0, by),
    "Color": lambda pixels, by: _blend(pixels, _gray(pixels).float(), by),
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": lambda pixels, _: 255 - pixels,
}
CHOSEN_AT_RANDOM = len(OPERATIONS) - 1  # all but Invert, which only AutoAugment has
SIGNED = {
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
}
