"""Mixup (Zhang et al., ICLR 2018) and CutMix (Yun et al., ICCV 2019): mix a sample and a partner.

The partner is another sample of the epoch, from any batch, so that the mixed sample depends neither
on the batch size nor on the number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from data.dataset import seeded_generator
from data.erasing import inside


def draw(
    mixup: float, cutmix: float, number: int, size: tuple[int, int], seed: int, epoch: int
) -> dict[str, Tensor]:
    """Draw what each of ``number`` samples is mixed with, and how.

    ``mixup`` and ``cutmix`` are alpha of the Beta(alpha, alpha) distribution of the sample's share;
    0 turns one off, and with both on, each has probability 1/2. Returns "partner" (number,), a
    permutation of the positions in the epoch; "box" (number, 4), top, bottom, left and right
    (bottom and right exclusive) of the rectangle that is the partner's alone; "outside" (number,),
    the sample's weight in the other pixels; and "share" (number,), its weight in the label.
    """
    height, width = size
    order = torch.randperm(number, generator=seeded_generator("partner", seed, epoch))
    partner = torch.empty_like(order)
    partner[order] = order.roll(1)  # one cycle through all samples: none is its own partner

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
    """Draw from Beta(alpha, alpha) in float64, always with two random numbers per sample.

    If t has Student's t-distribution with 2 alpha degrees of freedom (Bailey's polar method),
    (1 + t / sqrt(2 alpha + t^2)) / 2 has this one. Below, t is divided by sqrt(2 alpha).
    """
    radius, turn = torch.rand(2, number, dtype=torch.float64, generator=generator)
    t = (-radius.log() / alpha).expm1().sqrt() * (2 * torch.pi * turn).cos()
    return (1 + t.sign() / (1 + t**-2).sqrt()) / 2


def mix(
    images: Tensor, labels: Tensor, draws: dict[str, Tensor], num_classes: int
) -> tuple[Tensor, Tensor]:
    """Mix the B samples in the first half of ``images`` (2B, 3, H, W) with those in the second.

    Their ``labels`` (2B,) are mixed, too, and become class weights (B, num_classes) float32.
    ``images`` is overwritten. ``draws`` are those of `draw` for the samples.
    """
    own, partners = images.chunk(2)
    number, device = len(own), images.device
    box, outside, share = (
        draws[name][:number].to(device, non_blocking=True) for name in ("box", "outside", "share")
    )
    keep = outside[:, None, None, None] * ~inside(box, images.shape[2], images.shape[3])
    # Each operation rounds on its own: a fused one would round differently in different places.
    mixed = own.mul_(keep).add_(partners.mul_(1 - keep))
    classes = torch.arange(num_classes, device=device)
    of_own, of_partners = (labels[:, None] == classes).float().chunk(2)
    return mixed, share[:, None] * of_own + (1 - share[:, None]) * of_partners
