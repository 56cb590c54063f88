"""Augmentation of training images: its options, the random draws of an epoch, and their effect.

All draws of an epoch are made on the CPU at once, as tensors whose entry k belongs to sample k;
turning one augmentation on does not change the draws of another. Pixels stay on their device.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from data import erasing, mixing, policies
from data.dataset import seeded_generator

Draws = dict[str, Tensor]
# Minimum and maximum of each number; None is no maximum.
_RANGES: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(("crop_pad", "cutout", "mixup", "cutmix"), (0, None)),
    "rand_ops": (1, None),
    "rand_magnitude": (0, policies.MAX_MAGNITUDE),
    "erasing": (0, 1),
}


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image: crop, flip, policy, cutout, erasing and mixing, in order.

    ``crop_pad``: pixels padded on each side before a random crop to the original size.
    ``flip``: whether to mirror left to right with probability 1/2; "alternating" mirrors each
    image in every other epoch, and a random half of the images in the first.
    ``cutout``: side in pixels of a square that is set to the mean color; its center is uniform
    over the image, so it may extend past the edge. 0 turns crop and cutout off.
    ``padding``: "zeros", or "reflect" for the image mirrored at its edge.
    ``policy``: "trivial" (TrivialAugment), "rand" (RandAugment: ``rand_ops`` operations at
    ``rand_magnitude``), "auto" (AutoAugment's for CIFAR-10) or None.
    ``erasing``: probability that a random rectangle is set to the mean color.
    ``mixup``, ``cutmix``: alpha of the Beta(alpha, alpha) distribution of the share that a sample
    keeps when it is mixed with another; 0 is off. With both on, each has probability 1/2.

    Raises ValueError for any other value.
    """

    crop_pad: int = 0
    flip: bool | str = False
    cutout: int = 0
    padding: str = "zeros"
    policy: str | None = None
    rand_ops: int = 2
    rand_magnitude: int = 9
    erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self) -> None:
        for name, (least, most) in _RANGES.items():
            value = getattr(self, name)
            if not least <= value <= (math.inf if most is None else most):
                words = f"{least} or more" if most is None else f"{least} to {most}"
                raise ValueError(f"augmentation.{name}={value} must be {words}")
        _check_choice("flip", self.flip, (False, True, "alternating"))
        _check_choice("padding", self.padding, ("zeros", "reflect"))
        _check_choice("policy", self.policy, (None, *policies.POLICIES))
        if self.padding != "zeros" and not self.crop_pad:
            raise ValueError(
                f"augmentation.padding={self.padding} needs augmentation.crop_pad above 0"
            )

    @property
    def mixes(self) -> bool:
        """Whether mixup or CutMix is on, which turns labels into class weights."""
        return bool(self.mixup or self.cutmix)

    def check_fits(self, height: int, width: int) -> None:
        """Raise ValueError if a crop could miss the whole image or the cutout exceeds it."""
        side = min(height, width)
        if self.crop_pad >= side:
            raise ValueError(
                f"augmentation.crop_pad={self.crop_pad} could crop away a whole image of "
                f"{height}x{width}; give less than {side}"
            )
        if self.cutout > side:
            raise ValueError(
                f"augmentation.cutout={self.cutout} is larger than an image of {height}x{width}; "
                f"give at most {side}"
            )

    def draw(
        self,
        number: int,
        size: tuple[int, int],
        seed: int,
        epoch: int,
        order: Tensor | None = None,
    ) -> Draws:
        """Return the draws of an epoch, by name, for ``number`` images (height, width) ``size``.

        ``order``: indices of the images in the epoch's order; by default a random permutation.
        """
        generator = seeded_generator("epoch", seed, epoch)

        def integers(stop: int) -> Tensor:
            return torch.randint(stop, (number,), generator=generator)

        # These come from one generator and are drawn even if unused: turning one augmentation on
        # must not change the draws of the others. Those below have a generator each.
        draws = {
            "order": torch.randperm(number, generator=generator),
            "top": integers(2 * self.crop_pad + 1),
            "left": integers(2 * self.crop_pad + 1),
            "mirrored": integers(2).bool(),
            "cut_row": integers(size[0]),
            "cut_column": integers(size[1]),
        }
        if order is not None:
            draws["order"] = order
        if self.flip == "alternating":
            # Drawn per image, not per sample of the epoch, and from the seed alone.
            generator = seeded_generator("alternating flip", seed)
            side = torch.randint(2, (number,), generator=generator)[draws["order"]]
            draws["mirrored"] = (side + epoch) % 2 == 1
        if self.policy:
            generator = seeded_generator(self.policy, seed, epoch)
            draws |= policies.draw(
                self.policy, number, size, generator, self.rand_ops, self.rand_magnitude
            )
        if self.erasing:
            generator = seeded_generator("erasing", seed, epoch)
            draws |= erasing.draw(self.erasing, number, size, generator)
        if self.mixes:
            draws |= mixing.draw(self.mixup, self.cutmix, number, size, seed, epoch)
        return draws

    def change_pixels(self, pixels: Tensor, draws: Draws) -> Tensor:
        """Return ``pixels`` (B, H, W, 3) uint8 after the crop, flip and policy of ``draws``."""
        if self.crop_pad or self.flip:
            pixels = _crop_and_flip(pixels, draws, self)
        if self.policy:
            pixels = policies.apply(pixels, draws["operations"], draws["magnitudes"])
        return pixels

    def change_images(self, images: Tensor, draws: Draws) -> None:
        """Set parts of normalized ``images`` (B, 3, H, W) to the mean color, which is 0."""
        boxes = []
        if self.cutout:
            boxes.append(erasing.cutout_boxes(draws["cut_row"], draws["cut_column"], self.cutout))
        if self.erasing:
            boxes.append(draws["erased"])
        for box in boxes:
            box = box.to(images.device, non_blocking=True)
            images.masked_fill_(erasing.inside(box, *images.shape[2:]), 0.0)


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        # As written in YAML.
        given, *words = (json.dumps(value).strip('"') for value in (value, *choices))
        known = f"{', '.join(words[:-1])} or {words[-1]}"
        raise ValueError(f"augmentation.{name}={given} is unknown; give {known}")


def _crop_and_flip(pixels: Tensor, draws: Draws, augmentation: Augmentation) -> Tensor:
    _, height, width, _ = pixels.shape
    device, pad = pixels.device, augmentation.crop_pad
    top, left, mirrored = (
        draws[name][:, None].to(device, non_blocking=True) for name in ("top", "left", "mirrored")
    )
    rows = torch.arange(height, device=device)[None]
    columns = torch.arange(width, device=device)[None]
    if augmentation.flip:
        columns = torch.where(mirrored, width - 1 - columns, columns)
    rows, columns = rows + top, columns + left
    if augmentation.padding == "reflect":
        rows, columns = _reflect(rows - pad, height), _reflect(columns - pad, width)
    elif pad:
        pixels = F.pad(pixels, (0, 0, pad, pad, pad, pad))
    return policies.pick(pixels, rows[:, :, None], columns[:, None, :])


def _reflect(index: Tensor, size: int) -> Tensor:
    """Reflect indices at 0 and ``size`` - 1; they exceed this range by less than ``size``."""
    return size - 1 - (size - 1 - index.abs()).abs()
