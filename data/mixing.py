"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019): a sample and a partner.

The partner is another sample of the epoch, wherever its own batch is, so that what a sample becomes
depends neither on the batch size nor on the number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.dataset import seeded_generator
from data.erasing import inside


def draw(
    mixup: float, cutmix: float, number: int, size: tuple[int, int], seed: int, epoch: int
) -> dict[str, Tensor]:
    """What each of ``number`` samples is mixed with, and how.

    ``mixup`` and ``cutmix`` are the parameter of the beta distribution that the share of the sample
    comes from, 0 turns one off; with both on each is taken with probability 1/2. Returns "partner"
    (number,), a position in the epoch, each of them once; "box" (number, 4), the first and the last
    row, the first and the last column, the latter excluded, that are the partner's alone; "outside"
    (number,), the sample's part of the other pixels; and "share" (number,), its part of the label.
    """
    height, width = size
    order = torch.randperm(number, generator=seeded_generator("partner", seed, epoch))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # one circle through all: nobody is its own partner

    outside = _beta(mixup or 1.0, number, seeded_generator("mixup", seed, epoch))
    generator = seeded_generator("cutmix", seed, epoch)
    uncut = _beta(cutmix or 1.0, number, generator)
    sides = []
    for side in (height, width):
        center = torch.randint(side, (number,), generator=generator)
        half = ((1 - uncut).sqrt() * side / 2).long()
        sides += [(center - half).clamp(min=0), (center + half).clamp(max=side)]
    box = torch.stack(sides, 1)

    coin = torch.randint(2, (number,), generator=seeded_generator("mixup or cutmix", seed, epoch))
    cut = coin.bool() if mixup and cutmix else torch.full((number,), bool(cutmix))
    box, outside = box * cut[:, None], outside.masked_fill(cut, 1)
    area = (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2])
    share = outside * (1 - area / (height * width))
    return {"partner": partner, "box": box, "outside": outside.float(), "share": share.float()}


def _beta(alpha: float, number: int, generator: torch.Generator) -> Tensor:
    """Samples of Beta(alpha, alpha), float64, always from two numbers each.

    A variable t of Student's with 2 alpha degrees of freedom, by Bailey's polar method, has
    (1 + t / sqrt(2 alpha + t^2)) / 2 so distributed; what follows is that without 2 alpha.
    """
    radius, turn = torch.rand(2, number, dtype=torch.float64, generator=generator)
    t = (-radius.log() / alpha).expm1().sqrt() * (2 * torch.pi * turn).cos()
    return (1 + t.sign() / (1 + t**-2).sqrt()) / 2


def mix(
    images: Tensor, labels: Tensor, draws: dict[str, Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """B samples of the first half of ``images`` (2B, 3, H, W), mixed with those of the second.

    Also of their ``labels`` (2B,), which become weights of the classes, (B, num_classes) float32.
    ``images`` is overwritten. ``draws`` are those of `draw` for the samples.
    """
    own, partners = images.chunk(2)
    number, device = len(own), images.device
    box, outside, share = (
        draws[name][:number].to(device, non_blocking=True) for name in ("box", "outside", "share")
    )
    keep = outside[:, None, None, None] * ~inside(box, images.shape[2], images.shape[3])
    # Two roundings each: one operation for all would round differently from place to place.
    mixed = own.mul_(keep).add_(partners.mul_(1 - keep))
    classes = torch.arange(num_classes, device=device)
    of_own, of_partners = (labels[:, None] == classes).float().chunk(2)
    return mixed, share[:, None] * of_own + (1 - share[:, None]) * of_partners
