"""Differences of a network to its plain twin, paired by seed, and what can be concluded."""

import statistics
from dataclasses import dataclass
from typing import Any

from scipy import stats

from reporting.runs import Group

LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Differences by seed; the interval and the test are None where nothing bears them."""

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
        """1 or -1 where the interval is on one side of zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class Comparison:
    """A group, its plain twin, and what differs between them beside the attention."""

    group: Group
    twin: Group
    differing: dict[str, tuple[Any, Any]]  # setting: (the group's, the twin's)
    top1: Difference
    top5: Difference


def paired(ours: dict[int, float], theirs: dict[int, float]) -> Difference:
    """``ours`` minus ``theirs`` over the seeds of both; two-sided paired t-test, 95 % interval.

    One pair has no interval, and neither have pairs that all differ by the same: the spread that
    the test divides by is then unknown or zero.
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


def compare_with_plain(groups: list[Group]) -> list[Comparison]:
    """Each group against the plain network whose settings are nearest to its own.

    Networks and data must be the same. Other plain twins that are trained for as many epochs
    follow: a recipe that differs is one more answer, and `Comparison.differing` says in what.
    """
    found = []
    for one in groups:
        if one.attention == "plain":
            continue
        twins = [g for g in groups if g.attention == "plain" and _subject(g) == _subject(one)]
        twins.sort(key=lambda g: len(_differing(one, g)))
        for twin in twins:
            if twin is twins[0] or twin.settings.get("epochs") == one.settings.get("epochs"):
                top1 = paired(one.scores("top1"), twin.scores("top1"))
                top5 = paired(one.scores("top5"), twin.scores("top5"))
                found.append(Comparison(one, twin, _differing(one, twin), top1, top5))
    return found


def nearest(comparisons: list[Comparison]) -> list[Comparison]:
    """Of each group the comparison with its nearest twin."""
    first: dict[Group, Comparison] = {}
    for one in comparisons:
        first.setdefault(one.group, one)
    return list(first.values())


def _subject(one: Group) -> dict[str, Any]:
    return {k: v for k, v in one.settings.items() if k.startswith(("model.", "data."))}


def _differing(ours: Group, theirs: Group) -> dict[str, tuple[Any, Any]]:
    keys = sorted(ours.settings.keys() | theirs.settings.keys())
    pairs = {k: (ours.settings.get(k), theirs.settings.get(k)) for k in keys}
    return {k: v for k, v in pairs.items() if v[0] != v[1] and not k.startswith("attention.")}
