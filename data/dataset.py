"""The types that every data set is made of, and the split that holds images out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Labelled RGB images: ``pixels`` (N, H, W, 3) uint8 and ``labels`` (N,) int64."""

    pixels: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        assert self.pixels.dtype == torch.uint8, self.pixels.dtype
        assert self.labels.dtype == torch.int64, self.labels.dtype
        assert self.pixels.ndim == 4, self.pixels.shape
        assert self.pixels.shape[3] == 3, self.pixels.shape
        assert self.labels.shape == self.pixels.shape[:1], (self.labels.shape, self.pixels.shape)

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device | str) -> Images:
        """The same images with both tensors on ``device``."""
        return Images(self.pixels.to(device), self.labels.to(device))

    def part(self, index: int, parts: int) -> Images:
        """Every ``parts``-th image from ``index`` on: for index 0 to parts - 1 each one once."""
        return Images(self.pixels[index::parts], self.labels[index::parts])


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image, in the order crop, flip, cutout.

    ``crop_pad``: pixels of zeros added on each side before a random crop back to the image's size.
    ``flip``: mirror left to right with probability 1/2.
    ``cutout``: side in pixels of a square set to the mean colour; its centre is uniform over the
    image, so that it may reach beyond the edge. 0 or False turns each off.

    Raises ValueError if ``crop_pad`` or ``cutout`` is negative.
    """

    crop_pad: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name, value in (("crop_pad", self.crop_pad), ("cutout", self.cutout)):
            if value < 0:
                raise ValueError(f"{name}={value} is negative; give 0 (off) or a number of pixels")

    def check_fits(self, height: int, width: int) -> None:
        """Raises ValueError if a crop could miss the image or the cutout is larger than it."""
        side = min(height, width)
        if self.crop_pad >= side:
            raise ValueError(
                f"crop_pad={self.crop_pad} could crop away a whole image of {height}x{width}; "
                f"give less than {side}"
            )
        if self.cutout > side:
            raise ValueError(
                f"cutout={self.cutout} is larger than an image of {height}x{width}; "
                f"give at most {side}"
            )


@dataclass(frozen=True)
class Dataset:
    """A training set, the images it is evaluated on, and what belongs to them.

    ``evaluated_on`` is "test" or "held-out" (a part of the training set). ``mean`` and ``std`` are
    those of the training pixels per channel, on the scale where white is 1.
    """

    name: str
    train: Images
    evaluation: Images
    evaluated_on: str
    num_classes: int
    class_names: tuple[str, ...]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augmentation: Augmentation

    def __post_init__(self) -> None:
        assert self.evaluated_on in ("test", "held-out"), self.evaluated_on
        assert len(self.class_names) == self.num_classes, (self.class_names, self.num_classes)
        assert self.train.pixels.shape[1:] == self.evaluation.pixels.shape[1:]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.pixels.shape[1], self.train.pixels.shape[2]

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with all its images on ``device``."""
        return replace(self, train=self.train.to(device), evaluation=self.evaluation.to(device))


def seeded_generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by the first 4 bytes of BLAKE2b of the parts joined by ":".

    Four bytes, because the CPU generator drops the upper half of a 64-bit seed.
    """
    digest = hashlib.blake2b(":".join(map(str, parts)).encode(), digest_size=4).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def check_val_size(val_size: int, train_size: int) -> None:
    """Raises ValueError unless ``val_size`` images can be held out of ``train_size``."""
    if not 0 <= val_size < train_size:
        raise ValueError(
            f"val_size={val_size} cannot be held out of {train_size} training images; "
            f"give 0 (evaluate on the test set) to {train_size - 1}"
        )


def hold_out(train: Images, size: int) -> tuple[Images, Images]:
    """Splits ``train`` into the rest and ``size`` random images, both in their first order.

    Which images are held out depends on ``len(train)`` and ``size`` alone, so that runs with
    different seeds are evaluated on the same images. Raises ValueError if ``size`` is negative or
    leaves nothing to train on.
    """
    check_val_size(size, len(train))
    order = torch.randperm(len(train), generator=seeded_generator("hold-out"))
    order = order.to(train.labels.device)
    held, rest = order[:size].sort().values, order[size:].sort().values
    return (
        Images(train.pixels[rest], train.labels[rest]),
        Images(train.pixels[held], train.labels[held]),
    )
