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
    """Return the number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """Return the FLOPs of the forward pass for one (3, H, W) image, two per multiply-add.

    Counts convolutions and matrix products, nothing elementwise (no softmax, no normalization).
    Attention is counted by its formula for every backend: queries times keys, queries times both
    position tables, weights times values. The forward pass runs on the meta device, which computes
    nothing.
    """
    # In evaluation mode, because synchronized normalization would communicate with other processes.
    shadow = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shadow(torch.empty(1, 3, *image_size, device="meta"))
    return counter.get_total_flops()


def layer_facts(model: nn.Module) -> list[dict[str, Any]]:
    """Return the actual dk, dv and Nh of each augmented layer; empty for a plain network.

    Each entry has the module's ``name``, its output channels ``out``, ``dk``, ``dv``, ``Nh``, the
    channels per head ``dkh`` and ``dvh``, and the ``height`` and ``width`` of its output.
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
    """Return the output of `layer_facts` as the lines of a table; none for a plain network."""
    if not facts:
        return []
    columns = ("out", "dk", "dv", "Nh", "dkh", "dvh")
    rows: list[tuple[str, ...]] = [("augmented", *columns, "map")]
    for layer in facts:
        size = f"{layer['height']}x{layer['width']}"
        rows.append((layer["name"], *(str(layer[c]) for c in columns), size))
    return table(rows, "lrrrrrrr")


def receptive_field(model: nn.Module) -> int:
    """Return the side in pixels of the image window that a position of the last feature map sees.

    It follows from the kernel sizes, strides and dilations, all square, of the convolutions along
    the residual branches of a network of this package, and from the pooling of a strided stem.
    Attention, like squeeze-and-excitation, is not included: it sees the whole map.
    """
    side, step = 1, 1
    strided_stem = isinstance(model, ResNet) and model.strided_stem
    for layer in _convolutions(model):
        if isinstance(layer, AugmentedConv) and layer.conv_out is None:
            step *= layer.stride[0]
            continue
        side += (layer.kernel_size[0] - 1) * layer.dilation[0] * step
        step *= layer.stride[0]
        if strided_stem and layer is model.conv:  # followed by 3x3 pooling with stride 2
            side, step = side + 2 * step, 2 * step
    return side


def _convolutions(module: nn.Module) -> Iterator[nn.Conv2d | AugmentedConv]:
    """Yield the convolutions in order, except shortcuts, which see no more than the branches."""
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d | AugmentedConv):
            yield child
        elif name not in ("shortcut", "recalibrate"):
            yield from _convolutions(child)
