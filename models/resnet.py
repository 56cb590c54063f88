"""The residual network used for all comparisons: CIFAR, wide and bottleneck ResNets."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aaconv.augment import papers_pool
from aaconv.maps import augmented_layers
from models.alternet import AlterBlock
from models.attention import Attention, NoAttention, Place
from models.blocks import BasicBlock, Block, Bottleneck, PreActBlock

BLOCKS: dict[str, type[Block]] = {
    "basic": BasicBlock,
    "bottleneck": Bottleneck,
    "preact": PreActBlock,
    "alternet": AlterBlock,
}


class ResNet(nn.Module):
    """A residual network for small images, plain or with attention.

    Maps (B, 3, H, W) images to (B, num_classes) logits: a stem, stages of blocks, the mean over the
    map, and a linear layer. Every stage but the first halves the map.

    Args:
        block: ``basic`` or ``bottleneck`` (He et al., CVPR 2016), ``preact`` as in wide ResNets
            (Zagoruyko and Komodakis, BMVC 2016), or ``alternet``, see
            `models.alternet.AlterBlock`.
        depths: number of blocks in each stage.
        widths: channels of each stage, before a bottleneck's fourfold expansion.
        stem: output channels of the first convolution, which is 3x3.
        strided_stem: use the ImageNet stem instead: a 7x7 convolution and 3x3 max pooling, both
            with stride 2 (He et al., CVPR 2016). Attention is then pooled according to
            `aaconv.augment.papers_pool` (Bello et al., section 4.2).
        shortcut: ``projection``, ``pad`` or ``subsample``, see `models.blocks.Shortcut`.
        num_classes: number of logits.
        image_size: (H, W) of the images, which determines the size of the relative tables of `AA`.
        drop_path: probability of skipping the last block for an image in training; for the l-th of
            L blocks it is l / L times as large (stochastic depth, Huang et al., ECCV 2016).
        dropout: dropout between the convolutions of ``preact`` blocks (Zagoruyko and Komodakis).
        attention: what the blocks have in addition to convolutions, see `models.attention`.
            Networks to be compared differ only in this argument.

    Attributes:
        arguments: all of the above, enough to build the same network again.

    Raises:
        ValueError: if the arguments contradict each other; the message names the values.
    """

    def __init__(
        self,
        block: str,
        depths: Sequence[int],
        widths: Sequence[int],
        stem: int,
        shortcut: str,
        num_classes: int,
        image_size: tuple[int, int] = (32, 32),
        attention: Attention = NoAttention(),  # noqa: B008 (a frozen dataclass)
        strided_stem: bool = False,
        drop_path: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block={block} must be one of {', '.join(BLOCKS)}")
        if not depths or len(depths) != len(widths):
            raise ValueError(
                f"depths={list(depths)} and widths={list(widths)} must be equally long, not empty"
            )
        if min(*depths, *widths, stem, num_classes) < 1:
            raise ValueError(
                f"depths={list(depths)}, widths={list(widths)}, stem={stem} and "
                f"num_classes={num_classes} must be at least 1"
            )
        if not (0 <= drop_path < 1 and 0 <= dropout < 1):
            raise ValueError(
                f"drop_path={drop_path} and dropout={dropout} must be from 0 to below 1"
            )
        make_block = BLOCKS[block]
        preact = issubclass(make_block, PreActBlock)
        if dropout and not preact:
            raise ValueError(f"dropout={dropout} needs block=preact, not {block}; use drop_path")
        attention.check(depths)
        self.arguments: dict[str, Any] = {
            "block": block,
            "depths": list(depths),
            "widths": list(widths),
            "stem": stem,
            "shortcut": shortcut,
            "num_classes": num_classes,
            "image_size": list(image_size),
            "attention": attention,
            "strided_stem": strided_stem,
            "drop_path": drop_path,
            "dropout": dropout,
        }
        self.strided_stem = strided_stem
        if strided_stem:
            self.conv = nn.Conv2d(3, stem, 7, 2, padding=3, bias=False)
        else:
            self.conv = nn.Conv2d(3, stem, 3, padding=1, bias=False)
        # Pre-activation blocks normalize their own input, so the normalization that comes after the
        # stem in other networks comes after the last block instead.
        self.bn_in = nn.Identity() if preact else nn.BatchNorm2d(stem)
        self.stages = nn.Sequential()
        channels, size = stem, image_size
        if strided_stem:
            size = (-(-size[0] // 4), -(-size[1] // 4))
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            blocks = nn.Sequential()
            for number in range(depth):
                stride = 2 if index > 0 and number == 0 else 1
                size = (-(-size[0] // stride), -(-size[1] // stride))
                pool = papers_pool(size) if strided_stem else 1
                place = Place(index + 1, number + 1, depth, stride, size, pool)
                dropped = drop_path * (sum(depths[:index]) + number + 1) / sum(depths)
                blocks.append(
                    make_block(channels, width, place, shortcut, attention, dropped, dropout)
                )
                channels = width * make_block.expansion
            self.stages.append(blocks)
        self.bn_out = nn.BatchNorm2d(channels) if preact else nn.Identity()
        self.head = nn.Linear(channels, num_classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_in(self.conv(x))
        if not isinstance(self.bn_in, nn.Identity):
            x = torch.relu(x)
        if self.strided_stem:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.stages(x)
        if not isinstance(self.bn_out, nn.Identity):
            x = torch.relu(self.bn_out(x))
        return self.head(x.mean(dim=(2, 3)))


def _initialize(network: nn.Module) -> None:
    """Initialize convolutions and zero the last layer's bias; attention initializes itself."""
    layers = augmented_layers(network).values()
    of_attention = {part for layer in layers for part in (layer.qkv_conv, layer.attn_out)}
    for module in network.modules():
        # There is nothing to draw on the meta device; see AugmentedConv.
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            if module not in of_attention:
                nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
