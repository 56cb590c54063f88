"""TrivialAugment, RandAugment and AutoAugment's CIFAR policy on batches of uint8 pixels.

Operations, magnitudes and policies are torchvision's, the values those of its transforms of PIL
images, in integers or single float32 operations: the same pixels on every device. What is done to
which sample is decided on the CPU, so that a GPU is never waited for.
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
    """What ``policy`` does to each of ``number`` samples of height and width ``size``.

    Returns "operations" (number, S), indices into `OPERATIONS` in their order, and "magnitudes"
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
    """``pixels`` (B, H, W, 3) uint8 after (B, S) operations as `draw` returns them.

    Each operation is called once a step, on all samples that have it.
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
    fraction = 150 / 331  # of a side that is 331 pixels in the paper
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
    """(25, 2, 3): of each pair of operations index, probability and level of the magnitude."""
    from data.vision import import_transforms

    transforms = import_transforms()
    index = {name: number for number, name in enumerate(OPERATIONS)}
    pairs = transforms.AutoAugment(transforms.AutoAugmentPolicy.CIFAR10).policies
    return torch.tensor([[(index[n], p, level or 0) for n, p, level in pair] for pair in pairs])


def _on_device(values: Tensor, pixels: Tensor) -> Tensor:
    """A number for each sample, to be broadcast over its pixels."""
    return values.to(pixels.device, non_blocking=True)[:, None, None, None]


def pick(pixels: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The images whose pixel (b, i, j) is pixel (rows[b, i, j], columns[b, i, j]) of image b.

    Of ``pixels`` (B, H, W, C); rows and columns are broadcast against each other.
    """
    number, height, width, channels = pixels.shape
    image = torch.arange(number, device=pixels.device)[:, None, None]
    flat = (image * height + rows) * width + columns
    # One flat index takes a quarter of the time that three broadcast ones take.
    picked = pixels.reshape(-1, channels).index_select(0, flat.flatten())
    return picked.view(*flat.shape, channels)


def _warp(pixels: Tensor, *matrix: Tensor | float) -> Tensor:
    """Samples whose pixel (x, y) is pixel (a x + b y + c, d x + e y + f), black outside.

    The nearest pixel by Pillow's arithmetic: 16 bits each before and after the binary point.
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
    """Around the center, counterclockwise; magnitudes in degrees."""
    y, x = pixels.shape[1] / 2, pixels.shape[2] / 2
    angles = -magnitudes.deg2rad()
    # As Pillow does: a quarter turn has no rest of 1e-17.
    cos, sin = angles.cos().round(decimals=15), angles.sin().round(decimals=15)
    return _warp(pixels, cos, sin, x - cos * x - sin * y, -sin, cos, y + sin * x - cos * y)


def _blend(pixels: Tensor, weakest: Tensor | float, magnitudes: Tensor) -> Tensor:
    """From ``weakest`` at magnitude -1 by way of ``pixels`` at 0 to more than they are."""
    factors = _on_device((1 + magnitudes).float(), pixels)
    blended = weakest + factors * (pixels.float() - weakest)
    return blended.clamp_(0, 255).byte()


def _gray(pixels: Tensor) -> Tensor:
    """Luma (B, H, W, 1) by ITU-R 601, int32."""
    red, green, blue = pixels.int().split(1, dim=-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 2**15) >> 16


def _contrast(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Around the mean of the gray image, which Pillow rounds."""
    number = pixels.shape[1] * pixels.shape[2]
    total = _gray(pixels).sum(dim=(1, 2), keepdim=True)
    mean = (2 * total + number) // (2 * number)
    return _blend(pixels, mean.float(), magnitudes)


def _sharpness(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Weakest is the mean over 3x3 pixels with weight 5 in the middle; the edge stays."""
    exact = pixels.short()
    rows = exact[:, :-2] + exact[:, 1:-1] + exact[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * exact[:, 1:-1, 1:-1]
    smooth = exact.clone()
    smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # rounded
    return _blend(pixels, smooth.float(), magnitudes)


def _posterize(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Keeps the upper bits, as many as the magnitude says."""
    return pixels & _on_device((256 - 2 ** (8 - magnitudes)).byte(), pixels)


def _solarize(pixels: Tensor, magnitudes: Tensor) -> Tensor:
    """Inverts what is at least the magnitude."""
    return torch.where(pixels < _on_device(magnitudes.float(), pixels), pixels, 255 - pixels)


def _autocontrast(pixels: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to 0 to 255, and rounded down.

    The quotient is exact; Pillow's is sometimes just below a whole number, and then 1 less.
    """
    values = pixels.float()
    low, high = values.amin(dim=(1, 2), keepdim=True), values.amax(dim=(1, 2), keepdim=True)
    stretched = (255 * (values - low) / (high - low).clamp_(min=1)).byte()
    return torch.where(high > low, stretched, pixels)


def _equalize(pixels: Tensor, _: Tensor) -> Tensor:
    from data.vision import import_transforms

    functional = import_transforms().v2.functional
    return functional.equalize(pixels.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# Each takes pixels (B, H, W, 3) uint8 and their magnitudes (B,), on the CPU.
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
CHOSEN_AT_RANDOM = len(OPERATIONS) - 1  # all but inverting, which AutoAugment alone has
SIGNED = {
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
}
