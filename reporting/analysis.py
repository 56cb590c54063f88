"""The analysis of the runs on one data set, computed once for both the report and the dashboard."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reporting.equal_cost import EqualCost, at_equal_cost
from reporting.factorial import Error
from reporting.paired import Comparison, Difference, corrected, paired, pooled, unpaired
from reporting.runs import Excluded, Run, Variant, group_by_variant, grouped, read, select_data
from reporting.sweeps import Sweep, find_sweeps

# Comparisons that get a card of their own at the top of the page; more share one card of counts.
CARDS = 3
Differences = dict[Comparison, Difference]
# For each variant, one list per seed with a value per epoch.
Curves = dict[Variant, list[list[float]]]


@dataclass(frozen=True, eq=False)
class Analysis:
    """The variants of one data set and the results derived from them, computed on first access."""

    data: str  # the data set and the evaluated split: `cifar100 test`
    variants: list[Variant]  # in the order of Table 1
    excluded: list[Excluded]

    @property
    def runs(self) -> list[Run]:
        return [run for variant in self.variants for run in variant.runs]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each variant that is not plain against the plain network with the closest settings.

        Network and data must be the same. Comparisons with other plain networks trained for the
        same number of epochs follow: a different recipe may give a different answer, and
        `Comparison.differing` lists the settings that differ.
        """
        plain = [variant for variant in self.variants if variant.attention == "none"]
        found = []
        for variant in self.variants:
            if variant.attention == "none":
                continue
            of_same = [Comparison(variant, p) for p in plain if _subject(p) == _subject(variant)]
            of_same.sort(key=lambda comparison: len(comparison.differing))
            found += of_same[:1] + [c for c in of_same[1:] if "epochs" not in c.differing]
        return found

    @cached_property
    def nearest(self) -> list[Comparison]:
        """The comparison of each variant with its nearest baseline."""
        return [same[0] for same in grouped(self.comparisons, lambda c: c.variant).values()]

    @cached_property
    def among_others(self) -> Differences:
        """All differences between networks of one recipe except AA minus plain, Holm-corrected.

        First each network without augmented convolutions minus plain, then AA minus each of those.
        Empty if there are several variants of a kind, several baselines, or differing settings.
        """
        by_kind = {c.variant.attention: c for c in self.nearest if not c.differing}
        baselines = {c.baseline for c in self.nearest}
        if "aa" not in by_kind or len(by_kind) < len(self.nearest) or len(baselines) > 1:
            return {}
        augmented = by_kind.pop("aa").variant
        family = [*by_kind.values(), *(Comparison(augmented, c.variant) for c in by_kind.values())]
        return corrected({comparison: comparison.top1 for comparison in family})

    def unpaired(self, score: str) -> tuple[Error, Differences] | None:
        """The pooled error of all variants and the Holm-corrected differences of `nearest`.

        None if no variant has two seeds, or if the seeds of each variant all agree.
        """
        error = pooled([variant.by_seed(score).values() for variant in self.variants])
        if error is None:
            return None
        found = {}
        for c in self.nearest:
            ours, theirs = (v.by_seed(score).values() for v in (c.variant, c.baseline))
            found[c] = unpaired(ours, theirs, error)
        return error, corrected(found)

    @cached_property
    def in_training(self) -> Differences:
        """The differences of `nearest` on the augmented training images of the last epoch."""
        found = {c: c.difference("train/top1") for c in self.nearest}
        return {c: difference for c, difference in found.items() if difference.n}

    def by_epoch(self, column: str) -> Curves:
        """A column of metrics.csv, for the variants whose runs all have it."""
        return {
            variant: [run.each_epoch(column) for run in variant.runs]
            for variant in self.variants
            if all(run.has(column) for run in variant.runs)
        }

    @cached_property
    def gains(self) -> Curves:
        """Top-1 minus the nearest baseline's by seed and epoch, if both have as many epochs."""
        gains = {}
        for comparison in self.nearest:
            if comparison.top1.n and "epochs" not in comparison.differing:
                theirs = {run.seed: run.each_epoch("top1") for run in comparison.baseline.runs}
                gains[comparison.variant] = [
                    [a - b for a, b in zip(run.each_epoch("top1"), theirs[run.seed], strict=True)]
                    for run in comparison.variant.runs
                    if run.seed in theirs
                ]
        return gains

    @cached_property
    def classes(self) -> tuple[Comparison, dict[str, Difference]] | None:
        """The first augmented variant that shares seeds with plain, and its differences by class.

        The differences are sorted by ascending mean and Holm-corrected.
        """
        for comparison in self.nearest:
            if comparison.variant.attention == "aa" and (found := _by_class(comparison)):
                return comparison, corrected(found)
        return None

    @cached_property
    def equal_cost(self) -> list[EqualCost]:
        """`nearest` at equal training time and at equal FLOPs."""
        return [equal for comparison in self.nearest for equal in at_equal_cost(comparison)]

    @cached_property
    def sweeps(self) -> list[Sweep]:
        """The sweeps over the attention settings, one for each recipe trained with several."""
        return find_sweeps(self.variants, self.excluded)

    @cached_property
    def main_sweep(self) -> Sweep | None:
        """The largest sweep if the runs are mainly a sweep; the page then begins with it.

        Ties go to the sweep with the best settings.
        """
        if not self.sweeps:
            return None
        largest = max(self.sweeps, key=lambda s: (len(s.by_levels), s.ranking[0].mean))
        return largest if len(largest.by_levels) > CARDS or not self.nearest else None


def analyze(folders: list[Path], data: str | None = None) -> Analysis:
    """Analyze the finished runs in and below ``folders``.

    ``data`` selects the data set, by default the one with the most runs.

    Raises:
        ValueError: if a folder does not exist, or there is no finished run (of ``data``).
    """
    runs, excluded = read(folders)
    if not runs:
        reasons = "; ".join(f"{e.folder.name} {e.kind} ({e.why})" for e in excluded[:3])
        raise ValueError(f"no finished run in {', '.join(map(str, folders))}: {reasons}")
    data, runs, others = select_data(runs, data)
    variants, duplicates = group_by_variant(runs)
    return Analysis(data, variants, excluded + others + duplicates)


def _subject(variant: Variant) -> dict[str, Any]:
    return {k: v for k, v in variant.settings.items() if k.startswith(("model.", "data."))}


def _by_class(comparison: Comparison) -> dict[str, Difference]:
    """Differences for the classes both variants have scores of; skip runs with other classes."""
    names = comparison.variant.first["class_names"]

    def by_seed(variant: Variant, number: int) -> dict[int, float]:
        same = [run for run in variant.runs if run.summary["class_names"] == names]
        top1 = {run.seed: run.summary["per_class_top1"][number] for run in same}
        return {seed: value for seed, value in top1.items() if value is not None}

    pair = (comparison.variant, comparison.baseline)
    found = [(name, paired(*(by_seed(v, at) for v in pair))) for at, name in enumerate(names)]
    shared = [(name, difference) for name, difference in found if difference.n]
    return dict(sorted(shared, key=lambda row: (row[1].mean or 0.0, row[0])))
