"""Time a training step of torchvision's networks, plain and after `aaconv.augment_`.

"pooled" is `augment_` by its defaults, which pool the attention on 28x28 maps as the paper does;
"full" has pool=1. Steps, memory and ratios are as in `bench step`.
"""

from functools import partial
from typing import Any

import torch
from torch import nn

from aaconv import augment_
from benchmarks import step
from benchmarks.step import TOGETHER, Case, cells
from data import vision
from models import augmented_layers

__all__ = ["CHOICES", "OPTIONS", "TOGETHER", "cells", "measure"]

assert vision.datasets  # torchvision can be imported from now on
ATTENTIONS: dict[str, dict[str, Any] | None] = {"plain": None, "pooled": {}, "full": {"pool": 1}}
OPTIONS = {
    **step.OPTIONS,
    "model": ["resnet50"],
    "attention": list(ATTENTIONS),
    "batch": [2],
    "size": [224],
    "precision": ["fp32"],
}
CHOICES = step.CHOICES | {"attention": tuple(ATTENTIONS)}


def build(case: Case) -> nn.Module:
    """The network of ``case``, augmented if its attention is."""
    from torchvision import models

    network = models.get_model(case["model"], weights=None)
    options = ATTENTIONS[case["attention"]]
    if options is not None:
        augment_(network, torch.zeros(1, 3, case["size"], case["size"]), **options)
    for layer in augmented_layers(network).values():
        layer.backend = case["backend"]
    return network


measure = partial(step.compare, build)
