"""What the runs of one data set show: read once, and computed once for report and dashboard."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from reporting.equal_cost import EqualCost, at_equal_cost
from reporting.factorial import Error
from reporting.paired import Comparison, Difference, corrected, paired, pooled, unpaired
from reporting.runs import Excluded, Run, Variant, group_by_variant, grouped, read, select_data
from reporting.sweeps import Sweep, find_sweeps

# Comparisons that get a card at the head of the page; of more, the first card counts them.
CARDS = 3
Differences = dict[Comparison, Difference]
# A value for each seed and epoch.
Curves = dict[Variant, list[list[float]]]


@dataclass(frozen=True, eq=False)
class Analysis:
    """The variants of one data set, and what follows from them; each part when it is first read."""

    data: str  # and which part of it was evaluated: `cifar100 test`
    variants: list[Variant]  # in the order of Table 1
    excluded: list[Excluded]

    @property
    def runs(self) -> list[Run]:
        return [run for variant in self.variants for run in variant.runs]

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Each variant with attention against the plain network of the nearest settings.

        Network and data must be the same. Other plain networks that are trained for as many epochs
        follow: a different recipe gives another answer, and `Comparison.differing` says how it
        differs.
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
        """For each variant the comparison with its nearest baseline."""
        return [same[0] for same in grouped(self.comparisons, lambda c: c.variant).values()]

    @cached_property
    def among_others(self) -> Differences:
        """All differences between networks of one recipe but attention's from plain, corrected.

        Those of the networks without augmented convolutions from plain, then attention's from each
        of them. Empty where there are several variants of a kind, several baselines, or settings
        that differ.
        """
        by_kind = {c.variant.attention: c for c in self.nearest if not c.differing}
        baselines = {c.baseline for c in self.nearest}
        if "aa" not in by_kind or len(by_kind) < len(self.nearest) or len(baselines) > 1:
            return {}
        augmented = by_kind.pop("aa").variant
        family = [*by_kind.values(), *(Comparison(augmented, c.variant) for c in by_kind.values())]
        return corrected({comparison: comparison.top1 for comparison in family})

    def unpaired(self, score: str) -> tuple[Error, Differences] | None:
        """`nearest` by means over all seeds, corrected, and the error that all variants share.

        None where no variant has two seeds.
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
        """The differences of `nearest` on the training images, as augmented in the last epoch."""
        found = {c: c.difference("train/top1") for c in self.nearest}
        return {c: difference for c, difference in found.items() if difference.n}

    def by_epoch(self, column: str) -> Curves:
        """A column of metrics.csv, of the variants all of whose runs have it."""
        return {
            variant: [run.each_epoch(column) for run in variant.runs]
            for variant in self.variants
            if all(run.has(column) for run in variant.runs)
        }

    @cached_property
    def gains(self) -> Curves:
        """Top-1 minus the nearest baseline's, by seed and epoch, where their epochs are as many."""
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
        """The first augmented variant that shares seeds with plain; its differences by class.

        They have ascending means and are corrected for their number.
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
        """The grids of attention's settings, one for each recipe that was trained with several."""
        return find_sweeps(self.variants, self.excluded)

    @cached_property
    def main_sweep(self) -> Sweep | None:
        """The largest sweep, where it is what the runs were made for: the page begins with it.

        Of equally large ones it is that of the best settings.
        """
        if not self.sweeps:
            return None
        largest = max(self.sweeps, key=lambda s: (len(s.by_levels), s.ranking[0].mean))
        return largest if len(largest.by_levels) > CARDS or not self.nearest else None


def analyze(folders: list[Path], data: str | None = None) -> Analysis:
    """The analysis of the finished runs in and below ``folders``.

    ``data`` is the data set that it is about, by default the one of most runs.

    Raises:
        ValueError: a folder does not exist, or there is no finished run, or none of ``data``.
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
    """Of the classes that both have scores of; of runs with other classes there are none."""
    names = comparison.variant.first["class_names"]

    def by_seed(variant: Variant, number: int) -> dict[int, float]:
        same = [run for run in variant.runs if run.summary["class_names"] == names]
        top1 = {run.seed: run.summary["per_class_top1"][number] for run in same}
        return {seed: value for seed, value in top1.items() if value is not None}

    pair = (comparison.variant, comparison.baseline)
    found = [(name, paired(*(by_seed(v, at) for v in pair))) for at, name in enumerate(names)]
    shared = [(name, difference) for name, difference in found if difference.n]
    return dict(sorted(shared, key=lambda row: (row[1].mean or 0.0, row[0])))
