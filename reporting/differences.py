"""The report's sections on differences: from plain, among all four, at equal cost, by class."""

import statistics

from reporting import figures
from reporting.equal_cost import at_equal_cost
from reporting.paired import (
    LEVEL,
    Comparison,
    among_others,
    detectable,
    holm,
    nearest,
    paired,
)
from reporting.parts import Picture, Section, Table
from reporting.runs import Run
from reporting.text import (
    DASH,
    MINUS,
    by_seed_signed,
    count,
    interval,
    p_value,
    signed,
    signed_or_dash,
)

# Mean accuracy of the last epoch's steps.
TRAINED = "train/top1"


def differences_section(comparisons: list[Comparison]) -> Section | None:
    """The paired differences and the test that the intervals come from."""
    if not comparisons:
        return None
    head = ["variant", "other settings that differ", "n", "top-1", "95 % interval", "t (df)", "p"]
    head += ["top-1 by seed", "top-5 (interval)"]
    rows = []
    for comparison in comparisons:
        found, top5 = comparison.top1, comparison.top5
        rows.append(
            [
                _name(comparison),
                in_words(comparison) or "none",
                str(found.n),
                signed_or_dash(found.mean),
                interval(found.low, found.high),
                DASH if found.t is None else f"{signed(found.t)} ({found.n - 1})",
                p_value(found.p).removeprefix("= "),
                by_seed_signed(found.by_seed),
                DASH
                if top5.mean is None
                else f"{signed(top5.mean)} ({interval(top5.low, top5.high)})",
            ]
        )
    return Section(
        "Differences from the plain baseline",
        [
            "In percentage points. Runs with the same seed form a pair. The interval and p are "
            "from a two-sided paired t-test, which assumes normally distributed differences; a "
            "single pair has neither. They are not corrected for multiple comparisons."
        ],
        [
            Table(head, rows, texts=2),
            *_among_others(nearest(comparisons)),
            *_in_training(nearest(comparisons)),
            *_power(nearest(comparisons)),
        ],
    )


def _among_others(comparisons: list[Comparison]) -> list[Table]:
    """The differences of Table 1 beside the main one, corrected for their number."""
    others = among_others(comparisons)
    if not others:
        return []
    corrected = holm([comparison.top1.p for comparison in others])
    rows = [
        [
            _name(comparison),
            str(comparison.top1.n),
            signed_or_dash(comparison.top1.mean),
            interval(comparison.top1.low, comparison.top1.high),
            p_value(comparison.top1.p).removeprefix("= "),
            p_value(p).removeprefix("= "),
        ]
        for comparison, p in zip(others, corrected, strict=True)
    ]
    head = ["difference", "n", "top-1", "95 % interval", "p", "p by Holm"]
    caption = (
        f"All differences between the networks but attention's from plain; in the last column p is "
        f"corrected for the {len(rows)} of them, the intervals are not."
    )
    return [Table(head, rows, caption=caption)]


def _in_training(comparisons: list[Comparison]) -> list[Table]:
    """The differences on the training images: whether a network fits less or generalises less."""
    rows = []
    for comparison in comparisons:
        variant, baseline = comparison.variant, comparison.baseline
        found = paired(variant.by_seed(TRAINED), baseline.by_seed(TRAINED))
        if found.mean is not None:
            rows.append(
                [
                    _name(comparison),
                    str(found.n),
                    signed(found.mean),
                    interval(found.low, found.high),
                    by_seed_signed(found.by_seed),
                ]
            )
    if not rows:
        return []
    caption = (
        "The same on the training images, as they were augmented in the last epoch: a network that "
        "is lower here has fitted them less, one that is lower on the test set alone generalises "
        "less."
    )
    return [Table(["difference", "n", "top-1", "95 % interval", "by seed"], rows, caption=caption)]


def _power(comparisons: list[Comparison]) -> list[Table]:
    """What the designs could have found."""
    rows = [
        [
            _name(comparison),
            str(comparison.top1.n),
            f"{sd:.2f}",
            f"{detectable(comparison.top1.n, sd):.2f}",
        ]
        for comparison in comparisons
        if comparison.top1.low is not None and (sd := comparison.top1.sd) is not None
    ]
    if not rows:
        return []
    caption = (
        "What this many pairs can find: the true difference of top-1 that the test finds in four "
        "of five cases, if pairs differ as much as they do here."
    )
    return [Table(["difference", "n", "sd of the pairs", "found"], rows, caption=caption)]


def equal_cost_section(comparisons: list[Comparison]) -> Section | None:
    """The differences at equal training time and at equal FLOPs."""
    found = [equal for comparison in comparisons for equal in at_equal_cost(comparison)]
    if not found:
        return None
    rows = [
        [
            _name(one.comparison),
            one.cost,
            f"{one.ratio:.2f}",
            f"{one.epochs[0]} and {one.epochs[1]}",
            str(one.found.n),
            signed_or_dash(one.found.mean),
            interval(one.found.low, one.found.high),
            by_seed_signed(one.found.by_seed),
        ]
        for one in found
    ]
    head = [
        "difference",
        "equal",
        "ratio",
        "after epochs",
        "n",
        "top-1",
        "95 % interval",
        "by seed",
    ]
    return Section(
        "At equal cost",
        [
            "The network that needs less for all of its epochs sets the budget; the other one is "
            "read after the last epoch that it has finished within it, in the middle of its "
            "schedule. That favours the one whose learning rate has come down. The ratio is what "
            "an epoch of the first costs, over what one of the second does."
        ],
        [Table(head, rows, texts=2)],
    )


def classes_section(comparisons: list[Comparison]) -> Section | None:
    """Which classes gain and lose, for the first augmented variant that shares seeds with plain."""
    for comparison in comparisons:
        rows = _by_class(comparison) if comparison.variant.attention == "aa" else []
        if rows:
            break
    else:
        return None
    n = comparison.top1.n
    cut = len(rows) > 2 * figures.CLASSES
    ends = f"the {figures.CLASSES} classes that lose and that gain most" if cut else "all classes"
    unit = "AA minus plain, top-1 (percentage points)"
    corrected = holm(
        [paired(dict(enumerate(pairs)), dict.fromkeys(range(n), 0.0)).p for _, _, pairs in rows]
    )
    told = sum(p is not None and p < 1 - LEVEL for p in corrected)
    head = ["class", "AA minus plain", "by pair", "p by Holm"]
    table = [
        [name, signed(mean), ", ".join(map(signed, pairs)), p_value(p).removeprefix("= ")]
        for (name, mean, pairs), p in reversed(list(zip(rows, corrected, strict=True)))
    ]
    text = (
        f"{comparison.variant.label} minus {comparison.baseline.label}, n = "
        f"{count(n, 'pair')} of seeds. With few test images per class and many classes, "
        "some differ a lot by chance alone."
    )
    if any(p is not None for p in corrected):
        text += (
            f" By paired t-tests, corrected by Holm for the {len(rows)} classes, "
            f"{told or 'none'} of them {'differs' if told < 2 else 'differ'}."
        )
    return Section(
        "Classes",
        [text],
        pictures=[
            Picture(
                "classes",
                "Differences by class",
                figures.classes(rows, unit),
                f"Mean difference of {ends}" + ("; dots are the pairs." if n > 1 else "."),
            )
        ],
        folded=(
            f"all {len(rows)} classes",
            Table(head, table),
        ),
    )


def _by_class(comparison: Comparison) -> list[tuple[str, float, list[float]]]:
    names = comparison.variant.first["class_names"]
    ours, theirs = (
        {run.seed: run.summary["per_class_top1"] for run in variant.runs if _classes(run) == names}
        for variant in (comparison.variant, comparison.baseline)
    )
    rows = []
    for number, name in enumerate(names):
        both = [s for s in comparison.top1.by_seed if s in ours and s in theirs]
        scores = [(ours[seed][number], theirs[seed][number]) for seed in both]
        pairs = [a - b for a, b in scores if a is not None and b is not None]
        if pairs:
            rows.append((name, statistics.mean(pairs), pairs))
    return sorted(rows, key=lambda row: (row[1], row[0]))


def _classes(run: Run) -> list[str]:
    return list(run.summary["class_names"])


def _name(comparison: Comparison) -> str:
    return f"{comparison.variant.label} {MINUS} {comparison.baseline.label}"


def in_words(comparison: Comparison) -> str:
    return "; ".join(f"{key} {a} vs. {b}" for key, (a, b) in comparison.differing.items())
