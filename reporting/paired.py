"""Differences of a variant from a plain network, paired by seed, and what they show."""

import statistics
from dataclasses import dataclass
from typing import Any

import numpy
from scipy import optimize, stats

from reporting.runs import Variant

LEVEL = 0.95
QUANTILES = 10_000


@dataclass(frozen=True)
class Difference:
    """Differences by seed; the interval and the test are None where there is no basis for them."""

    by_seed: dict[int, float]
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    t: float | None = None
    p: float | None = None

    @property
    def n(self) -> int:
        return len(self.by_seed)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """A variant, a plain network as its baseline, and how they differ besides the attention."""

    variant: Variant
    baseline: Variant
    differing: dict[str, tuple[str, str]]  # setting: (the variant's value, the baseline's)
    top1: Difference
    top5: Difference


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """``ours`` minus ``theirs`` over the seeds of both; two-sided paired t-test, 95 % interval.

    There is no interval for a single pair, and none for pairs that all differ by the same amount:
    the spread that the test divides by is then unknown or zero.
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


def compare_with_plain(variants: list[Variant]) -> list[Comparison]:
    """Each variant with attention against the plain network whose settings are nearest to its own.

    Network and data must be the same. Other plain networks that are trained for as many epochs
    follow: a different recipe gives another answer, and `Comparison.differing` says how it differs.
    """
    comparisons = []
    for variant in variants:
        if variant.attention == "none":
            continue
        baselines = [
            v for v in variants if v.attention == "none" and _subject(v) == _subject(variant)
        ]
        baselines.sort(key=lambda v: len(_differing(variant, v)))
        for baseline in baselines:
            same_epochs = baseline.settings["epochs"] == variant.settings["epochs"]
            if baseline is baselines[0] or same_epochs:
                comparisons.append(_compare(variant, baseline))
    return comparisons


def among_others(comparisons: list[Comparison]) -> list[Comparison]:
    """All differences between four networks of one recipe but attention's from plain.

    Those of the networks without augmented convolutions from plain, then attention's from each of
    them. Empty where there is more than one variant of a kind, or settings differ.
    """
    kinds = [comparison.variant.attention for comparison in comparisons]
    if any(c.differing for c in comparisons) or "aa" not in kinds or len(set(kinds)) < len(kinds):
        return []
    augmented = next(c.variant for c in comparisons if c.variant.attention == "aa")
    others = [c for c in comparisons if c.variant.attention != "aa"]
    return others + [_compare(augmented, other.variant) for other in others]


def holm(p_values: list[float | None]) -> list[float | None]:
    """P-values corrected for their number (Holm 1979); None, where there was no test, stays."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, index) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(tested) - rank)))
        corrected[index] = highest
    return corrected


def detectable(n: int, sd: float, power: float = 0.8) -> float:
    """The mean difference that a paired t-test finds with this ``power``, at the level of 5 %.

    ``n`` is the number of pairs, at least 2, and ``sd`` the standard deviation of their
    differences.
    """
    edge = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    # The quantiles of the estimated deviation over the true one; scipy's noncentral t has holes.
    quantiles = (numpy.arange(QUANTILES) + 0.5) / QUANTILES
    estimated = numpy.sqrt(stats.chi2.ppf(quantiles, n - 1) / (n - 1))

    def lacking(shift: float) -> float:
        both = stats.norm.cdf(shift - edge * estimated) + stats.norm.cdf(-shift - edge * estimated)
        return float(both.mean()) - power

    high = 1.0
    while lacking(high) < 0:
        high *= 2
    return float(optimize.brentq(lacking, 0.0, high)) * sd / n**0.5


def nearest(comparisons: list[Comparison]) -> list[Comparison]:
    """For each variant the comparison with its nearest baseline."""
    first: dict[Variant, Comparison] = {}
    for comparison in comparisons:
        first.setdefault(comparison.variant, comparison)
    return list(first.values())


def _compare(variant: Variant, baseline: Variant) -> Comparison:
    top1, top5 = (paired(variant.by_seed(s), baseline.by_seed(s)) for s in ("top1", "top5"))
    return Comparison(variant, baseline, _differing(variant, baseline), top1, top5)


def _subject(variant: Variant) -> dict[str, Any]:
    return {k: v for k, v in variant.settings.items() if k.startswith(("model.", "data."))}


def _differing(ours: Variant, theirs: Variant) -> dict[str, tuple[str, str]]:
    keys = sorted(ours.settings.keys() | theirs.settings.keys())
    keys = [key for key in keys if not key.startswith("attention.")]
    pairs = {key: (ours.setting(key), theirs.setting(key)) for key in keys}
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
