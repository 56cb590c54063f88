"""The kinds of attention that the residual blocks can have.

`NoAttention` is the baseline. `AA` is an attention-augmented first convolution (Bello et al.,
ICCV 2019), `SE` squeeze-and-excitation (Hu et al., CVPR 2018), `GE` gather-excite without
parameters and with global extent (Hu et al., NeurIPS 2018).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aaconv import AugmentedConv
from aaconv.functional import check_backend_name
from aaconv.ratios import channels, check_amount

POSITIONS = ("relative", "none", "sine", "coord")


@dataclass(frozen=True)
class NoAttention:
    """Plain convolutions: the baseline."""

    name: ClassVar[str] = "none"


@dataclass(frozen=True)
class AA:
    """An attention-augmented first convolution.

    Attributes:
        dk: key channels of a block, as a number (int) or as a fraction of its output channels
            (float, the paper's kappa), which is at most 2.
        dv: value channels in the same way (upsilon); a fraction is at most 1.
        Nh: number of heads. Fractions are rounded to a multiple of it, at least one channel per
            head.
        min_dkh: minimum key channels per head where ``dk`` is a fraction; an int ``dk`` is used
            as it is.
        position: the encoding of positions: ``relative`` (learned, as in the paper), ``none``,
            ``sine`` or ``coord`` (see ``absolute`` of `aaconv.AugmentedConv`).
        stages: the stages, counted from 1, whose blocks are augmented.
        backend: how attention is computed, see `aaconv.attention_2d`.
    """

    name: ClassVar[str] = "aa"

    dk: int | float
    dv: int | float
    Nh: int
    min_dkh: int
    position: str
    stages: Sequence[int]
    backend: str = "auto"

    def channels(self, out_channels: int) -> tuple[int, int]:
        """dk and dv of a block with ``out_channels`` output channels."""
        return (
            channels(self.dk, out_channels, self.Nh, self.min_dkh),
            channels(self.dv, out_channels, self.Nh),
        )


@dataclass(frozen=True)
class SE:
    """Squeeze-and-excitation at the end of every residual branch.

    Attributes:
        ratio: C / ratio is the number of hidden channels, see `SqueezeExcite`.
    """

    name: ClassVar[str] = "se"
    ratio: int


@dataclass(frozen=True)
class GE:
    """Gather-excite at the end of every residual branch, see `GatherExcite`."""

    name: ClassVar[str] = "ge"


Attention = NoAttention | AA | SE | GE


def check_attention(attention: Attention, stages: int) -> None:
    """Raise ValueError for settings that no network of ``stages`` stages can have."""
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
    check_backend_name(attention.backend)
    check_amount("attention.dk", attention.dk, attention.Nh)
    check_amount("attention.dv", attention.dv, attention.Nh)
    if not attention.stages or not set(attention.stages) <= set(range(1, stages + 1)):
        raise ValueError(
            f"attention.stages={list(attention.stages)} must be some of the network's stages "
            f"1 to {stages}; use attention=none to augment no stage"
        )


def first_convolution(
    in_channels: int,
    out_channels: int,
    stride: int,
    size: tuple[int, int],
    stage: int,
    attention: Attention,
) -> nn.Module:
    """The first 3x3 convolution of a block, augmented if ``attention`` says so for ``stage``.

    ``size`` is (H, W) of its output.

    Raises:
        ValueError: `AugmentedConv` rejects the arguments; the message names the stage.
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
    """The module that ends a residual branch: a gate for `SE` and `GE`, else the identity.

    Raises:
        ValueError: the ratio of `SE` is larger than ``channels``.
    """
    if isinstance(attention, SE):
        return SqueezeExcite(channels, attention.ratio)
    return GatherExcite() if isinstance(attention, GE) else nn.Identity()


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channel means (Hu et al., CVPR 2018).

    ``x * sigmoid(W2 relu(W1 mean(x)))`` with W1 (C // ratio, C) and W2 (C, C // ratio), without
    biases. Input and output are (B, C, H, W).

    Raises:
        ValueError: ``ratio`` is larger than ``channels``.
    """

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        if channels // ratio < 1:
            raise ValueError(
                f"attention.ratio={ratio} leaves no hidden channel in a block of {channels} "
                "channels; use a smaller one"
            )
        self.squeeze = nn.Conv2d(channels, channels // ratio, 1, bias=False)
        self.excite = nn.Conv2d(channels // ratio, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(dim=(2, 3), keepdim=True)
        return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(mean))))


class GatherExcite(nn.Module):
    """Scale each channel by the sigmoid of its mean over the map (Hu et al., NeurIPS 2018).

    GE-theta-minus with global extent, without parameters. Input and output are (B, C, H, W).
    """

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x.mean(dim=(2, 3), keepdim=True))
