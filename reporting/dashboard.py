"""A comparison on the dashboard: one run of job type ``compare``, beside the runs it compares."""

import hashlib
import io
import statistics
from pathlib import Path
from typing import Any

from PIL import Image

from reporting import figures
from reporting.paired import Comparison, compare_with_plain, nearest
from reporting.runs import Variant, group_by_variant, read, select_data
from reporting.sweeps import by_recipe
from reporting.text import short
from training.tracking import Media, Picture, Table, track

COLUMNS = [
    "variant",
    "n",
    "mean top-1 %",
    "sd",
    "difference",
    "95 % low",
    "95 % high",
    "p",
    "parameters",
    "GFLOPs",
]
# Of the table of attention's settings; the difference is that of the value from the baseline.
SETTINGS = [
    "recipe",
    "setting",
    "value",
    "baseline",
    "combinations",
    "n",
    "difference",
    "95 % low",
    "95 % high",
    "p",
    "p by Holm",
]


def post(
    folders: list[Path],
    report: Path,
    *,
    out_dir: Path,
    group: str,
    project: str,
    entity: str | None,
    mode: str,
    data: str | None = None,
) -> None:
    """Give the dashboard what the finished runs in ``folders`` show, and the page ``report``.

    The table of all variants, with their paired differences from the plain network, what each
    setting of attention does in a sweep, the forest plot, the learning curves, and the report as
    an artifact. The same comparison is the same run
    each time, which then has the newer results. No fault of wandb's is passed on.

    Raises:
        ValueError: see `reporting.runs.read`.
    """
    data, runs, _ = select_data(read(folders)[0], data)
    variants, _ = group_by_variant(runs)
    comparisons = nearest(compare_with_plain(variants))
    with track(
        mode,
        folder=out_dir,
        project=project,
        entity=entity,
        group=group,
        name=f"compare {group}",
        job_type="compare",
        tags=[data],
        config=_config(data, variants),
        run_id=_id(project, report.parent),
        record=report.name,
    ) as tracker:
        if tracker.active:
            tracker.post(_media(variants, comparisons))
            tracker.artifact(f"report-{tracker.id}", "report", [report], {"group": group})


def _id(project: str, folder: Path) -> str:
    text = f"{project} {folder.absolute()}".encode(errors="surrogateescape")
    return f"compare-{hashlib.blake2b(text, digest_size=6).hexdigest()}"


def _config(data: str, variants: list[Variant]) -> dict[str, Any]:
    return {
        "data": data,
        "variants": [variant.label for variant in variants],
        "seeds": sorted({run.seed for variant in variants for run in variant.runs}),
        "runs": sum(len(variant.runs) for variant in variants),
        "epochs": sorted({int(variant.settings["epochs"]) for variant in variants}),
    }


def _media(variants: list[Variant], comparisons: list[Comparison]) -> dict[str, Media]:
    on = variants[0].first["evaluated_on"]
    media: dict[str, Media] = {
        "compare/table": Table(COLUMNS, _rows(variants, comparisons)),
        "compare/curves": _picture(
            figures.as_png(lambda: figures.over_epochs(variants, "top1", f"{on} top-1 (%)")),
            "mean over the seeds, with a band from the lowest to the highest",
        ),
    }
    paired = [c for c in comparisons if c.top1.mean is not None][: figures.ROWS]
    if paired:
        media["compare/differences"] = _picture(
            figures.as_png(lambda: figures.differences(paired)),
            "difference from the plain network in percentage points, paired by seed, 95 % interval",
        )
    if effects := _effects(variants):
        media["compare/settings"] = Table(SETTINGS, effects)
    return media


def _rows(variants: list[Variant], comparisons: list[Comparison]) -> list[list[Any]]:
    found = {comparison.variant: comparison.top1 for comparison in comparisons}
    rows = []
    for variant in variants:
        scores = list(variant.by_seed("top1").values())
        difference = found.get(variant)
        pair = [getattr(difference, name, None) for name in ("mean", "low", "high", "p")]
        rows.append(
            [
                variant.label,
                len(scores),
                statistics.fmean(scores),
                statistics.stdev(scores) if len(scores) > 1 else None,
                *pair,
                int(variant.first["parameters"]),
                variant.first["flops"] / 1e9,
            ]
        )
    return rows


def _effects(variants: list[Variant]) -> list[list[Any]]:
    rows = []
    for recipe, found, corrected in by_recipe(variants):
        for effect, p in zip(found, corrected, strict=True):
            top1 = effect.top1
            words = [recipe, short(effect.setting), *effect.values]
            numbers = [top1.mean, top1.low, top1.high, top1.p, p]
            rows.append([*words, effect.combinations, top1.n, *numbers])
    return rows


def _picture(png: bytes, caption: str) -> Picture:
    return Picture(Image.open(io.BytesIO(png)).convert("RGB"), caption)
