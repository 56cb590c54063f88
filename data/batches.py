"""Batches of normalized images, each image augmented on the device that holds the data set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from data import mixing
from data.augmentation import Augmentation, Draws
from data.dataset import Images, seeded_generator

Color = Sequence[float]  # of red, green and blue


def check_batch_size(batch_size: int, train_size: int) -> None:
    """Raise ValueError unless ``batch_size`` is from 1 to ``train_size``."""
    if not 1 <= batch_size <= train_size:
        raise ValueError(
            f"batch_size={batch_size} does not fit {train_size} training images; "
            f"give 1 to {train_size}"
        )


class Batches:
    """Shuffled and augmented training batches, made on the device that holds ``images``.

    ``mean`` and ``std`` are per channel, on a scale where white is 1. ``len()`` is the number of
    full batches in an epoch; an incomplete last batch is dropped.

    All random draws of an epoch are made on the CPU, for all its samples, from generators seeded by
    ``seed`` and the epoch. They are therefore the same on every device and do not depend on the
    batch size or on which augmentations are on, and an epoch can be resumed at batch ``start``
    without any saved state.

    With ``shard=(rank, world_size)`` only this rank's shard of each batch is made,
    batch_size / world_size images. Concatenated in rank order, the shards are the batch that a
    single process makes. Each of the ``micro_batches`` of a batch is sharded separately, so that
    this holds for each of them.

    An epoch has each image once or, if ``balanced``, each class equally often, drawn from a
    separate generator (see `balanced_order`).

    Raises ValueError if ``batch_size`` is below 1, above the number of images or not divisible by
    world_size * micro_batches, if the augmentation does not fit the images, or if it mixes samples
    and ``num_classes`` is missing.
    """

    def __init__(
        self,
        images: Images,
        batch_size: int,
        augmentation: Augmentation,
        mean: Color,
        std: Color,
        seed: int,
        shard: tuple[int, int] = (0, 1),
        micro_batches: int = 1,
        num_classes: int = 0,
        balanced: bool = False,
    ) -> None:
        check_batch_size(batch_size, len(images))
        if batch_size % (shard[1] * micro_batches):
            raise ValueError(
                f"batch_size={batch_size} must be divisible by world_size * micro_batches = "
                f"{shard[1]} * {micro_batches}"
            )
        if augmentation.mixes and num_classes < 1:
            raise ValueError("mixup and cutmix need num_classes: labels become weights of them")
        augmentation.check_fits(images.pixels.shape[1], images.pixels.shape[2])
        self.images = images
        self.batch_size = batch_size
        self.augmentation = augmentation
        self.seed = seed
        self.shard = shard
        self.micro_batches = micro_batches
        self.num_classes = num_classes
        self._balanced_labels = images.labels.cpu() if balanced else None
        self._scale, self._shift = _scale_and_shift(mean, std, images.pixels.device)

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch from batch ``start`` on; epochs and batches count from 0.

        A batch is images (B, 3, H, W), float32 in channels_last memory format, and labels (B,) or,
        with mixup or CutMix, class weights (B, num_classes).
        Raises ValueError, before the first batch, unless ``start`` is from 0 to ``len(self)``.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start={start} is outside the epoch; give 0 to {len(self)}")
        return self._iterate(epoch, start)

    def _iterate(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        number, height, width, _ = self.images.pixels.shape
        order = None
        if self._balanced_labels is not None:
            own = seeded_generator("balanced", self.seed, epoch)
            order = balanced_order(self._balanced_labels, own)
        draws = self.augmentation.draw(number, (height, width), self.seed, epoch, order)
        rank, world_size = self.shard
        positions = torch.arange(self.batch_size)
        positions = positions.view(self.micro_batches, world_size, -1)[:, rank].flatten()
        for batch in range(start, len(self)):
            yield self._make(draws, batch * self.batch_size + positions)

    def _make(self, draws: Draws, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the samples at these positions in the epoch."""
        if self.augmentation.mixes:
            positions = torch.cat([positions, draws["partner"][positions]])
        draws = {name: drawn[positions] for name, drawn in draws.items()}
        index = draws["order"].to(self.images.pixels.device, non_blocking=True)
        pixels = self.augmentation.change_pixels(self.images.pixels[index], draws)
        images, labels = _normalize(pixels, self._scale, self._shift), self.images.labels[index]
        self.augmentation.change_images(images, draws)
        if self.augmentation.mixes:
            return mixing.mix(images, labels, draws, self.num_classes)
        return images, labels


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return N shuffled indices into ``labels`` (N,) with each class equally often.

    If N is not a multiple of the number of classes that have images, random classes are drawn once
    more. No image of a class is drawn a second time before all of them have been drawn.
    """
    classes = labels.unique()
    quotas = torch.full((len(classes),), len(labels) // len(classes))
    quotas[torch.randperm(len(classes), generator=generator)[: len(labels) % len(classes)]] += 1
    drawn = []
    for label, quota in zip(classes, quotas.tolist(), strict=True):
        members = (labels == label).nonzero().flatten()
        rounds = -(-quota // len(members))
        orders = [torch.randperm(len(members), generator=generator) for _ in range(rounds)]
        drawn.append(members[torch.cat(orders)[:quota]] if orders else members[:0])
    order = torch.cat(drawn)
    return order[torch.randperm(len(order), generator=generator)]


def evaluation_batches(
    images: Images, batch_size: int, mean: Color, std: Color
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all ``images`` in order, normalized, not augmented; the last batch may be smaller.

    Batches are those of ``Batches.epoch``, with labels (B,). Raises ValueError, before the first
    batch, if ``batch_size`` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is below 1; give 1 or more")
    scale, shift = _scale_and_shift(mean, std, images.pixels.device)
    return (
        (_normalize(pixels, scale, shift), labels)
        for pixels, labels in zip(
            images.pixels.split(batch_size), images.labels.split(batch_size), strict=True
        )
    )


def _scale_and_shift(mean: Color, std: Color, device: torch.device) -> tuple[Tensor, Tensor]:
    means, deviations = (torch.tensor(v, dtype=torch.float64) for v in (mean, std))
    scale, shift = 1 / (255 * deviations), -means / deviations
    return scale.float().to(device), shift.float().to(device)


def _normalize(pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    images = pixels.float().mul_(scale).add_(shift)
    # A (B, 3, H, W) view of (B, H, W, 3) memory is what torch calls channels_last.
    return images.permute(0, 3, 1, 2)
