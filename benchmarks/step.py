"""Time a training step of the networks of configs/, with attention and without.

A step is forward, loss, backward and optimizer on random images, of networks for CIFAR-100. Memory
is the peak of a new process above what was allocated before the step; ratios are to the first
--attention. GFLOPs are those of a forward pass of one image, GFLOP/s those of the whole step.
"""

from functools import partial

from torch import nn

from benchmarks import networks
from benchmarks.networks import CHOICES, TOGETHER, Case, cells
from training.compose import compose_config
from training.settings import build_model

__all__ = ["CHOICES", "OPTIONS", "TOGETHER", "cells", "measure"]

OPTIONS = {
    "model": ["resnet20", "wrn16_4", "wrn28_10"],
    "attention": ["none", "aa"],
    "batch": [32],
    "size": [32],
    **networks.OPTIONS,
}


def build(case: Case) -> nn.Module:
    """The network that the configs describe."""
    overrides = [f"model={case['model']}", f"attention={case['attention']}"]
    if case["attention"] == "aa":
        overrides.append(f"attention.backend={case['backend']}")
    size = (case["size"], case["size"])
    return build_model(compose_config(overrides), num_classes=100, image_size=size)


measure = partial(networks.measure, build)
