"""Differences of a variant from a plain network, paired by seed, and what they show."""

import statistics
from dataclasses import dataclass
from typing import Any

from scipy import stats

from reporting.runs import Variant

LEVEL = 0.95


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
