"""What a network is made of and what it costs: parameters, FLOPs, its augmented layers."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aaconv import AugmentedConv


def count_parameters(model: nn.Module) -> int:
    """Number of learned values."""
    return sum(p.numel() for p in model.parameters())


def count_flops(model: nn.Module, image_size: tuple[int, int]) -> int:
    """FLOPs of the forward pass for one (3, H, W) image, two per multiply-add.

    Counts convolutions and matrix products, nothing elementwise (no softmax, no normalisation).
    Attention is counted by its formula: queries with keys, queries with both position tables,
    weights with values, whichever backend runs it. Nothing is computed: it runs on the meta
    device.
    """
    # In evaluation: normalisation over several processes would ask the others.
    shadow = copy.deepcopy(model).to("meta").eval()
    for layer in augmented_layers(shadow).values():
        layer.backend = "reference"
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        shadow(torch.empty(1, 3, *image_size, device="meta"))
    return counter.get_total_flops()


def augmented_layers(model: nn.Module) -> dict[str, AugmentedConv]:
    """The augmented convolutions of a network by their place in it."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AugmentedConv)}


def layer_table(model: nn.Module) -> list[str]:
    """Lines of a table with dk, dv, Nh, channels per head and map size of each augmented layer.

    Empty for a network without any.
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
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(wide[0]), *map(str.rjust, row[1:], wide[1:])]) for row in rows]
