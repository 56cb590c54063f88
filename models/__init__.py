"""Residual networks for small images, with and without attention."""

from aaconv.maps import augmented_layers
from models.attention import (
    AA,
    ATTENTIONS,
    GE,
    SE,
    GlobalMean,
    NoAttention,
    Pointwise,
    Removed,
)
from models.cost import (
    count_flops,
    count_parameters,
    layer_facts,
    layer_table,
    receptive_field,
)
from models.foreign import ForeignWeights
from models.resnet import ResNet
from models.saved import Description, Trained, build, describe, load
from models.transfer import freeze, set_frozen_eval, transfer

__all__ = [
    "AA",
    "ATTENTIONS",
    "GE",
    "SE",
    "Description",
    "ForeignWeights",
    "GlobalMean",
    "NoAttention",
    "Pointwise",
    "Removed",
    "ResNet",
    "Trained",
    "augmented_layers",
    "build",
    "count_flops",
    "count_parameters",
    "describe",
    "freeze",
    "layer_facts",
    "layer_table",
    "load",
    "receptive_field",
    "set_frozen_eval",
    "transfer",
]
