"""Parameters, FLOPs and augmented layers of a network."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aaconv import AugmentedConv


def count_parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """FLOPs of the forward pass for one (3, H, W) image, two per multiply-add.

    Counts convolutions and matrix products, nothing elementwise (no softmax, no normalisation).
    Attention is counted by its formula whichever backend runs it: queries times keys, queries
    times both position tables, weights times values. It runs on the meta device, where nothing is
    computed.
    """
    # In evaluation mode, because synchronised normalisation would communicate with other processes.
    shadow = copy.deepcopy(model).to("meta").eval()
    for layer in augmented_layers(shadow).values():
        layer.backend = "reference"
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shadow(torch.empty(1, 3, *image_size, device="meta"))
    return counter.get_total_flops()


def augmented_layers(model: nn.Module) -> dict[str, AugmentedConv]:
    """The augmented convolutions of a network by their module names."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AugmentedConv)}


def layer_table(model: nn.Module) -> list[str]:
    """A table of dk, dv, Nh, channels per head and map size of each augmented layer, as lines.

    Empty for a network without augmented layers.
    """
    layers = augmented_layers(model)
    if not layers:
        return []
    rows: list[tuple[str, ...]] = [("augmented", "out", "dk", "dv", "Nh", "dkh", "dvh", "map")]
    for name, layer in layers.items():
        heads = (layer.dk // layer.Nh, layer.dv // layer.Nh)
        out = layer.dv + (layer.conv_out.out_channels if layer.conv_out is not None else 0)
        size = "x".join(map(str, layer.shape))
        rows.append((name, *map(str, (out, layer.dk, layer.dv, layer.Nh, *heads)), size))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
