"""Residual networks for small images, with and without attention."""

from models.attention import AA, GE, SE, Attention, NoAttention
from models.cost import augmented_layers, count_flops, count_parameters, layer_facts, layer_table
from models.resnet import ResNet

__all__ = [
    "AA",
    "GE",
    "SE",
    "Attention",
    "NoAttention",
    "ResNet",
    "augmented_layers",
    "count_flops",
    "count_parameters",
    "layer_facts",
    "layer_table",
]
