"""Attention-augmented convolution (Bello et al., ICCV 2019) for PyTorch."""

from aaconv.attention import BACKENDS, attention_2d
from aaconv.layer import AugmentedConv

__all__ = ["BACKENDS", "AugmentedConv", "attention_2d"]
