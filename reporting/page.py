"""What the report says: sentences, tables and pictures, in the order in which they are read.

`contents` gives them as plain values; templates/ has the two forms, HTML and Markdown.
"""

import statistics
from collections import defaultdict
from typing import Any

from reporting import figures, paper
from reporting.differences import (
    classes_section,
    differences_section,
    equal_cost_section,
    in_words,
)
from reporting.paired import Comparison, Difference, compare_with_plain, nearest
from reporting.parts import Card, Picture, Section, Table
from reporting.runs import KINDS, NOT_SET, Excluded, Run, Variant
from reporting.sweeps import sweep_card, sweep_section
from reporting.text import (
    DASH,
    against,
    as_text,
    by_seed,
    commit,
    count,
    dataset,
    gflops,
    interval,
    last_name,
    p_value,
    short,
    shortened,
    signed,
    signed_or_dash,
    spread,
)
from training.run_folder import WEIGHTS

# Comparisons that get a card at the head of the page; of more, the first card counts them.
CARDS = 3
PROVENANCE = "Where the numbers come from"
# What is no setting and yet may change a number, and how to say that runs differ in it.
FACTS = {
    "commit": "at different commits",
    "hardware": "on different hardware",
    "precision": "in different precisions",
    "torch": "with different versions of torch",
    "processes": "with different numbers of processes",
}


def contents(data: str, variants: list[Variant], excluded: list[Excluded]) -> dict[str, Any]:
    """Everything that the templates show of the variants, which are all of one data set."""
    comparisons = compare_with_plain(variants)
    first = nearest(comparisons)
    sections = [
        scores_section(data, variants),
        differences_section(comparisons),
        equal_cost_section(first),
        curves_section(variants, first),
        cost_section(variants),
        sweep_section(variants),
        classes_section(first),
        attention_section(variants),
        paper_section(data, variants),
        provenance_section(variants),
        excluded_section(excluded),
    ]
    return {
        "title": "Does attention help?",
        "summary": summary_line(data, variants, excluded),
        "cards": [*cards(first), *filter(None, [sweep_card(variants)])],
        "forest": _forest(first),
        "caveats": caveats(variants, first),
        "sections": [section for section in sections if section is not None],
    }


def summary_line(data: str, variants: list[Variant], excluded: list[Excluded]) -> str:
    """What was compared, in a few words."""
    name, _, on = data.rpartition(" ")
    where = {"test": "test set", "val": "validation set, held out from the training images"}[on]
    runs = count(sum(len(variant.runs) for variant in variants), "finished run")
    models = shortened(dict.fromkeys(variant.model for variant in variants))
    epochs = shortened(dict.fromkeys(variant.setting("epochs") for variant in variants))
    line = (
        f"{runs} of {count(len(variants), 'variant')} on {dataset(name)}, evaluated on the "
        f"{where}. Network: {models}; epochs: {epochs}. Scores are those of the last epoch, not "
        "of the best one."
    )
    if excluded:
        line += f" {count(len(excluded), 'folder')} excluded, listed at the end."
    return line


# ---- The answer ---------------------------------------------------------------------------------


def cards(comparisons: list[Comparison]) -> list[Card]:
    """The outcomes that the page begins with, attention's first."""
    augmented = [c for c in comparisons if c.variant.attention == "aa"]
    others = [c for c in comparisons if c.variant.attention != "aa"]
    if not comparisons:
        return [
            Card(
                "No comparison",
                DASH,
                "",
                "There are no finished runs of both a plain network and one with attention.",
                "open",
                ["A variant is compared with attention=none on the same network and data."],
            )
        ]
    if len(augmented) > CARDS:
        return [_card_of_many(augmented), *map(_card, others[: CARDS - 1])]
    return [_card(comparison) for comparison in [*augmented, *others][:CARDS]]


def _card(comparison: Comparison) -> Card:
    found, label = comparison.top1, comparison.variant.label
    details = [
        "no interval" if found.low is None else f"95 % interval {interval(found.low, found.high)}",
        f"n = {count(found.n, 'pair')} of seeds"
        + (f", p {p_value(found.p)}" if found.p is not None else ""),
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
        signed_or_dash(found.mean),
        "percentage points of top-1 accuracy",
        verdict(found, label),
        {1: "better", -1: "worse", 0: "open"}[found.sign],
        details,
    )


def verdict(found: Difference, label: str) -> str:
    """What the paired differences allow one to say."""
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
    tested = [comparison for comparison in comparisons if comparison.top1.low is not None]
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
        "open",
        [
            f"{len(tested)} of them have at least two pairs of seeds, as an interval needs",
            "95 % intervals, not corrected for multiple comparisons: by chance alone, about "
            f"{0.05 * len(tested):.1f} of {len(tested)} would exclude zero",
        ],
    )


def caveats(variants: list[Variant], comparisons: list[Comparison]) -> list[str]:
    """What a reader must know before believing the differences."""
    found = []
    for comparison in comparisons if len(comparisons) <= figures.ROWS else []:
        if comparison.differing:
            found.append(
                f"{comparison.variant.label} and {comparison.baseline.label} were not trained with "
                f"the same settings: {in_words(comparison)}."
            )
    saturated = [variant.label for variant in variants if _began_saturated(variant)]
    if saturated:
        found.append(
            f"The attention of {shortened(saturated)} began nearly one-hot (attention.init=kaiming "
            "without attention.qk_norm, as in all runs before there was a choice), which it has to "
            "unlearn first: `scripts/softness.py` measures it."
        )
    for fact, differently in FACTS.items():
        values = sorted({value for variant in variants for value in variant.facts(fact)})
        if len(values) == 1:
            continue
        mixed = [variant.label for variant in variants if len(variant.facts(fact)) > 1]
        who = f"The runs of {shortened(mixed)}" if mixed else "The variants"
        shown = shortened(commit(value) if fact == "commit" else value for value in values)
        found.append(f"{who} were trained {differently} ({shown}); see “{PROVENANCE}”.")
    return found


def _began_saturated(variant: Variant) -> bool:
    """Whether attention began on an unnormalized stream with weights too large for it."""
    start = (variant.settings.get("attention.init"), variant.settings.get("attention.qk_norm"))
    return start == ("kaiming", False) and variant.settings.get("model.block") != "preact"


def _forest(comparisons: list[Comparison]) -> Picture | None:
    drawn = [comparison for comparison in comparisons if comparison.top1.n]
    drawn.sort(key=lambda c: c.variant.attention != "aa")
    if not drawn:
        return None
    caption = (
        "Top-1 of the last epoch minus that of the plain network with the same seed: each pair "
        "(circle), their mean (diamond) and its 95 % interval (bar; none for a single pair)."
    )
    if len(drawn) > figures.ROWS:
        half = figures.ROWS // 2
        caption += f" Of {len(drawn)} variants, the {half} highest and the {half} lowest."
        drawn.sort(key=lambda c: -(c.top1.mean or 0.0))
        drawn = drawn[:half] + drawn[-half:]
    svg = figures.differences(drawn)
    return Picture("differences", "Differences from the plain baseline", svg, caption)


# ---- The sections -------------------------------------------------------------------------------


def scores_section(data: str, variants: list[Variant]) -> Section:
    """Table 1 of these runs, with the paper's numbers where it has such a network."""
    in_paper = any(_printed(data, variant) for variant in variants)
    seeds = sorted({run.seed for variant in variants for run in variant.runs})
    alike = all([run.seed for run in variant.runs] == seeds for variant in variants)
    head = ["variant", "n", "parameters", "GFLOPs", "top-1 %", "top-5 %", "top-1 by seed"]
    if in_paper:
        head += ["paper: parameters", "paper: GFLOPs", "paper: top-1 %", "paper: top-5 %"]
    rows = []
    for variant in variants:
        top1, top5 = variant.by_seed("top1"), variant.by_seed("top5")
        row = [
            variant.label,
            str(len(variant.runs)),
            f"{variant.first['parameters']:,}",
            gflops(variant.first["flops"]),
            spread(top1.values()),
            spread(top5.values()),
            by_seed(top1, alike),
        ]
        if in_paper:
            row += _cells(_printed(data, variant))
        rows.append(row)
    return Section(
        "Scores",
        ["Mean ± standard deviation over n seeds; a single run has no deviation."],
        [Table(head, rows)],
        notes=[f"Seeds, in this order: {', '.join(map(str, seeds))}."] if alike else [],
    )


def _printed(data: str, variant: Variant) -> paper.Row | None:
    if data != paper.DATA or variant.model != paper.MODEL:
        return None
    return paper.TABLE1.get(variant.attention)


def _cells(row: paper.Row | None) -> list[str]:
    if row is None:
        return [DASH] * 4
    return [f"{row.parameters} M", str(row.gflops), str(row.top1), str(row.top5)]


def curves_section(variants: list[Variant], comparisons: list[Comparison]) -> Section:
    """Loss, accuracy and the gain over the plain baseline by epoch."""
    pictures = [
        Picture(
            "top1",
            "Accuracy",
            figures.over_epochs(variants, "top1", "top-1 accuracy (%)"),
            "Top-1 accuracy after each epoch.",
        ),
        Picture(
            "loss",
            "Training loss",
            figures.over_epochs(variants, "train/loss", "training loss (nats)"),
            "Mean training loss of each epoch.",
        ),
    ]
    if any(figures.gain_by_epoch(comparison) for comparison in comparisons):
        gain = Picture(
            "gain",
            "Gain over plain",
            figures.gain_over_epochs(variants, comparisons),
            "Top-1 minus that of the plain baseline with the same seed, after each epoch.",
        )
        pictures.insert(1, gain)
    text = "Lines are means over seeds; bands span the lowest to the highest seed."
    return Section("Learning curves", [text], pictures=pictures)


def cost_section(variants: list[Variant]) -> Section:
    """Accuracy against time and FLOPs."""
    hardware = sorted({value for variant in variants for value in variant.facts("hardware")})
    where = f"Measured on {', '.join(hardware)}."
    if len(hardware) > 1:
        where += " Times on different hardware are not comparable."
    rows = []
    for variant in variants:
        minutes = [run.last("perf/total_seconds") / 60 for run in variant.runs]
        cost, top1 = gflops(variant.first["flops"]), spread(variant.by_seed("top1").values())
        rows.append([variant.label, str(len(variant.runs)), spread(minutes), cost, top1])
    return Section(
        "Cost",
        [where],
        [Table(["variant", "n", "minutes of training", "GFLOPs", "top-1 %"], rows)],
        [
            Picture(
                "time",
                "Accuracy against time",
                figures.over_time(variants, "top1", "top-1 accuracy (%)"),
                "Top-1 against the time spent on training and evaluation, mean over seeds.",
            ),
            Picture(
                "flops",
                "Accuracy against FLOPs",
                figures.over_flops(variants),
                "Top-1 against the forward pass of one image, two FLOPs per multiply-add: each "
                "seed (dot), mean and standard deviation.",
            ),
        ],
    )


def attention_section(variants: list[Variant]) -> Section | None:
    """Where the attention of one run looks, if its weights and its images are there."""
    if not any((r.folder / WEIGHTS).is_file() for v in variants for r in v.runs):
        return None
    from reporting import attention  # which needs torch

    shown = attention.of_report(variants)
    if shown is None:
        return None
    run, blocks, why_not = shown
    label = next(variant.label for variant in variants if run in variant.runs)
    pictures = [
        Picture(
            f"attention{number}",
            f"Block {block.name}",
            block.svg(),
            f"Attention of {block.name} ({block.words}): the image with one position (frame), and "
            "the weights of each head from there (brightest: the largest); below, their mean over "
            "all positions.",
        )
        for number, block in enumerate(blocks, start=1)
    ]
    text = (
        f"{label}, seed {run.seed}, on images of the evaluation. Of each image and block the "
        "position is shown whose attention is the sharpest."
    )
    notes = [why_not] if why_not else []
    return Section(
        "What attention looks at", [text] if blocks else [], pictures=pictures, notes=notes
    )


def paper_section(data: str, variants: list[Variant]) -> Section:
    """How far the paper's scores and ours differ, and how the recipes do."""
    gain = paper.TABLE1["aa"].top1 - paper.TABLE1["none"].top1
    matched = [(variant, row) for variant in variants if (row := _printed(data, variant))]
    text = [
        f"The paper (Bello et al., ICCV 2019, Table 1: {paper.NETWORK} on CIFAR-100) prints single "
        "numbers, without the number of runs or a spread. By these numbers, attention changes "
        f"top-1 by {signed(gain, 1)} points."
    ]
    notes: list[str] = []
    if matched:
        tables = [_beside_the_paper(matched)]
        if any(variant.attention == "aa" for variant, _ in matched):
            notes += paper.NOTES
    else:
        text.append(
            f"None of these runs is a {paper.NETWORK} evaluated on CIFAR-100's test set, so they "
            "are not comparable with its scores, which are:"
        )
        head = ["the paper's network", "parameters", "GFLOPs", "top-1 %", "top-5 %"]
        tables = [Table(head, [[row.name, *_cells(row)] for row in paper.TABLE1.values()])]
    recipe = _recipe([variant for variant, _ in matched] or _one_of_each(variants))
    if recipe.rows:
        tables.append(recipe)
    else:
        notes.append("The recipe is the paper's, as far as that is known.")
    return Section("Comparison with the paper", text, tables, notes=notes)


def _beside_the_paper(matched: list[tuple[Variant, paper.Row]]) -> Table:
    rows = []
    for variant, row in matched:
        top1, top5 = (statistics.mean(variant.by_seed(s).values()) for s in ("top1", "top5"))
        rows.append(
            [
                variant.label,
                str(len(variant.runs)),
                against(top1, row.top1),
                against(top5, row.top5),
                against(variant.first["parameters"] / 1e6, row.parameters),
                against(variant.first["flops"] / 1e9, row.gflops),
            ]
        )
    head = ["ours / paper (difference)", "n", "top-1 %", "top-5 %", "parameters, M", "GFLOPs"]
    return Table(head, rows)


def _one_of_each(variants: list[Variant]) -> list[Variant]:
    first: dict[str, Variant] = {}
    for variant in variants:
        first.setdefault(variant.attention, variant)
    return list(first.values())


def _recipe(variants: list[Variant]) -> Table:
    """Where the paper's settings are others, a row for each setting and pair of values."""
    differ: dict[tuple[str, str, str, str], list[str]] = defaultdict(list)
    for setting in paper.RECIPE:
        for variant in variants:
            printed = setting.of(variant.attention)
            ours = ({"model.name": variant.model} | variant.settings).get(setting.key, NOT_SET)
            if printed is not None and printed != ours:
                values = (last_name(as_text(printed)), last_name(as_text(ours)))
                key = (last_name(setting.key), *values, paper.SURE[setting.sure])
                differ[key].append(variant.label)
    rows = [
        [name, ", ".join(labels), printed, ours, sure]
        for (name, printed, ours, sure), labels in differ.items()
    ]
    head = ["setting", "variants", "paper", "here", "source of the paper's value"]
    return Table(head, rows, texts=5, caption="Settings that differ from the paper's.")


def provenance_section(variants: list[Variant]) -> Section:
    """Where each variant's runs come from, and the settings that the labels leave out."""
    rows = []
    for variant in variants:
        seeds = ", ".join(str(run.seed) for run in variant.runs)
        rows.append([variant.label, seeds, *(_fact(variant.facts(fact), fact) for fact in FACTS)])
    tables = [Table(["variant", "seeds", *FACTS], rows, texts=2 + len(FACTS))]
    runs = [(variant, run) for variant in variants for run in variant.runs]
    continued = [(v, run) for v, run in runs if len(run.summary["segments"]) > 1]
    moved = [(v, run) for v, run in continued if any(len(run.facts(f)) > 1 for f in FACTS)]
    notes = []
    if continued:
        notes.append(
            f"{len(continued)} of {count(len(runs), 'run')} "
            f"{'was' if len(continued) == 1 else 'were'} interrupted and continued, "
            f"{len(moved) or 'none'} of them under different conditions."
        )
    if moved:
        tables.append(_segments(moved))
    keys = sorted({key for variant in variants for key in variant.settings})
    shared = [key for key in keys if len({variant.setting(key) for variant in variants}) == 1]
    settings = Table(["setting", "value"], [[k, variants[0].setting(k)] for k in shared], texts=2)
    return Section(
        PROVENANCE,
        [f"Read from the summary.json and metrics.csv of {count(len(runs), 'run')}."],
        tables,
        notes=notes,
        folded=("settings that all variants share", settings),
    )


def _fact(values: list[str], fact: str) -> str:
    if fact == "commit":
        values = [commit(value) for value in values]
    return ("mixed: " if len(values) > 1 else "") + ", ".join(values)


def _segments(runs: list[tuple[Variant, Run]]) -> Table:
    """Each segment of the runs that were continued under different conditions."""
    rows = []
    for variant, run in runs:
        for segment in run.summary["segments"]:
            facts = segment["versions"] | segment
            values = [_fact([str(facts.get(fact, "unknown"))], fact) for fact in FACTS]
            rows.append([variant.label, str(run.seed), str(segment["first_epoch"]), *values])
    head = ["variant", "seed", "from epoch", *FACTS]
    caption = "Runs that were continued under different conditions, segment by segment."
    return Table(head, rows, texts=len(head), caption=caption)


def excluded_section(excluded: list[Excluded]) -> Section | None:
    """What was found and is in no number above."""
    if not excluded:
        return None
    excluded = sorted(excluded, key=lambda e: (KINDS.index(e.kind), str(e.folder)))
    counts = {kind: sum(e.kind == kind for e in excluded) for kind in KINDS}
    text = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    rows = [[e.kind, e.why, str(e.folder)] for e in excluded]
    return Section(
        "Excluded",
        [f"These folders are in none of the numbers above: {text}."],
        [Table(["kind", "reason", "folder"], rows, texts=3)],
    )
