"""The report's sections on the variants: scores, curves, cost, attention, and provenance."""

import re

from reporting import attention, figures, paper, text
from reporting.analysis import Analysis
from reporting.parts import Picture, Section, Table, tables
from reporting.runs import KINDS, Run, conditions, differing_settings

PROVENANCE = "Where the numbers come from"
# Conditions that are not settings but may affect the numbers, and words for runs that differ.
CONDITIONS = {
    "commit": "at different commits",
    "hardware": "on different hardware",
    "precision": "in different precisions",
    "torch": "with different versions of torch",
    "processes": "with different numbers of processes",
}
# Titles for columns of metrics.csv; other columns are titled by their name.
TITLES = {
    "train/loss": "training loss (nats)",
    "train/top1": "training top-1 accuracy (%)",
    "train/grad_norm": "norm of the gradient",
    "attention/entropy": "entropy of attention",
    "attention/lowest_entropy": "entropy of the sharpest layer's attention",
}
# Captions for the curves of each group of columns.
CAPTIONS = {
    "train": "Mean of each epoch's steps",
    "attention": "After each epoch, as a share of the maximum (1: uniform, 0: one-hot)",
}


def forest(analysis: Analysis) -> Picture | None:
    """Picture the differences from the nearest baselines, augmented variants first.

    With many variants, show only the highest and the lowest, in descending order.
    """
    drawn = [comparison for comparison in analysis.nearest if comparison.top1.n]
    if not drawn:
        return None
    drawn.sort(key=lambda c: c.variant.attention != "aa")
    caption = (
        "Top-1 of the last epoch minus that of the plain network with the same seed: each pair "
        "(circle), their mean (diamond) and its 95 % interval (bar; none for a single pair)."
    )
    is_cut = len(drawn) > figures.ROWS
    if is_cut:
        half = figures.ROWS // 2
        caption += f" Of {len(drawn)} variants, the {half} highest and the {half} lowest."
        drawn.sort(key=lambda c: -(c.top1.mean or 0.0))
        drawn = drawn[:half] + drawn[-half:]
    figure = figures.differences(drawn, is_cut)
    return Picture("differences", "Differences from the plain baseline", figure, caption)


def scores_section(analysis: Analysis) -> Section:
    """Table 1 for these runs, with the paper's numbers for networks that it has.

    Rows are in the order of Table 1, or by descending score if the page is mainly about a sweep.
    """
    in_paper = any(paper.printed(analysis.data, variant) for variant in analysis.variants)
    seeds = sorted({run.seed for run in analysis.runs})
    same_seeds = all([run.seed for run in v.runs] == seeds for v in analysis.variants)
    rows = []
    variants = analysis.variants
    if analysis.main_sweep is not None:
        variants = sorted(variants, key=lambda variant: -variant.mean("top1"))
    for variant in variants:
        row = {
            "variant": variant.label,
            "n": str(len(variant.runs)),
            "top-1 %": text.mean_and_sd(variant.by_seed("top1").values()),
            "top-5 %": text.mean_and_sd(variant.by_seed("top5").values()),
            "parameters": f"{variant.first['parameters']:,}",
            "GFLOPs": text.gflops(variant.first["flops"]),
            "top-1 by seed": text.by_seed(variant.by_seed("top1"), same_seeds),
        }
        if in_paper:
            printed = paper.cells(paper.printed(analysis.data, variant))
            row |= {f"paper: {heading}": cell for heading, cell in printed.items()}
        rows.append(row)
    return Section(
        "Scores",
        ["Mean ± standard deviation over n seeds; a single run has no deviation."],
        tables(rows),
        notes=[f"Seeds, in this order: {', '.join(map(str, seeds))}."] if same_seeds else [],
    )


def curves_section(analysis: Analysis) -> Section:
    """Accuracy, the gain over the plain baseline, and training metrics by epoch."""
    variants = analysis.variants
    top1 = figures.curves(variants, analysis.by_epoch("top1"), "top-1 accuracy (%)")
    pictures = [Picture("top1", "Accuracy", top1, "Top-1 accuracy after each epoch.")]
    if analysis.gains:
        gain = figures.curves(variants, analysis.gains, "top-1 minus plain (points)", zero=True)
        caption = "Top-1 minus that of the plain baseline with the same seed, after each epoch."
        pictures.append(Picture("gain", "Gain over plain", gain, caption))
    columns = dict.fromkeys(column for run in analysis.runs for column in run.rows[0])
    for column in columns:
        group, _, name = column.partition("/")
        if group in CAPTIONS and name != "lr" and (shown := analysis.by_epoch(column)):
            title = TITLES.get(column, f"training {name}")
            curve = figures.curves(variants, shown, title)
            caption = f"{CAPTIONS[group]}: {title}."
            file = re.sub(r"[^\w-]+", "-", column)
            pictures.append(Picture(file, title.capitalize(), curve, caption))
    words = "Lines are means over seeds; bands span the lowest to the highest seed."
    return Section("Learning curves", [words], pictures=pictures)


def cost_section(analysis: Analysis) -> Section:
    """Accuracy against training time and FLOPs."""
    hardware = conditions(analysis.runs, "hardware")
    where = f"Measured on {', '.join(hardware)}."
    if len(hardware) > 1:
        where += " Times on different hardware are not comparable."
    rows = [
        {
            "variant": variant.label,
            "n": str(len(variant.runs)),
            "minutes of training": text.mean_and_sd(
                [run.last("perf/total_seconds") / 60 for run in variant.runs]
            ),
            "GFLOPs": text.gflops(variant.first["flops"]),
            "top-1 %": text.mean_and_sd(variant.by_seed("top1").values()),
        }
        for variant in analysis.variants
    ]
    top1 = analysis.by_epoch("top1")
    pictures = [
        Picture(
            "time",
            "Accuracy against time",
            figures.curves(analysis.variants, top1, "top-1 accuracy (%)", over_time=True),
            "Top-1 against the time spent on training and evaluation, mean over seeds.",
        ),
        Picture(
            "flops",
            "Accuracy against FLOPs",
            figures.over_flops(analysis.variants),
            "Top-1 against the forward pass of one image, two FLOPs per multiply-add: each "
            "seed (dot), mean and standard deviation.",
        ),
    ]
    return Section("Cost", [where], tables(rows), pictures)


def attention_section(analysis: Analysis) -> Section | None:
    """The attention maps of one run, if its weights and images are available."""
    shown = attention.of_report(analysis.variants)
    if shown is None:
        return None
    run, layers, why_not = shown
    label = next(variant.label for variant in analysis.variants if run in variant.runs)
    pictures = [
        Picture(
            f"attention{number}",
            f"Block {name}",
            figures.attention(name, picture),
            f"Attention of {name} ({picture.words}): the image with one position (frame), and "
            "the weights of each head from there (brightest: the largest); below, their mean over "
            "all positions.",
        )
        for number, (name, picture) in enumerate(layers.items(), start=1)
    ]
    words = (
        f"{label}, seed {run.seed}, on images of the evaluation. For each image and block, the "
        "position with the sharpest attention is shown."
    )
    return Section(
        "What attention looks at",
        [words] if layers else [],
        pictures=pictures,
        notes=[why_not] if why_not else [],
    )


def provenance_section(analysis: Analysis) -> Section:
    """The conditions that each variant's runs ran under, and the settings that all share."""
    variants, runs = analysis.variants, text.count(len(analysis.runs), "run")
    rows = []
    for variant in variants:
        row = {"variant": variant.label, "seeds": ", ".join(str(r.seed) for r in variant.runs)}
        rows.append(row | {name: _values(variant.runs, name) for name in CONDITIONS})
    made = tables(rows, texts=2 + len(CONDITIONS))
    continued = [run for run in analysis.runs if len(run.summary["segments"]) > 1]
    moved = [
        run for run in continued if any(len(conditions([run], name)) > 1 for name in CONDITIONS)
    ]
    notes = []
    if continued:
        notes.append(
            f"{len(continued)} of {runs} "
            f"{'was' if len(continued) == 1 else 'were'} interrupted and continued, "
            f"{len(moved) or 'none'} of them under different conditions."
        )
    segments = [
        {
            "variant": variant.label,
            "seed": str(run.seed),
            "from epoch": str(segment["first_epoch"]),
            **{name: run.conditions(name)[at] for name in CONDITIONS},
        }
        for variant in variants
        for run in variant.runs
        if run in moved
        for at, segment in enumerate(run.summary["segments"])
    ]
    caption = "Runs that were continued under different conditions, segment by segment."
    made += tables(segments, 3 + len(CONDITIONS), caption)
    differing = differing_settings(variants)
    shared = [key for key in sorted(variants[0].settings) if key not in differing]
    settings = [[key, variants[0].setting(key)] for key in shared]
    return Section(
        PROVENANCE,
        [f"Read from the summary.json and metrics.csv of {runs}."],
        made,
        notes=notes,
        folded=("settings that all variants share", Table(["setting", "value"], settings, 2)),
    )


def _values(runs: list[Run], condition: str) -> str:
    values = conditions(runs, condition)
    return ("mixed: " if len(values) > 1 else "") + ", ".join(values)


def excluded_section(analysis: Analysis) -> Section | None:
    """The folders that are excluded from all numbers, and why."""
    if not analysis.excluded:
        return None
    excluded = sorted(analysis.excluded, key=lambda e: (KINDS.index(e.kind), str(e.folder)))
    counts = {kind: sum(e.kind == kind for e in excluded) for kind in KINDS}
    words = ", ".join(f"{n} {kind}" for kind, n in counts.items() if n)
    rows = [{"kind": e.kind, "reason": e.why, "folder": str(e.folder)} for e in excluded]
    return Section(
        "Excluded",
        [f"These folders are excluded from all numbers above: {words}."],
        tables(rows, texts=3),
    )
