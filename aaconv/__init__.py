"""Attention-augmented convolution (Bello et al., ICCV 2019) for PyTorch."""

from aaconv.augment import augment_
from aaconv.functional import BACKENDS, attention_2d
from aaconv.maps import attention_maps
from aaconv.modules import AugmentedConv
from aaconv.stats import attention_stats

__all__ = [
    "BACKENDS",
    "AugmentedConv",
    "attention_2d",
    "attention_maps",
    "attention_stats",
    "augment_",
]
__version__ = "0.1.0"
