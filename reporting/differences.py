"""The report's sections on differences: from the plain network, at equal cost, and by class."""

from reporting import figures, text
from reporting.analysis import Analysis, Differences
from reporting.factorial import LEVEL
from reporting.paired import Difference, minimum_detectable_difference
from reporting.parts import Picture, Section, Table, tables
from reporting.text import DASH, interval, p_value, signed


def cells(found: Difference, *headings: str) -> dict[str, str]:
    """The table cells of a difference in top-1, for the given ``headings``."""
    by_seed = ", ".join(f"{seed}: {signed(value)}" for seed, value in found.by_seed.items())
    every = {
        "n": str(found.n),
        "top-1": signed(found.mean),
        "95 % interval": interval(found.low, found.high),
        "t (df)": DASH if found.t is None else f"{signed(found.t)} ({found.n - 1})",
        "p": p_value(found.p),
        "p (Holm)": p_value(found.p_holm),
        "by seed": by_seed or DASH,
        "top-1 by seed": by_seed or DASH,
    }
    return {heading: every[heading] for heading in headings}


def differences_section(analysis: Analysis) -> Section | None:
    """The paired differences and the tests that their intervals come from."""
    if not analysis.comparisons:
        return None
    headings = ("n", "top-1", "95 % interval", "t (df)", "p", "top-1 by seed")
    rows = []
    for comparison in analysis.comparisons:
        row = {"variant": comparison.name}
        row["other settings that differ"] = comparison.differing_in_words or "none"
        row |= cells(comparison.top1, *headings)
        top5 = comparison.difference("top5")
        known = f"{signed(top5.mean)} ({interval(top5.low, top5.high)})"
        row["top-5 (interval)"] = known if top5.n else DASH
        rows.append(row)
    return Section(
        "Differences from the plain baseline",
        [
            "In percentage points. Runs with the same seed form a pair. The interval and p are "
            "from a two-sided paired t-test, which assumes normally distributed differences; a "
            "single pair has neither. They are not corrected for multiple comparisons."
        ],
        [
            *tables(rows, texts=2),
            *_unpaired(analysis),
            *_table(
                analysis.among_others,
                ("n", "top-1", "95 % interval", "p", "p (Holm)"),
                "The other networks minus plain, and attention minus each of them; in the last "
                f"column p is corrected for the {len(analysis.among_others)} of them, the "
                "intervals are not.",
            ),
            *_table(
                analysis.in_training,
                ("n", "top-1", "95 % interval", "by seed"),
                "The same on the training images, as they were augmented in the last epoch: a "
                "network that is lower here has fitted them less, one that is lower on the test "
                "set alone generalizes less.",
            ),
            *_power(analysis),
        ],
    )


def _table(found: Differences, headings: tuple[str, ...], caption: str) -> list[Table]:
    """A table of the differences, or no table if there are none."""
    rows = [{"difference": c.name, **cells(one, *headings)} for c, one in found.items()]
    return tables(rows, caption=caption)


def _unpaired(analysis: Analysis) -> list[Table]:
    """Unpaired differences in top-1 and loss, which need no common seeds."""
    rows = [
        {"difference": c.name, "n": f"{len(c.variant.runs)} and {len(c.baseline.runs)}"}
        for c in analysis.nearest
    ]
    deviations = []
    for score, name, unit, digits in (("top1", "top-1", "points", 2), ("loss", "loss", "nats", 3)):
        if (found := analysis.unpaired(score)) is None:
            continue
        error, differences = found
        deviations.append(f"{error.sd:.{digits}f} {unit}")
        for row, one in zip(rows, differences.values(), strict=True):
            bounds = interval(one.low, one.high, digits)
            row[f"{name} (95 % interval)"] = f"{signed(one.mean, digits)} ({bounds})"
            row[f"p of {name} (Holm)"] = p_value(one.p_holm)
    if not deviations:
        return []
    caption = (
        "Unpaired: means over all seeds, top-1 in percentage points, the loss (cross-entropy) "
        "in nats. Intervals and p are from t-tests with one standard deviation for all networks "
        f"({', '.join(deviations)}, {text.count(error.df, 'degree')} of freedom); p is corrected "
        "for the number of rows. This finds more than pairs do if runs with the same seed are no "
        "more alike than others. The loss also counts how confident a network is."
    )
    return tables(rows, caption=caption)


def _power(analysis: Analysis) -> list[Table]:
    """The minimum difference that each paired test could have detected."""
    rows = []
    for comparison in analysis.nearest:
        found = comparison.top1
        if found.sd is not None and found.low is not None:
            least = minimum_detectable_difference(found.n, found.sd)
            row = {"difference": comparison.name, "n": str(found.n)}
            row |= {"sd of the pairs": f"{found.sd:.2f}", "minimum detectable": f"{least:.2f}"}
            rows.append(row)
    caption = (
        "What this many pairs can find: the true difference of top-1 that the test finds in four "
        "of five cases, if pairs differ as much as they do here."
    )
    return tables(rows, caption=caption)


def equal_cost_section(analysis: Analysis) -> Section | None:
    """The differences at equal training time and at equal FLOPs."""
    rows = [
        {
            "difference": equal.comparison.name,
            "equal": equal.cost,
            "ratio": f"{equal.ratio:.2f}",
            "after epochs": f"{equal.epochs[0]} and {equal.epochs[1]}",
            **cells(equal.top1, "n", "top-1", "95 % interval", "by seed"),
        }
        for equal in analysis.equal_cost
    ]
    if not rows:
        return None
    return Section(
        "At equal cost",
        [
            "The network that is cheaper over all of its epochs sets the budget; the other one is "
            "read after the last epoch that it finishes within that budget, in the middle of its "
            "schedule. That favors the one whose learning rate has decayed. The ratio is the cost "
            "of an epoch of the first network over that of the second."
        ],
        tables(rows, texts=2),
    )


def classes_section(analysis: Analysis) -> Section | None:
    """The classes that gain and lose, for the first augmented variant sharing seeds with plain."""
    if analysis.classes is None:
        return None
    comparison, found = analysis.classes
    n = comparison.top1.n
    cut = len(found) > 2 * figures.CLASSES
    ends = f"the {figures.CLASSES} classes that lose most and as many that gain most"
    ends = ends if cut else "all classes"
    words = (
        f"{comparison.variant.label} minus {comparison.baseline.label}, n = "
        f"{text.count(n, 'pair')} of seeds. With few test images per class and many classes, "
        "some differ a lot by chance alone."
    )
    p_values = [one.p_holm for one in found.values() if one.p_holm is not None]
    if p_values:
        number = sum(p < 1 - LEVEL for p in p_values)
        words += (
            f" By paired t-tests, corrected by Holm for {len(p_values)} classes, "
            f"{number or 'none'} of them {'differs' if number < 2 else 'differ'}."
        )
    picture = Picture(
        "classes",
        "Differences by class",
        figures.by_class(list(found.items())),
        f"Mean difference of {ends}" + ("; dots are the pairs." if n > 1 else "."),
    )
    rows = [
        {
            "class": name,
            "AA minus plain": signed(difference.mean),
            "by pair": ", ".join(map(signed, difference.by_seed.values())),
            **cells(difference, "p (Holm)"),
        }
        for name, difference in reversed(found.items())
    ]
    (every,) = tables(rows)
    folded = (f"all {len(rows)} classes", every)
    return Section("Classes", [words], pictures=[picture], folded=folded)
