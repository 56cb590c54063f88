"""A data set that needs no download and that no sum of local evidence can solve."""

from __future__ import annotations

import torch
from torch import Tensor

from data.dataset import (
    Dataset,
    Images,
    check_val_size,
    digest_of,
    hold_out,
    seeded_generator,
)

IMAGE_SIZE = 32
CUE_SIZE = 2
SHAPE_SIZE = 6
SHAPES_SHOWN = 5
BACKGROUND = (128, 128, 128)

# The corners of an RGB cube around the background's gray, so that no color stands out.
COLORS = {
    "black": (40, 40, 40),
    "blue": (40, 40, 216),
    "green": (40, 216, 40),
    "cyan": (40, 216, 216),
    "red": (216, 40, 40),
    "magenta": (216, 40, 216),
    "yellow": (216, 216, 40),
    "white": (216, 216, 216),
}

# Each is its own mirror image, so that a flip does not change the class, and has 20 pixels set, so
# that the amount of a color does not reveal the shape.
SHAPES = {
    "frame": ("######", "#....#", "#....#", "#....#", "#....#", "######"),
    "plus": ("..##..", "..##..", "######", "######", "..##..", "..##.."),
    "cross": ("##..##", "##..##", "..##..", "..##..", "##..##", "##..##"),
    "posts": ("##..##", "##..##", "##..##", "##..##", "##..##", "......"),
    "ladder": ("#....#", "######", "#....#", "#....#", "######", "#....#"),
    "tee": ("######", "######", "..##..", "..##..", "..##..", "..##.."),
    "tent": ("..##..", "..##..", ".####.", ".####.", "######", "#....#"),
    "cup": ("#....#", "#....#", "#....#", "##..##", "######", ".####."),
}

# Top left pixels of the slots for shapes, along the right and bottom edges, two pixels apart. The
# cue is in rows and columns 0 and 1. A window of 25 pixels that holds one of its pixels ends at row
# and column 25 at the latest, and the shapes start at 26.
_FAR = IMAGE_SIZE - SHAPE_SIZE
SLOTS = tuple((row, _FAR) for row in (1, 9, 17, 25)) + tuple((_FAR, col) for col in (1, 9, 17))
# Slots for shapes at a given distance from the cue: five that fill one column.
COLUMN_OF_SLOTS = tuple((row, _FAR) for row in (0, 6, 13, 20, 26))
DISTANCES = range(1, _FAR - CUE_SIZE + 1)

Corners = tuple[tuple[int, int], ...]


def make_lookup(
    train_size: int = 10_000,
    test_size: int = 2_000,
    noise: float = 0.04,
    val_size: int = 0,
    data_seed: int = 0,
    distance: int | None = None,
) -> Dataset:
    """Make 32x32 images whose class is the shape that has the color of a distant cue; 8 classes.

    The cue is a 2x2 patch in the top left corner. Five of eight 6x6 shapes, in five of eight
    colors, are drawn in five of seven slots along the right and bottom edges. The cue has one of
    these five colors, each equally likely, and the class is the shape in that color. ``noise`` is
    the standard deviation of the Gaussian noise on every pixel value, on a scale where white is 1.
    Training and test images come from different generators seeded by ``data_seed``;
    ``val_size`` > 0 holds out that many training images and evaluates on them. A crop or a cutout
    may remove the cue.

    No 25x25 window (a ResNet-8's receptive field) holds a pixel of the cue and a pixel of a shape.
    A network that adds up what such windows show can therefore only compute
    argmax_s [a_s(cue color) + D_s(shapes, colors, slots)], which is right in at most 64.2 %, proven
    for any a and D (``python -m benchmarks.lookup_bound``); guessing one of the shapes shown gives
    20 %.

    With ``distance`` d the cue is a stripe instead, two pixels wide and as high as the image, and
    the five shapes fill a column along the right edge in random order. Between the two are d
    columns of background, 1 to 24: all shapes are equally far from the cue, and nothing else
    changes with d. The proven ceiling then holds for windows of up to d + 1 pixels.

    Raises ValueError for sizes, noise or distance out of range.
    """
    _check(train_size, test_size, noise, distance)
    check_val_size(val_size, train_size)

    train = _draw(train_size, noise, distance, seeded_generator("lookup", "train", data_seed))
    mean, std = _mean_and_std(train.pixels)
    split = ("val", val_size) if val_size else ("test", test_size)
    if val_size:
        train, evaluation = hold_out(train, val_size)
    else:
        generator = seeded_generator("lookup", "test", data_seed)
        evaluation = _draw(test_size, noise, distance, generator)
    return Dataset(
        name="lookup",
        train=train,
        evaluation=evaluation,
        evaluated_on=split[0],
        num_classes=len(SHAPES),
        class_names=tuple(SHAPES),
        mean=mean,
        std=std,
        # Everything they are drawn from; pixel noise may differ by one level between machines.
        digest=digest_of(
            f"{part}" for part in ("lookup", train_size, float(noise), distance, data_seed, *split)
        ),
    )


def geometry(distance: int | None) -> tuple[Corners, Corners]:
    """Return the top left pixels of the shapes' slots and of the 2x2 squares that form the cue."""
    if distance is None:
        return SLOTS, ((0, 0),)
    column = _FAR - distance - CUE_SIZE
    return COLUMN_OF_SLOTS, tuple((row, column) for row in range(0, IMAGE_SIZE, CUE_SIZE))


def _check(train_size: int, test_size: int, noise: float, distance: int | None) -> None:
    for name, size in (("train_size", train_size), ("test_size", test_size)):
        if size < 1:
            raise ValueError(f"{name}={size} is below 1; give the number of images to generate")
    if not 0 <= noise <= 1:
        raise ValueError(f"noise={noise} lies outside 0 to 1; white is 1")
    if distance is not None and distance not in DISTANCES:
        raise ValueError(
            f"distance={distance} lies outside {DISTANCES[0]} to {DISTANCES[-1]} pixels, what fits "
            "between cue and shapes; null is the task with the cue in a corner"
        )


def _draw(number: int, noise: float, distance: int | None, generator: torch.Generator) -> Images:
    slots, cue = geometry(distance)
    shapes = _distinct(number, len(SHAPES), generator)
    colors = _distinct(number, len(COLORS), generator)
    places = _pixels_of(slots, SHAPE_SIZE)[_distinct(number, len(slots), generator)]
    cued = torch.randint(SHAPES_SHOWN, (number, 1), generator=generator)
    clean = _paint(shapes, colors, places, _pixels_of(cue, CUE_SIZE), colors.gather(1, cued))
    noisy = torch.empty(clean.shape).normal_(0.0, 255 * noise, generator=generator).add_(clean)
    return Images(noisy.round_().clamp_(0, 255).byte(), shapes.gather(1, cued)[:, 0])


def _distinct(number: int, kinds: int, generator: torch.Generator) -> Tensor:
    """(number, SHAPES_SHOWN): each row holds distinct integers below ``kinds`` in random order."""
    return torch.rand(number, kinds, generator=generator).argsort(1)[:, :SHAPES_SHOWN]


def _paint(
    shapes: Tensor, colors: Tensor, places: Tensor, cue: Tensor, cue_color: Tensor
) -> Tensor:
    """Draw images (N, 32, 32, 3) uint8 without noise.

    Shape i, in color i, is drawn on the pixels ``places[:, i]``, and ``cue_color`` (N, 1) fills
    the pixels ``cue``; all pixels are flat indices.
    """
    number, background = len(shapes), len(COLORS)
    inked = _patterns()[shapes]
    ink = torch.where(inked, colors[:, :, None], background)
    canvas = torch.full((number, IMAGE_SIZE * IMAGE_SIZE), background)
    canvas.scatter_(1, places.flatten(1), ink.flatten(1))
    canvas[:, cue.flatten()] = cue_color
    palette = torch.tensor([*COLORS.values(), BACKGROUND], dtype=torch.uint8)
    return palette[canvas].view(number, IMAGE_SIZE, IMAGE_SIZE, 3)


def _patterns() -> Tensor:
    """(8, 36) bool: which pixels each shape sets, in row-major order."""
    return torch.tensor(
        [[pixel == "#" for row in rows for pixel in row] for rows in SHAPES.values()]
    )


def _pixels_of(corners: Corners, side: int) -> Tensor:
    """(len(corners), side * side): flat indices of the pixels of the square at each corner."""
    steps = torch.arange(side)
    square = (steps[:, None] * IMAGE_SIZE + steps).flatten()
    return torch.tensor([row * IMAGE_SIZE + col for row, col in corners])[:, None] + square


def _mean_and_std(pixels: Tensor) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and deviation per channel over all pixels, on a scale where white is 1."""
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in pixels.flatten(0, 2).unbind(1):
        share = torch.bincount(channel, minlength=256) / channel.numel()
        mean = (share * levels).sum()
        means.append(mean.item())
        deviations.append((share * (levels - mean) ** 2).sum().sqrt().item())
    return (means[0], means[1], means[2]), (deviations[0], deviations[1], deviations[2])
