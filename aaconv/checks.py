"""Checks of the arguments of `AugmentedConv`."""

import math
import operator
from typing import Any

Size = int | tuple[int, int]

# Larger values overflow inside torch: MAX_SIZE for a kernel, stride or map, MAX_COUNT for a count.
MAX_SIZE, MAX_COUNT = 2**20, 2**60


def whole(name: str, value: Any, most: float = MAX_COUNT, least: float = -math.inf) -> int:
    """Return ``value`` as an int; NumPy integers are accepted, floats and booleans are not.

    Raises:
        ValueError: if it is not an integer from ``least`` to ``most``; the message names it.
    """
    if not _is_index(value):
        raise ValueError(f"{name}={value!r} must be an int")
    number = operator.index(value)
    if number > most:
        raise ValueError(f"{name}={number} must be at most {most}")
    if number < least:
        raise ValueError(f"{name}={number} must be at least {least}")
    return number


def pair(name: str, value: Size) -> tuple[int, int]:
    """Return ``value`` as (vertical, horizontal); an int is used for both.

    Raises:
        ValueError: if ``value`` is neither an int nor a pair of ints, or is too large.
    """
    if isinstance(value, tuple | list):
        if len(value) == 2 and all(map(_is_index, value)):
            return whole(name, value[0], MAX_SIZE), whole(name, value[1], MAX_SIZE)
    elif _is_index(value):
        return (whole(name, value, MAX_SIZE),) * 2
    raise ValueError(f"{name}={value!r} must be an int or a pair of ints")


def _is_index(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def check_channels(out_channels: int, dk: int, dv: int, Nh: int) -> None:
    """Raise ValueError unless dk and dv fit the layer and can be split over Nh heads."""
    if not 0 <= dv <= out_channels:
        raise ValueError(f"dv={dv} must lie between 0 and out_channels={out_channels}")
    if dk < 1 and dv > 0:
        raise ValueError(f"dk={dk} must be at least 1 where dv={dv} channels come from attention")
    for name, value in (("dk", dk), ("dv", dv)):
        if value % Nh:
            raise ValueError(f"{name}={value} must be divisible by Nh={Nh}")


def check_convolution(
    in_channels: int, conv_channels: int, groups: int, qkv_kernel_size: int
) -> None:
    """Raise ValueError unless ``groups`` and ``qkv_kernel_size`` are valid for the layer."""
    if groups < 1 or in_channels % groups or conv_channels % groups:
        raise ValueError(
            f"groups={groups} must divide in_channels={in_channels} and the "
            f"out_channels - dv = {conv_channels} channels of the plain convolution"
        )
    if qkv_kernel_size < 1 or qkv_kernel_size % 2 == 0:
        raise ValueError(f"qkv_kernel_size={qkv_kernel_size} must be odd and at least 1")


def check_same_output_size(
    kernel_size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    """Raise ValueError if convolution and attention differ in output size for every input.

    Attention gives ``ceil(L / stride)`` positions for L pixels. The convolution differs by
    ``excess / stride`` before rounding, with ``excess`` as below; both round to the same size for
    some L only if ``|excess| < stride``.
    """
    for k, s, p, d in zip(kernel_size, stride, padding, dilation, strict=True):
        if min(k, s, d) < 1 or p < 0:
            raise ValueError(
                f"kernel_size={k}, stride={s} and dilation={d} must be at least 1, padding={p} "
                "at least 0"
            )
        excess = 2 * p - d * (k - 1)
        if abs(excess) >= s:
            raise ValueError(
                f"padding={p} with kernel_size={k}, dilation={d} and stride={s} makes the "
                "convolution's output size differ from attention's; "
                f"use padding={d * (k - 1) // 2}"
                + ("" if d * (k - 1) % 2 == 0 else " and an odd kernel_size")
            )
