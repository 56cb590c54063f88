"""Differences paired by seed or unpaired: intervals, tests, and the power of a test."""

import statistics
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import numpy
from scipy import optimize, stats

from reporting.factorial import LEVEL, Error
from reporting.runs import Variant, differing_settings
from reporting.text import MINUS

Of = TypeVar("Of")

QUANTILES = 10_000
POWER = 0.8


@dataclass(frozen=True)
class Difference:
    """Differences by seed; interval and test are None if the data do not allow them.

    ``p_holm`` is ``p`` corrected for the number of tests in a family, if there is one.
    """

    by_seed: dict[int, float]
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    t: float | None = None
    p: float | None = None
    p_holm: float | None = None

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def sign(self) -> int:
        """1 or -1 if the interval excludes zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """``ours`` minus ``theirs`` over common seeds, with two-sided paired t-test and 95 % interval.

    A single pair has no interval, and neither have pairs that all differ by the same amount: the
    standard deviation that the test divides by is unknown or zero.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    by_seed = {seed: ours[seed] - theirs[seed] for seed in seeds}
    if not seeds:
        return Difference({})
    mean = statistics.mean(by_seed.values())
    if len(seeds) == 1:
        return Difference(by_seed, mean)
    sd = statistics.stdev(by_seed.values())
    if sd < 1e-9:
        return Difference(by_seed, mean, sd)
    test = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
    interval = test.confidence_interval(LEVEL)
    low, high = float(interval.low), float(interval.high)
    return Difference(by_seed, mean, sd, low, high, float(test.statistic), float(test.pvalue))


def pooled(groups: list[Collection[float]]) -> Error | None:
    """The mean square within ``groups``; None if no group has two values or if all values agree."""
    df = sum(len(group) - 1 for group in groups)
    means = [statistics.fmean(group) for group in groups]
    off = [x - mean for group, mean in zip(groups, means, strict=True) for x in group]
    squares = sum(x * x for x in off)
    return Error(squares / df, df, "seeds") if df and squares > 1e-18 else None


def unpaired(ours: Collection[float], theirs: Collection[float], error: Error) -> Difference:
    """Mean of ``ours`` minus mean of ``theirs``, with two-sided t-test and 95 % interval."""
    mean = statistics.fmean(ours) - statistics.fmean(theirs)
    scale = error.sd * (1 / len(ours) + 1 / len(theirs)) ** 0.5
    low, high = map(float, stats.t.interval(LEVEL, error.df, mean, scale))
    t = mean / scale
    p = float(2 * stats.t.sf(abs(t), error.df))
    return Difference({}, mean, error.sd, low, high, t, p)


@dataclass(frozen=True, eq=False)
class Comparison:
    """A variant and its baseline: a plain network, or another variant."""

    variant: Variant
    baseline: Variant

    @property
    def name(self) -> str:
        return f"{self.variant.label} {MINUS} {self.baseline.label}"

    @cached_property
    def differing(self) -> dict[str, tuple[str, str]]:
        """The differing settings outside of attention: the variant's value and the baseline's."""
        keys = differing_settings([self.variant, self.baseline])
        keys = [key for key in keys if not key.startswith("attention.")]
        return {key: (self.variant.setting(key), self.baseline.setting(key)) for key in keys}

    @property
    def differing_in_words(self) -> str:
        return "; ".join(f"{key} {a} vs. {b}" for key, (a, b) in self.differing.items())

    @cached_property
    def top1(self) -> Difference:
        return self.difference("top1")

    def difference(self, name: str) -> Difference:
        """The paired differences in a last-epoch score or another number of the summary."""
        return paired(self.variant.by_seed(name), self.baseline.by_seed(name))


def corrected(family: dict[Of, Difference]) -> dict[Of, Difference]:
    """Return the same differences with `Difference.p_holm` filled in."""
    p_values = holm_bonferroni([found.p for found in family.values()])
    return {
        of: replace(found, p_holm=p)
        for (of, found), p in zip(family.items(), p_values, strict=True)
    }


def holm_bonferroni(p_values: list[float | None]) -> list[float | None]:
    """Correct p-values for their number (Holm 1979); None (no test) stays None."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    result: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        result[index] = highest
    return result


def minimum_detectable_difference(n: int, sd: float) -> float:
    """The mean difference that a paired t-test at the 5 % level detects with a power of 80 %.

    ``n`` is the number of pairs, at least 2, and ``sd`` the standard deviation of their
    differences.
    """
    edge = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    # Quantiles of estimated / true deviation, because scipy's noncentral t fails for some values.
    quantiles = (numpy.arange(QUANTILES) + 0.5) / QUANTILES
    estimated = numpy.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))

    def lacking(shift: float) -> float:
        both = stats.norm.cdf(shift - edge * estimated) + stats.norm.cdf(-shift - edge * estimated)
        return float(both.mean()) - POWER

    high = 1.0
    while lacking(high) < 0:
        high *= 2
    return float(optimize.brentq(lacking, 0.0, high)) * sd / n**0.5
