"""Differences where both networks have cost the same, instead of after as many epochs.

Attention costs time. The network that needs less for its epochs sets the budget, and the curve of
the other one is read after the last whole epoch that it has finished by then. That epoch is in the
middle of its schedule, where the learning rate has not come down: the difference says what stopping
there would have given, not what a shorter schedule would.
"""

import json
import statistics
from contextlib import suppress
from dataclasses import dataclass

from models.fields import is_finite
from reporting.paired import Comparison, Difference, paired
from reporting.runs import Variant, conditions

# Beside the folders of a comparison's variants: milliseconds of a step by the folder's name, which
# have been measured apart, on a quiet machine.
STEP_TIMES = "step_times.json"

# An epoch that is over the budget by less than this part of it counts: squeeze-and-excitation takes
# some ten thousandths more FLOPs than plain.
NEARLY = 0.01


@dataclass(frozen=True)
class EqualCost:
    """A comparison at equal cost."""

    comparison: Comparison
    cost: str  # what is equal, in words
    ratio: float  # what an epoch of the variant costs, over what one of the baseline does
    epochs: tuple[int, int]  # after which the variant and the baseline are read
    top1: Difference  # by then


def at_equal_cost(comparison: Comparison) -> list[EqualCost]:
    """At equal training time and at equal FLOPs, where both are known.

    Raises:
        ValueError: a step_times.json is damaged.
    """
    pair = (comparison.variant, comparison.baseline)
    same_batch = "batch_size" not in comparison.differing  # or a step is not a step
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
    """``ours`` and ``theirs`` are the costs of an epoch; None if one has no epoch in the budget."""
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
    """The median epoch of all its runs."""
    return statistics.median(
        seconds for run in variant.runs for seconds in run.each_epoch("perf/epoch_seconds")
    )


def _step_ms(variant: Variant) -> float | None:
    """Milliseconds of a step that were measured apart, or None."""
    folder = variant.runs[0].folder.parent
    file = folder.parent / STEP_TIMES
    if not file.is_file():
        return None
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        times: dict[str, float] = json.loads(file.read_text(encoding="utf-8"))["ms"]
        if all(is_finite(value) and value > 0 for value in times.values()):
            return times.get(folder.name)
    raise ValueError(f"{file} is damaged: expected an object ms of milliseconds above 0 by folder")
