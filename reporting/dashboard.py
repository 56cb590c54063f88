"""Post a comparison to the dashboard as a run of job type ``compare``, next to its runs."""

import hashlib
import io
import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from reporting import figures, sections, sweep_section
from reporting.analysis import Analysis
from reporting.paired import Difference
from reporting.sweeps import Sweep
from training.tracking import Media, Picture, Table, track

# Columns for a mean difference.
DIFFERENCE = ["difference", "95 % low", "95 % high", "p"]
COLUMNS = ["variant", "n", "mean top-1 %", "sd", *DIFFERENCE, "parameters", "GFLOPs"]
# The table of attention settings; the difference is the value's top-1 minus the baseline's.
SETTINGS = ["recipe", "setting", "value", "baseline", *DIFFERENCE]
BEST = ["recipe", "rank", "settings", "n", "mean top-1 %", "not distinguishable from the best"]


def post(
    analysis: Analysis,
    report: Path,
    *,
    out_dir: Path,
    group: str,
    project: str,
    entity: str | None,
    mode: str,
) -> None:
    """Post the results of the analysis and the page ``report`` to the dashboard.

    This is the table of all variants with their paired differences from the plain network, the
    effect of each attention setting in a sweep, the forest plot, the learning curves, and the
    report as an artifact. Posting the same comparison again updates the same wandb run. Errors of
    wandb are not raised.
    """
    with track(
        mode,
        folder=out_dir,
        project=project,
        entity=entity,
        group=group,
        name=f"compare {group}",
        job_type="compare",
        tags=[analysis.data],
        config=_config(analysis),
        run_id=_id(project, report.parent),
        record=report.name,
    ) as tracker:
        if tracker.active:
            tracker.post(_media(analysis))
            tracker.artifact(f"report-{tracker.id}", "report", [report], {"group": group})


def _id(project: str, folder: Path) -> str:
    text = f"{project} {folder.absolute()}".encode(errors="surrogateescape")
    return f"compare-{hashlib.blake2b(text, digest_size=6).hexdigest()}"


def _config(analysis: Analysis) -> dict[str, Any]:
    first = analysis.variants[0].first
    return {
        "data": first["data"],  # the same key as in the training runs, so one filter finds both
        "data.evaluated_on": first["evaluated_on"],
        "variants": [variant.label for variant in analysis.variants],
        "seeds": sorted({run.seed for run in analysis.runs}),
        "runs": len(analysis.runs),
        "epochs": sorted({int(run.settings["epochs"]) for run in analysis.runs}),
    }


def _media(analysis: Analysis) -> dict[str, Media]:
    on = analysis.variants[0].first["evaluated_on"]
    media: dict[str, Media] = {
        "compare/table": Table(COLUMNS, _rows(analysis)),
        "compare/curves": _picture(
            figures.curves(analysis.variants, analysis.by_epoch("top1"), f"{on} top-1 (%)"),
            "mean over the seeds, with a band from the lowest to the highest",
        ),
    }
    forest = sections.forest(analysis)
    if forest is not None:
        media["compare/differences"] = _picture(forest.figure, forest.caption)
    if analysis.sweeps:
        media["compare/best"] = Table(BEST, [r for s in analysis.sweeps for r in _ranking(s)])
        media["compare/settings"] = Table(
            SETTINGS, [r for s in analysis.sweeps for r in _effects(s)]
        )
        pictures = sweep_section.pictures(analysis.sweeps)
        if pictures:
            media["compare/heatmaps"] = [_picture(it.figure, it.caption) for it in pictures]
    return media


def _rows(analysis: Analysis) -> list[list[Any]]:
    found = {comparison.variant: comparison.top1 for comparison in analysis.nearest}
    rows: list[list[Any]] = []
    for variant in analysis.variants:
        scores = list(variant.by_seed("top1").values())
        sd = statistics.stdev(scores) if len(scores) > 1 else None
        top1 = found.get(variant, Difference({}))
        difference = [top1.mean, top1.low, top1.high, top1.p]
        cost = [int(variant.first["parameters"]), variant.first["flops"] / 1e9]
        rows.append([variant.label, len(scores), variant.mean("top1"), sd, *difference, *cost])
    return rows


def _effects(sweep: Sweep) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for effect in sweep.effects:
        factor = sweep.factors[effect.factor]
        words = [sweep.recipe, factor.name, *(factor.values[level] for level in effect.levels)]
        rows.append([*words, effect.mean, effect.low, effect.high, effect.p])
    return rows


def _ranking(sweep: Sweep) -> list[list[Any]]:
    return [
        [sweep.recipe, rank, sweep.words(cell.levels), cell.n, cell.mean, cell.is_candidate]
        for rank, cell in enumerate(sweep.ranking, start=1)
    ]


def _picture(figure: figures.Figure, caption: str) -> Picture:
    return Picture(Image.open(io.BytesIO(figures.as_png(figure))).convert("RGB"), caption)
