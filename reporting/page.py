"""The contents of the report in reading order: the answer, then the sections.

`contents` returns them as plain values; templates/ has the HTML and Markdown templates.
"""

import statistics
from typing import Any

from reporting import differences, figures, paper, sections, sweep_section, text
from reporting.analysis import CARDS, Analysis
from reporting.paired import Comparison, Difference
from reporting.parts import Card
from reporting.runs import Run, Variant, conditions
from reporting.sections import CONDITIONS, PROVENANCE
from reporting.text import DASH, count, first_few, interval, p_in_words, short, signed

# Index of the section on attention settings, unless it comes first.
SETTINGS_AT = 2
SECTIONS = (
    sections.scores_section,
    differences.differences_section,
    differences.equal_cost_section,
    sections.curves_section,
    sections.cost_section,
    differences.classes_section,
    sections.attention_section,
    paper.paper_section,
    sections.provenance_section,
    sections.excluded_section,
)


def contents(analysis: Analysis) -> dict[str, Any]:
    """Return everything that the templates show."""
    sweep = analysis.main_sweep
    shown_sections = [made for section in SECTIONS if (made := section(analysis)) is not None]
    shown = cards(analysis.nearest) if sweep is None or analysis.nearest else []
    settings = sweep_section.section(analysis.sweeps)
    if settings is not None:
        shown_sections.insert(SETTINGS_AT if sweep is None else 0, settings)
    return {
        "title": "Does attention help?" if sweep is None else sweep_section.title(sweep),
        "summary": summary_line(analysis),
        "cards": [*(sweep_section.cards(sweep) if sweep else []), *shown],
        "forest": sections.forest(analysis),
        "caveats": caveats(analysis),
        "sections": shown_sections,
    }


def summary_line(analysis: Analysis) -> str:
    """Summarize what was compared in a few words."""
    name, _, on = analysis.data.rpartition(" ")
    where = "the test set"
    if on == "val":
        where = " or ".join(sorted({_validation_images(run) for run in analysis.runs}))
    models = first_few(dict.fromkeys(variant.model for variant in analysis.variants))
    epochs = first_few(dict.fromkeys(variant.setting("epochs") for variant in analysis.variants))
    runs, variants = len(analysis.runs), len(analysis.variants)
    line = (
        f"{count(runs, 'finished run')} of {count(variants, 'variant')} on {text.dataset(name)}, "
        f"evaluated on {where}. Network: {models}; epochs: {epochs}. "
        "Scores are those of the last epoch, not of the best one."
    )
    if analysis.excluded:
        line += f" {count(len(analysis.excluded), 'folder')} excluded, listed at the end."
    return line


def _validation_images(run: Run) -> str:
    if run.summary["config"]["data"].get("val_size"):
        return "the validation set, held out from the training images"
    return "its own validation images"


# ---- Cards --------------------------------------------------------------------------------------


def cards(comparisons: list[Comparison]) -> list[Card]:
    """The cards at the top of the page, augmented variants first."""
    augmented = [c for c in comparisons if c.variant.attention == "aa"]
    others = [c for c in comparisons if c.variant.attention != "aa"]
    if not comparisons:
        outcome = "There are no finished runs of both a plain network and one with attention."
        how = "A variant is compared with attention=none on the same network and data."
        return [Card("No comparison", DASH, "", outcome, [how])]
    if len(augmented) > CARDS:
        return [_card_of_many(augmented), *map(_card, others[: CARDS - 1])]
    return [_card(comparison) for comparison in [*augmented, *others][:CARDS]]


def _card(comparison: Comparison) -> Card:
    found, label = comparison.top1, comparison.variant.label
    p = "" if found.p is None else f", {p_in_words(found.p)}"
    details = [
        "no interval" if found.low is None else f"95 % interval {interval(found.low, found.high)}",
        f"n = {count(found.n, 'pair')} of seeds{p}",
    ]
    if found.n:
        ours, theirs = (
            statistics.mean(variant.by_seed("top1")[seed] for seed in found.by_seed)
            for variant in (comparison.variant, comparison.baseline)
        )
        details.append(f"{ours:.2f} % vs. {theirs:.2f} %")
    if comparison.differing:
        details.append(f"other settings differ: {', '.join(map(short, comparison.differing))}")
    return Card(
        f"{label} vs. {comparison.baseline.label}",
        signed(found.mean),
        "percentage points of top-1 accuracy",
        verdict(found, label),
        details,
        {1: "better", -1: "worse", 0: "open"}[found.sign],
    )


def verdict(found: Difference, label: str) -> str:
    """The conclusion that the paired differences support."""
    if found.n == 0:
        return "No seed in common, so there is no paired difference."
    if found.n == 1:
        return "A single pair of seeds: this may be chance."
    if found.low is None:
        return "All pairs differ by the same amount, so there is no spread to test against."
    if found.sign:
        return f"{label} is {'better' if found.sign > 0 else 'worse'} than plain."
    return "No significant difference."


def _card_of_many(comparisons: list[Comparison]) -> Card:
    signs = [comparison.top1.sign for comparison in comparisons]
    tested = sum(comparison.top1.low is not None for comparison in comparisons)
    means = [comparison.top1.mean for comparison in comparisons if comparison.top1.mean is not None]
    outcome = "No variant shares a seed with its plain baseline."
    if means:
        low, high = signed(min(means)), signed(max(means))
        outcome = f"Mean differences in top-1 range from {low} to {high} percentage points."
    return Card(
        f"{len(comparisons)} augmented variants, each vs. its plain baseline",
        f"{signs.count(1)} better, {signs.count(-1)} worse",
        f"and {signs.count(0)} undecided",
        outcome,
        [
            f"{tested} of them have at least two pairs of seeds, as an interval needs",
            "95 % intervals, not corrected for multiple comparisons: by chance alone, about "
            f"{0.05 * tested:.1f} of {tested} would exclude zero",
        ],
    )


# ---- Caveats ---------------------------------------------------


def caveats(analysis: Analysis) -> list[str]:
    """The caveats a reader should know before trusting the differences."""
    found = []
    for comparison in analysis.nearest if len(analysis.nearest) <= figures.ROWS else []:
        if comparison.differing:
            found.append(
                f"{comparison.variant.label} and {comparison.baseline.label} were not trained with "
                f"the same settings: {comparison.differing_in_words}."
            )
    saturated = [v.label for v in analysis.variants if _began_saturated(v)]
    if saturated:
        found.append(
            f"The attention of {first_few(saturated)} began nearly one-hot (attention.init=kaiming "
            "without attention.qk_norm, the only option in older runs), which slows "
            "early training: `scripts/softness.py` measures it."
        )
    for condition, differently in CONDITIONS.items():
        values = conditions(analysis.runs, condition)
        if len(values) > 1:
            mixed = [v.label for v in analysis.variants if len(conditions(v.runs, condition)) > 1]
            who = f"The runs of {first_few(mixed)}" if mixed else "The variants"
            found.append(
                f"{who} were trained {differently} ({first_few(values)}); see “{PROVENANCE}”."
            )
    return found


def _began_saturated(variant: Variant) -> bool:
    """Whether attention started on an unnormalized stream with weights too large for it."""
    start = (variant.settings.get("attention.init"), variant.settings.get("attention.qk_norm"))
    return start == ("kaiming", False) and variant.settings.get("model.block") != "preact"
