"""Learning rate schedules over the steps of a run; the peak is the optimizer's own rate."""

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


def warmup_cosine(optimizer: Optimizer, total_steps: int, *, warmup: float) -> LRScheduler:
    """Linear warmup from 0 over the fraction ``warmup`` of all steps, then a half cosine to 0.

    The first step is already one increment above 0, so that no step is wasted at a rate of 0.
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
    """Rise from ``start`` times the peak during ``warmup``, then fall to ``end`` times the peak.

    Both parts are half cosines (Smith and Topin, 2018). ``warmup`` is a fraction of all steps. The
    momentum does not change. Unlike torch's OneCycleLR, this works for any number of steps, and
    ``start`` and ``end`` are both fractions of the peak.
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
    """Multiply the rate by ``factor`` at each of the ``milestones``, fractions of all steps.

    Over the fraction ``warmup`` of all steps, the rate first rises linearly as in `warmup_cosine`.
    """
    rising = round(warmup * total_steps)
    drops = [round(milestone * total_steps) for milestone in milestones]

    def of_step(step: int) -> float:
        passed = sum(step >= drop for drop in drops)
        return min(1, (step + 1) / max(1, rising)) * factor**passed

    return LambdaLR(optimizer, of_step)


def constant(optimizer: Optimizer, total_steps: int, *, warmup: float) -> LRScheduler:
    """A constant rate after linear warmup over the fraction ``warmup`` of all steps, see `step`."""
    return step(optimizer, total_steps, milestones=(), factor=1, warmup=warmup)


def _half_cosine(begin: float, end: float, progress: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * min(1, progress))) / 2
