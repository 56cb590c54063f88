"""Learning rate over the steps of a run; the optimizer's own rate is the highest of them."""

import math
from collections.abc import Sequence

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


def step(
    optimizer: Optimizer,
    total_steps: int,
    *,
    milestones: Sequence[float],
    factor: float,
    warmup: float,
) -> LRScheduler:
    """Times ``factor`` after each of the ``milestones``, which are fractions of all steps.

    Before, over the fraction ``warmup``, up a straight line as `warmup_cosine` has it.
    """
    rising = round(warmup * total_steps)
    drops = [round(milestone * total_steps) for milestone in milestones]

    def of_step(step: int) -> float:
        passed = sum(step >= drop for drop in drops)
        return min(1, (step + 1) / max(1, rising)) * factor**passed

    return LambdaLR(optimizer, of_step)


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float) -> LRScheduler:
    """The same rate in all steps after the fraction ``warmup``, see `step`."""
    return step(optimizer, total_steps, milestones=(), factor=1, warmup=warmup)


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * min(1, progress))) / 2
