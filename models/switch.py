"""The switch of the comparison: what a residual block has beside its convolutions.

`Plain` nothing, `AA` an attention-augmented first convolution (Bello et al., ICCV 2019), `SE`
squeeze-and-excitation (Hu et al., CVPR 2018), `GE` gather-excite without parameters and with
global extent (Hu et al., NeurIPS 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aaconv import AugmentedConv

POSITIONS = ("relative", "none", "sine", "coord")


@dataclass(frozen=True)
class Plain:
    """Nothing: the baseline."""


@dataclass(frozen=True)
class AA:
    """Attention-augmented convolutions.

    Attributes:
        dk: key channels of a block, as channels (int) or as a fraction of its output channels
            (float, the paper's kappa).
        dv: value channels likewise (upsilon), a fraction being at most 1.
        Nh: heads. Fractions are rounded to a multiple of it, at least one channel per head.
        min_dkh: least key channels per head that a fraction may give; an int ``dk`` is taken
            as it is.
        position: how attention knows where a pixel is: ``relative`` (learned, the paper's own),
            ``none``, ``sine`` or ``coord`` (see `aaconv.AugmentedConv`'s ``absolute``).
        stages: the stages, counted from 1, whose blocks are augmented.
        backend: how attention is computed, see `aaconv.attention_2d`.
    """

    dk: int | float
    dv: int | float
    Nh: int
    min_dkh: int
    position: str
    stages: Sequence[int]
    backend: str = "auto"

    def channels(self, out_channels: int) -> tuple[int, int]:
        """dk and dv of a block with so many output channels."""
        return (
            _channels(self.dk, out_channels, self.Nh, self.min_dkh),
            _channels(self.dv, out_channels, self.Nh, 1),
        )


@dataclass(frozen=True)
class SE:
    """Squeeze-and-excitation at the end of every residual branch, C/ratio channels inside."""

    ratio: int


@dataclass(frozen=True)
class GE:
    """Gather-excite without parameters, global extent, at the end of every residual branch."""


Attention = Plain | AA | SE | GE


def _channels(amount: int | float, out_channels: int, Nh: int, least_per_head: int) -> int:
    if isinstance(amount, int):
        return amount
    return Nh * max(least_per_head, round(amount * out_channels / Nh))


def check_switch(attention: Attention, stages: int) -> None:
    """Raise ValueError for settings that fit no network of so many stages."""
    if isinstance(attention, SE) and attention.ratio < 1:
        raise ValueError(f"attention.ratio={attention.ratio} must be at least 1")
    if not isinstance(attention, AA):
        return
    if attention.Nh < 1:
        raise ValueError(f"attention.Nh={attention.Nh} must be at least 1")
    if attention.min_dkh < 1:
        raise ValueError(f"attention.min_dkh={attention.min_dkh} must be at least 1")
    if attention.position not in POSITIONS:
        raise ValueError(
            f"attention.position={attention.position} is unknown; "
            f"choose one of {', '.join(POSITIONS)}"
        )
    for name, amount in (("dk", attention.dk), ("dv", attention.dv)):
        if isinstance(amount, float) and not 0 < amount < float("inf"):
            raise ValueError(f"attention.{name}={amount} must be a positive fraction, or an int")
    if isinstance(attention.dv, float) and attention.dv > 1:
        raise ValueError(f"attention.dv={attention.dv} as a fraction must not exceed 1")
    if not attention.stages or not set(attention.stages) <= set(range(1, stages + 1)):
        raise ValueError(
            f"attention.stages={list(attention.stages)} must name some of the network's stages "
            f"1 to {stages}; for none of them use attention=none"
        )


def first_convolution(
    in_channels: int,
    out_channels: int,
    stride: int,
    size: tuple[int, int],
    stage: int,
    attention: Attention,
) -> nn.Module:
    """The 3x3 convolution that ``attention`` may augment, its output being of ``size`` (H, W).

    Raises:
        ValueError: dk, dv and Nh do not fit ``out_channels``; the message names the stage.
    """
    if not isinstance(attention, AA) or stage not in attention.stages:
        return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
    dk, dv = attention.channels(out_channels)
    try:
        return AugmentedConv(
            in_channels,
            out_channels,
            kernel_size=3,
            dk=dk,
            dv=dv,
            Nh=attention.Nh,
            shape=size,
            relative=attention.position == "relative",
            absolute="none" if attention.position == "relative" else attention.position,
            stride=stride,
            bias=False,
            backend=attention.backend,
        )
    except ValueError as error:
        raise ValueError(f"attention in stage {stage}: {error}") from error


def recalibration(channels: int, attention: Attention) -> nn.Module:
    """What `SE` and `GE` put at the end of a residual branch; the identity for the others.

    Raises:
        ValueError: the ratio of `SE` leaves no channel inside.
    """
    if isinstance(attention, SE):
        return SqueezeExcite(channels, attention.ratio)
    return GatherExcite() if isinstance(attention, GE) else nn.Identity()


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channel means (Hu et al., CVPR 2018).

    ``x * sigmoid(W2 relu(W1 mean(x)))`` with W1 (C/ratio, C) and W2 (C, C/ratio), no biases.
    (B, C, H, W) to the same. Raises ValueError if C/ratio is below 1.
    """

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        if channels // ratio < 1:
            raise ValueError(f"attention.ratio={ratio} leaves nothing of {channels} channels")
        self.squeeze = nn.Conv2d(channels, channels // ratio, 1, bias=False)
        self.excite = nn.Conv2d(channels // ratio, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(mean))))


class GatherExcite(nn.Module):
    """Scale each channel by the sigmoid of its mean: GE-theta-minus, global (Hu et al. 2018).

    (B, C, H, W) to the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True))
