"""Residual blocks: (B, Cin, H, W) to (B, Cout, H/stride, W/stride), rounded up."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, Place


class Shortcut(nn.Module):
    """The shortcut of a block that changes the shape.

    ``projection`` is a strided 1x1 convolution. The other two have no parameters: ``pad``
    averages over stride x stride pixels and appends zero channels, ``subsample`` keeps every
    stride-th pixel instead of averaging (option A of He et al., CVPR 2016).

    Raises:
        ValueError: if ``kind`` is unknown, or it has no parameters and there are fewer output than
            input channels.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, kind: str) -> None:
        super().__init__()
        self.stride, self.kind = stride, kind
        self.added_channels = out_channels - in_channels
        self.conv = None
        if kind == "projection":
            # Unstrided, after subsampling, for the reason given in aaconv/modules.py.
            self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        elif kind not in ("pad", "subsample"):
            raise ValueError(f"shortcut={kind} must be projection, pad or subsample")
        elif self.added_channels < 0:
            raise ValueError(
                f"shortcut={kind} cannot narrow {in_channels} channels to {out_channels}; "
                "use shortcut=projection"
            )

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1 and self.kind == "pad":
            x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        elif self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.conv is not None:
            return self.conv(x)
        return F.pad(x, (0, 0, 0, 0, 0, self.added_channels))


class Block(nn.Module):
    """Base class of the blocks: a residual branch, its recalibration, and a shortcut.

    Args:
        in_channels: channels of the input.
        channels: channels of the branch; the output has ``expansion`` times as many.
        place: place of the block in its network.
        shortcut: kind of `Shortcut`, used only if the block changes the shape.
        attention: what the branch has in addition to convolutions.
        drop_path: probability of skipping the branch for an image in training.
        dropout: dropout probability between the two convolutions of a pre-activation block.
    """

    expansion = 1
    normalizes_projection = True

    def __init__(
        self,
        in_channels: int,
        channels: int,
        place: Place,
        shortcut: str,
        attention: Attention,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path, self.dropout = drop_path, dropout
        out_channels = channels * self.expansion
        self.add_branch(in_channels, channels, place, attention)
        self.recalibrate = attention.recalibration(out_channels)
        self.changes_shape = place.stride > 1 or in_channels != out_channels
        self.shortcut: nn.Module = nn.Identity()
        if self.changes_shape:
            self.shortcut = Shortcut(in_channels, out_channels, place.stride, shortcut)
            if shortcut == "projection" and self.normalizes_projection:
                self.shortcut = nn.Sequential(self.shortcut, nn.BatchNorm2d(out_channels))

    def add_branch(
        self, in_channels: int, channels: int, place: Place, attention: Attention
    ) -> None:
        """Add the branch's convolutions and normalizations."""
        raise NotImplementedError

    def end_branch(self, y: Tensor) -> Tensor:
        """Recalibrate the output of the branch, and in training set it to zero for some images.

        The output for other images is scaled up to keep the mean (Huang et al., ECCV 2016, who
        scale in evaluation instead, and drop the same blocks for all images of a batch).
        """
        y = self.recalibrate(y)
        if not (self.training and self.drop_path):
            return y
        kept = torch.rand(len(y), 1, 1, 1, device=y.device) >= self.drop_path
        return torch.where(kept, y / (1 - self.drop_path), 0.0)


class BasicBlock(Block):
    """Two 3x3 convolutions, each followed by normalization (He et al., CVPR 2016)."""

    def add_branch(
        self, in_channels: int, channels: int, place: Place, attention: Attention
    ) -> None:
        self.conv1 = attention.first_convolution(in_channels, channels, place)
        self.bn1 = nn.BatchNorm2d(self.conv1.out_channels)
        self.conv2 = nn.Conv2d(self.conv1.out_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.end_branch(self.bn2(self.conv2(y)))
        return torch.relu(y + self.shortcut(x))


class Bottleneck(Block):
    """1x1, 3x3 and 1x1 convolution with 4 x ``channels`` output channels (He et al., CVPR 2016).

    `AA` augments the 3x3 convolution, the only one that sees more than one pixel; this gives the
    parameter counts that Bello et al. report for their ResNet-50.
    """

    expansion = 4

    def add_branch(
        self, in_channels: int, channels: int, place: Place, attention: Attention
    ) -> None:
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = attention.first_convolution(channels, channels, place)
        inner = self.conv2.out_channels
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels * self.expansion)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.end_branch(self.bn3(self.conv3(y)))
        return torch.relu(y + self.shortcut(x))


class PreActBlock(Block):
    """Two 3x3 convolutions, each preceded by normalization (Zagoruyko and Komodakis, BMVC 2016).

    If the shape changes, the shortcut starts after the first normalization and ReLU.
    """

    normalizes_projection = False

    def add_branch(
        self, in_channels: int, channels: int, place: Place, attention: Attention
    ) -> None:
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = attention.first_convolution(in_channels, channels, place)
        self.bn2 = nn.BatchNorm2d(self.conv1.out_channels)
        self.conv2 = nn.Conv2d(self.conv1.out_channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        if self.changes_shape:
            x = self.shortcut(y)
        y = torch.relu(self.bn2(self.conv1(y)))
        y = self.conv2(F.dropout(y, self.dropout, self.training))
        return x + self.end_branch(y)
