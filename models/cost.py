"""Parameters, FLOPs and augmented layers of a network."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aaconv import AugmentedConv
from aaconv.maps import augmented_layers
from aaconv.text import table
from models.resnet import ResNet


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """FLOPs of the forward pass for one (3, H, W) image, two per multiply-add.

    Counts convolutions and matrix products, nothing elementwise (no softmax, no normalization).
    Attention is counted by its formula whichever backend runs it: queries times keys, queries
    times both position tables, weights times values. It runs on the meta device, where nothing is
    computed.
    """
    # In evaluation mode, because synchronized normalization would communicate with other processes.
    shadow = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shadow(torch.empty(1, 3, *image_size, device="meta"))
    return counter.get_total_flops()


def layer_facts(model: nn.Module) -> list[dict[str, Any]]:
    """What dk, dv and Nh have come to in each augmented layer; empty for a plain network.

    Each entry has the module's ``name``, its output channels ``out``, ``dk``, ``dv``, ``Nh``, the
    channels per head ``dkh`` and ``dvh``, and ``height`` and ``width`` of its output.
    """
    return [
        {
            "name": name,
            "out": layer.out_channels,
            "dk": layer.dk,
            "dv": layer.dv,
            "Nh": layer.Nh,
            "dkh": layer.dk // layer.Nh,
            "dvh": layer.dv // layer.Nh,
            "height": layer.shape[0],
            "width": layer.shape[1],
        }
        for name, layer in augmented_layers(model).items()
    ]


def layer_table(facts: list[dict[str, Any]]) -> list[str]:
    """What `layer_facts` says as the lines of a table; none for a plain network."""
    if not facts:
        return []
    columns = ("out", "dk", "dv", "Nh", "dkh", "dvh")
    rows: list[tuple[str, ...]] = [("augmented", *columns, "map")]
    for layer in facts:
        size = f"{layer['height']}x{layer['width']}"
        rows.append((layer["name"], *(str(layer[c]) for c in columns), size))
    return table(rows, "lrrrrrrr")


def receptive_field(model: nn.Module) -> int:
    """Side in pixels of the window of the image that one position of the last feature map sees.

    Through convolutions, and the pooling of a strided stem, that is: from the kernel sizes, strides
    and dilations along the residual branches of a network of this package, all of them square. Of a
    network with attention it is the field of its convolutions alone; attention, like
    squeeze-and-excitation, sees the whole map.
    """
    side, step = 1, 1
    strided_stem = isinstance(model, ResNet) and model.strided_stem
    for layer in _convolutions(model):
        if isinstance(layer, AugmentedConv) and layer.conv_out is None:
            step *= layer.stride[0]
            continue
        side += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
        step *= layer.stride[0]
        if strided_stem and layer is model.conv:  # then 3x3 pooling at every other position
            side, step = side + 2 * step, 2 * step
    return side


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d | AugmentedConv]:
    """Those that follow each other, in order; a shortcut sees no more than the branch beside it."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | AugmentedConv):
            yield child
        elif name not in ("shortcut", "recalibrate"):
            yield from _convolutions(child)
