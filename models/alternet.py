"""AlterNet: attention instead of convolutions at the ends of stages (Park and Kim, ICLR 2022)."""

import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, Place
from models.blocks import PreActBlock


class AlterBlock(PreActBlock):
    """A 1x1 convolution followed by attention; in places without attention, a `PreActBlock`.

    The `attention` option decides which of the two: with ``blocks="last"``, ``dk=1.0`` and
    ``dv=1.0`` in stages 2 to 4 of a pre-activation ResNet-18, the network is the AlterNet-18 of
    Park and Kim; without attention, it is the network that they compare it with.

    The layers follow Park and Kim's published code: normalization, GELU, 1x1 convolution,
    normalization, attention, nothing after that, and no MLP. Attention itself is this project's: it
    covers the whole map instead of windows, takes its positions from `aaconv.AugmentedConv` instead
    of a bias for each offset, and has the same number of heads in all stages and as many key and
    value channels as the block has output channels; theirs has 6, 12 and 24 heads of 64 channels.
    """

    def add_branch(
        self, in_channels: int, channels: int, place: Place, attention: Attention
    ) -> None:
        convolution = attention.first_convolution(channels, channels, place)
        self.attends = not isinstance(convolution, nn.Conv2d)
        if not self.attends:
            super().add_branch(in_channels, channels, place, attention)
            return
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.attention = convolution

    def forward(self, x: Tensor) -> Tensor:
        if not self.attends:
            return super().forward(x)
        y = F.gelu(self.bn1(x))
        if self.changes_shape:
            x = self.shortcut(y)
        return x + self.end_branch(self.attention(self.bn2(self.conv1(y))))
