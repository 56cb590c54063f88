"""Learning rate over the steps of a run; the optimizer's own rate is the highest of them."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup: float) -> LRScheduler:
    """A straight line from 0 over the fraction ``warmup`` of all steps, then half a cosine to 0.

    The first step is one step up the line, so that none is lost at a rate of 0.
    """
    rising = round(warmup * total_steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return _half_cosine(1, 0, (step - rising) / max(1, total_steps - rising))

    return LambdaLR(optimizer, factor)


def one_cycle(
    optimizer: Optimizer, total_steps: int, *, warmup: float, start: float, end: float
) -> LRScheduler:
    """Up from ``start`` times the rate over the fraction ``warmup``, then down to ``end`` times it.

    Both are half a cosine (Smith and Topin, 2018). The momentum stays as it is. Unlike
    torch's OneCycleLR it works for any number of steps, and its ends are fractions of the highest
    rate.
    """
    last = max(1, total_steps - 1)
    top = warmup * last

    def factor(step: int) -> float:
        if step < top:
            return _half_cosine(start, 1, step / top)
        return _half_cosine(1, end, (step - top) / max(1, last - top))

    return LambdaLR(optimizer, factor)


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * min(1, progress))) / 2
