"""The options of the group `attention`: what residual blocks have in addition to convolutions.

`NoAttention` is the baseline, `AA` an attention-augmented first convolution (Bello et al., ICCV
2019), `SE` squeeze-and-excitation (Hu et al., CVPR 2018), `GE` gather-excite without parameters and
with global extent (Hu et al., NeurIPS 2018). `Removed`, `Pointwise` and `GlobalMean` are controls
for `AA`, with something simpler in place of its dv channels.

Each option consists of a class in this module, its settings in configs/schema.py, and a YAML file
in configs/attention. All other code uses the class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from aaconv import AugmentedConv
from aaconv.encodings import ABSOLUTE
from aaconv.functional import check_backend_name, check_dropout
from aaconv.modules import check_init
from aaconv.ratios import channels, check_amount

POSITIONS = ("relative", *ABSOLUTE)
BLOCKS = ("all", "unstrided", "last")


@dataclass(frozen=True)
class Place:
    """The place of a residual block in its network.

    Attributes:
        stage: number of its stage, from 1.
        block: its number in the stage, from 1 to ``blocks``.
        blocks: number of blocks in the stage.
        stride: stride of the block.
        size: (H, W) of its output.
        pool: ``pool`` of an `aaconv.AugmentedConv` there.
    """

    stage: int
    block: int
    blocks: int
    stride: int
    size: tuple[int, int]
    pool: int = 1


@dataclass(frozen=True)
class Attention:
    """Base class of the options; by default, plain convolutions as in the baseline.

    Attributes:
        name: name of the option in settings, summaries and files.
        label: name in reports, as in Table 1 of the paper.
    """

    name: ClassVar[str]
    label: ClassVar[str]

    def check(self, depths: Sequence[int]) -> None:
        """Raise ValueError for settings that do not fit a network with stages of these depths."""

    def first_convolution(self, in_channels: int, out_channels: int, place: Place) -> Convolution:
        """Return the first 3x3 convolution of a block, possibly with fewer than ``out_channels``.

        Raises:
            ValueError: if the settings do not fit this block; the message names the stage.
        """
        return nn.Conv2d(in_channels, out_channels, 3, place.stride, padding=1, bias=False)

    def recalibration(self, channels: int) -> nn.Module:
        """Return the module at the end of a residual branch.

        Raises:
            ValueError: if the settings do not fit this number of channels.
        """
        return nn.Identity()


@dataclass(frozen=True)
class NoAttention(Attention):
    """Plain convolutions: the baseline."""

    name: ClassVar[str] = "none"
    label: ClassVar[str] = "plain"


@dataclass(frozen=True)
class SE(Attention):
    """Squeeze-and-excitation at the end of every residual branch.

    Attributes:
        ratio: there are C // ratio hidden channels, see `SqueezeExcite`.
    """

    name: ClassVar[str] = "se"
    label: ClassVar[str] = "SE"
    ratio: int

    def check(self, depths: Sequence[int]) -> None:
        if self.ratio < 1:
            raise ValueError(f"attention.ratio={self.ratio} must be at least 1")

    def recalibration(self, channels: int) -> nn.Module:
        return SqueezeExcite(channels, self.ratio)


@dataclass(frozen=True)
class GE(Attention):
    """Gather-excite at the end of every residual branch, see `GatherExcite`."""

    name: ClassVar[str] = "ge"
    label: ClassVar[str] = "GE"

    def recalibration(self, channels: int) -> nn.Module:
        return GatherExcite()


@dataclass(frozen=True, kw_only=True)
class Replacing(Attention):
    """Base class of options that replace dv output channels of the first convolution of blocks.

    Attributes:
        dv: number of these channels (int), or their fraction of the block's output channels
            (float, the paper's upsilon), at most 1.
        Nh: number of heads; fractions are rounded to a multiple of it.
        stages: the stages, counted from 1, in which channels are replaced.
        blocks: the blocks of these stages: ``all``, ``unstrided`` (all but the one that halves the
            map), or ``last`` (the last of each stage).
    """

    dv: int | float
    Nh: int
    stages: Sequence[int]
    blocks: str = "all"

    def check(self, depths: Sequence[int]) -> None:
        if self.Nh < 1:
            raise ValueError(f"attention.Nh={self.Nh} must be at least 1")
        if self.dv == 0:
            raise ValueError("attention.dv=0 removes attention entirely; use attention=none")
        check_amount("attention.dv", self.dv)
        if self.blocks not in BLOCKS:
            raise ValueError(
                f"attention.blocks={self.blocks} is unknown; choose one of {', '.join(BLOCKS)}"
            )
        if not self.stages or not set(self.stages) <= set(range(1, len(depths) + 1)):
            raise ValueError(
                f"attention.stages={list(self.stages)} must be some of the network's stages "
                f"1 to {len(depths)}; use attention=none to augment no stage"
            )
        for stage in self.stages:
            if self.blocks == "unstrided" and stage > 1 and depths[stage - 1] == 1:
                raise ValueError(
                    f"attention.blocks=unstrided leaves no block of stage {stage}, whose only one "
                    f"has a stride; take it out of attention.stages={list(self.stages)}"
                )

    def dv_of(self, out_channels: int) -> int:
        """Return dv for a block with ``out_channels`` output channels."""
        return channels(self.dv, out_channels, self.Nh)

    def first_convolution(self, in_channels: int, out_channels: int, place: Place) -> Convolution:
        chosen = {"all": True, "unstrided": place.stride == 1, "last": place.block == place.blocks}
        if place.stage not in self.stages or not chosen[self.blocks]:
            return super().first_convolution(in_channels, out_channels, place)
        try:
            return self.replaced(in_channels, out_channels, place)
        except ValueError as error:
            raise ValueError(f"attention in stage {place.stage}: {error}") from error

    def replaced(self, in_channels: int, out_channels: int, place: Place) -> Convolution:
        """Return the first convolution of a block selected by ``stages`` and ``blocks``.

        Raises:
            ValueError: if the settings do not fit these numbers of channels.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class AA(Replacing):
    """An attention-augmented first convolution.

    Attributes:
        dk: key channels of a block, as a number (int) or as a fraction of its output channels
            (float, the paper's kappa), at most 2.
        min_dkh: minimum key channels per head if ``dk`` is a fraction; an int ``dk`` is used as is.
        position: position encoding: ``relative`` (learned, as in the paper), ``none``, ``sine`` or
            ``coord`` (see ``absolute`` in `aaconv.AugmentedConv`).
        bias: whether the convolution for queries, keys and values has a bias.
        init: initialization of attention's own convolutions, see `aaconv.AugmentedConv`.
        qk_norm: whether queries and keys are normalized, see `aaconv.AugmentedConv`.
        backend: how attention is computed, see `aaconv.attention_2d`.
        dropout: dropout probability of attention weights, see `aaconv.attention_2d`.
    """

    name: ClassVar[str] = "aa"
    label: ClassVar[str] = "AA"

    dk: int | float
    min_dkh: int
    position: str
    bias: bool = False
    init: str = "torch"
    qk_norm: bool = False
    backend: str = "auto"
    dropout: float = 0.0

    def check(self, depths: Sequence[int]) -> None:
        super().check(depths)
        if self.min_dkh < 1:
            raise ValueError(f"attention.min_dkh={self.min_dkh} must be at least 1")
        if self.position not in POSITIONS:
            raise ValueError(
                f"attention.position={self.position} is unknown; "
                f"choose one of {', '.join(POSITIONS)}"
            )
        check_backend_name(self.backend)
        check_dropout(self.dropout, self.backend)
        check_init(self.init)
        check_amount("attention.dk", self.dk)

    def dk_of(self, out_channels: int) -> int:
        """Return dk for a block with ``out_channels`` output channels."""
        return channels(self.dk, out_channels, self.Nh, self.min_dkh)

    def replaced(self, in_channels: int, out_channels: int, place: Place) -> Convolution:
        return AugmentedConv(
            in_channels,
            out_channels,
            kernel_size=3,
            dk=self.dk_of(out_channels),
            dv=self.dv_of(out_channels),
            Nh=self.Nh,
            shape=place.size,
            relative=self.position == "relative",
            absolute="none" if self.position == "relative" else self.position,
            stride=place.stride,
            pool=place.pool,
            bias=False,
            qkv_bias=self.bias,
            init=self.init,
            qk_norm=self.qk_norm,
            backend=self.backend,
            dropout=self.dropout,
        )


@dataclass(frozen=True, kw_only=True)
class Removed(Replacing):
    """Control: the dv channels are removed, which makes the block narrower inside."""

    name: ClassVar[str] = "removed"
    label: ClassVar[str] = "removed"

    def replaced(self, in_channels: int, out_channels: int, place: Place) -> Convolution:
        kept = _kept(out_channels, self.dv_of(out_channels))
        return nn.Conv2d(in_channels, kept, 3, place.stride, padding=1, bias=False)


@dataclass(frozen=True, kw_only=True)
class Pointwise(Replacing):
    """Control: a 1x1 convolution computes the dv channels, so they see no other position."""

    name: ClassVar[str] = "pointwise"
    label: ClassVar[str] = "1x1"
    mean: ClassVar[bool] = False

    def replaced(self, in_channels: int, out_channels: int, place: Place) -> Convolution:
        dv = self.dv_of(out_channels)
        return SideConv(in_channels, out_channels, dv, place.stride, mean=self.mean)


@dataclass(frozen=True, kw_only=True)
class GlobalMean(Pointwise):
    """Control: attention with uniform weights computes the dv channels."""

    name: ClassVar[str] = "mean"
    label: ClassVar[str] = "mean"
    mean: ClassVar[bool] = True


# By name, in the order of the paper's Table 1, followed by the controls.
ATTENTIONS: dict[str, type[Attention]] = {
    kind.name: kind for kind in (NoAttention, GE, SE, AA, Removed, Pointwise, GlobalMean)
}


def _kept(out_channels: int, dv: int) -> int:
    if not 0 < dv < out_channels:
        raise ValueError(f"dv={dv} must be above 0 and below out_channels={out_channels}")
    return out_channels - dv


class SideConv(nn.Module):
    """A 3x3 and a 1x1 convolution in parallel, like convolution and attention in `AugmentedConv`.

    Maps (B, in_channels, H, W) to (B, out_channels, H/stride, W/stride), rounded up. The last
    ``dv`` channels come from the 1x1 convolution; with ``mean``, they are its mean over all
    positions, which is the result of attention with uniform weights.

    Raises:
        ValueError: if ``dv`` leaves no channels for one of the two.
    """

    def __init__(
        self, in_channels: int, out_channels: int, dv: int, stride: int, *, mean: bool
    ) -> None:
        super().__init__()
        kept = _kept(out_channels, dv)
        self.out_channels, self.stride, self.mean = out_channels, stride, mean
        self.conv_out = nn.Conv2d(in_channels, kept, 3, stride, padding=1, bias=False)
        self.side_conv = nn.Conv2d(in_channels, dv, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv_out(x)
        # Unstrided, after subsampling, for the reason given in aaconv/modules.py.
        x = x[:, :, :: self.stride, :: self.stride]
        if self.mean:  # of the input: a 1x1 convolution without bias and a mean commute
            x = x.mean(dim=(2, 3), keepdim=True)
        side = self.side_conv(x)
        return torch.cat((out, side.expand(-1, -1, *out.shape[2:])), dim=1)


Convolution = nn.Conv2d | AugmentedConv | SideConv


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channel means (Hu et al., CVPR 2018).

    ``x * sigmoid(W2 relu(W1 mean(x)))`` with W1 (C // ratio, C) and W2 (C, C // ratio), without
    biases. Input and output are (B, C, H, W).

    Raises:
        ValueError: if ``ratio`` is larger than ``channels``.
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
