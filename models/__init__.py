"""Residual networks for small images, with one switch for what stands beside their convolutions."""

from models.cost import augmented_layers, count_flops, count_parameters, layer_table
from models.resnet import ResNet
from models.switch import AA, GE, SE, Attention, Plain

__all__ = [
    "AA",
    "GE",
    "SE",
    "Attention",
    "Plain",
    "ResNet",
    "augmented_layers",
    "count_flops",
    "count_parameters",
    "layer_table",
]
