"""Differences at equal cost, instead of after the same number of epochs.

Attention costs time. The network that is cheaper over all of its epochs sets the budget, and the
other one is read at the last epoch it finished within that budget. That epoch is in the middle of
its schedule, before the learning rate has decayed: the difference shows what stopping there gives,
not what a shorter schedule would give.
"""

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass

from models.fields import is_finite
from reporting.paired import Comparison, Difference, paired
from reporting.runs import Variant, conditions

# Next to the variants' folders: milliseconds per step by folder name, measured separately on an
# idle machine.
STEP_TIMES = "step_times.json"

# An epoch still counts if less than this fraction of it is over the budget: squeeze-and-excitation
# takes a few ten-thousandths more FLOPs than plain.
NEARLY = 0.01


@dataclass(frozen=True)
class EqualCost:
    """A comparison at equal cost."""

    comparison: Comparison
    cost: str  # what is equal, in words
    ratio: float  # cost of an epoch of the variant / cost of an epoch of the baseline
    epochs: tuple[int, int]  # the epochs at which the variant and the baseline are read
    top1: Difference  # at these epochs


def at_equal_cost(comparison: Comparison) -> list[EqualCost]:
    """Compare at equal training time (if the times are comparable) and at equal FLOPs.

    Raises:
        ValueError: if a step_times.json is damaged.
    """
    pair = (comparison.variant, comparison.baseline)
    same_batch = "batch_size" not in comparison.differing  # else steps are not comparable
    step_ms = [ms for variant in pair if (ms := _step_ms(variant)) is not None]
    costs = {}
    if len(step_ms) == 2 and same_batch:
        costs["training time, measured apart"] = step_ms
    elif len(conditions([run for variant in pair for run in variant.runs], "hardware")) == 1:
        costs["training time of the runs"] = [_epoch_seconds(variant) for variant in pair]
    costs["FLOPs"] = [float(variant.first["flops"]) for variant in pair]
    found = [_at(cost, comparison, *of_epoch) for cost, of_epoch in costs.items()]
    return [equal for equal in found if equal is not None]


def _at(cost: str, comparison: Comparison, ours: float, theirs: float) -> EqualCost | None:
    """Compare, given the costs of an epoch; None if no epoch fits or neither curve is cut short."""
    variants = (comparison.variant, comparison.baseline)
    planned = [variant.first["epochs"] for variant in variants]
    budget = min(planned[0] * ours, planned[1] * theirs)
    epochs = [
        min(number, int(budget / cost_of_epoch + NEARLY))
        for number, cost_of_epoch in zip(planned, (ours, theirs), strict=True)
    ]
    if min(epochs) < 1 or epochs == planned:
        return None
    scores = [
        {run.seed: run.each_epoch("top1")[epoch - 1] for run in variant.runs}
        for variant, epoch in zip(variants, epochs, strict=True)
    ]
    return EqualCost(comparison, cost, ours / theirs, (epochs[0], epochs[1]), paired(*scores))


def _epoch_seconds(variant: Variant) -> float:
    """The median seconds per epoch over all runs."""
    return statistics.median(
        seconds for run in variant.runs for seconds in run.each_epoch("perf/epoch_seconds")
    )


def _step_ms(variant: Variant) -> float | None:
    """The separately measured milliseconds per step, or None."""
    folder = variant.runs[0].folder.parent
    file = folder.parent / STEP_TIMES
    if not file.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        times: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["ms"]
        if all(is_finite(value) and value > 0 for value in times.values()):
            return times.get(folder.name)
    raise ValueError(f"{file} is damaged: expected an object ms of milliseconds above 0 by folder")
