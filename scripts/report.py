"""Turn run folders into a table (Markdown) and a picture of their curves.

    python scripts/report.py outputs/train [--out FOLDER]

Every folder below the given ones that holds a metrics.csv is a run. Runs that differ in the seed
alone are one row: mean and standard deviation of the last epoch's scores. A run without
summary.json is listed as unfinished and in no mean.
"""

import argparse
import csv
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.variants import deciding


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, its summary, and its figures of every epoch."""

    folder: Path
    summary: dict[str, Any]
    rows: list[dict[str, float]]


@dataclass(frozen=True)
class Variant:
    """Runs that differ in the seed alone, under a name that tells it from the others."""

    label: str
    runs: list[Run]


def read_runs(folders: list[Path]) -> tuple[list[Run], list[Path]]:
    """The finished runs below ``folders``, and the folders of the unfinished ones.

    Raises:
        ValueError: a folder does not exist, or there is no run in any; the message names it.
    """
    places: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder")
        places |= {path.parent for path in folder.rglob("metrics.csv")}
    if not places:
        raise ValueError(f"no run in {', '.join(map(str, folders))}: there is no metrics.csv")
    finished, unfinished = [], []
    for place in sorted(places):
        if (place / "summary.json").exists():
            finished.append(_read_run(place))
        else:
            unfinished.append(place)
    return finished, unfinished


def _read_run(folder: Path) -> Run:
    try:
        summary = json.loads((folder / "summary.json").read_text())
        with (folder / "metrics.csv").open() as file:
            rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{folder} cannot be read: {error}") from error
    return Run(folder, summary, rows)


def group(runs: list[Run]) -> list[Variant]:
    """Runs by everything that makes a variant, named by data, network, switch and what differs."""
    by_settings: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([_basics(run), _settings(run)], sort_keys=True)
        by_settings.setdefault(key, []).append(run)
    groups = list(by_settings.values())
    named = []
    for members in groups:
        twins = [other for other in groups if _basics(other[0]) == _basics(members[0])]
        ours = _settings(members[0])
        varying = [k for k in ours if any(_settings(t[0]).get(k) != ours[k] for t in twins)]
        extra = [f"{k.removeprefix('attention.')}={ours[k]}" for k in varying]
        named.append(Variant(" ".join([*_basics(members[0])[1:], *extra]), members))
    return sorted(named, key=lambda v: (_basics(v.runs[0])[0], v.runs[0].summary["parameters"]))


def _basics(run: Run) -> tuple[str, ...]:
    data, on = run.summary["data"], run.summary["evaluated_on"]
    return f"{data} {on}", run.summary["model"], run.summary["attention"]


def _settings(run: Run) -> dict[str, Any]:
    # model.aa is where attention.* has its defaults from, and says nothing beside them.
    settings = deciding(run.summary["config"])
    return {k: v for k, v in settings.items() if k != "seed" and not k.startswith("model.aa.")}


def table(variants: list[Variant]) -> str:
    """Markdown: one table per data set, one row per variant, scores as mean ± deviation."""
    lines = []
    for data in dict.fromkeys(_basics(v.runs[0])[0] for v in variants):
        lines += [
            f"{data}, last epoch, mean ± standard deviation over n seeds:",
            "",
            "| network | n | top-1 % | top-5 % | parameters | MFLOPs | seconds | s/epoch |",
            "|---|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [_row(v) for v in variants if _basics(v.runs[0])[0] == data]
        lines.append("")
    return "\n".join(lines)


def _row(variant: Variant) -> str:
    first = variant.runs[0].summary
    seconds = statistics.mean(r.summary["seconds"] for r in variant.runs)
    cells = [
        variant.label,
        str(len(variant.runs)),
        _spread(variant, "top1"),
        _spread(variant, "top5"),
        f"{first['parameters']:,}",
        f"{first['flops'] / 1e6:,.1f}",
        f"{seconds:.0f}",
        f"{seconds / first['epochs']:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def _spread(variant: Variant, score: str) -> str:
    values = [run.summary[score] for run in variant.runs]
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def draw(variants: list[Variant], path: Path) -> None:
    """One picture: training loss and top-1 accuracy over the epochs, a band from least to most.

    One row of panels per data set.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    datasets = list(dict.fromkeys(_basics(v.runs[0])[0] for v in variants))
    figure, grid = plt.subplots(
        len(datasets), 2, figsize=(11, 4 * len(datasets)), squeeze=False, layout="constrained"
    )
    for data, panels in zip(datasets, grid, strict=True):
        members = [v for v in variants if _basics(v.runs[0])[0] == data]
        for panel, column in zip(panels, ("train_loss", "top1"), strict=True):
            for variant in members:
                _curve(panel, variant, column)
            panel.set_xlabel("epoch")
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
        panels[0].set_title(f"{data}: training loss (nats)")
        panels[1].set_title(f"{data}: top-1 accuracy (%)")
        panels[1].legend(loc="best", fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(panel: Any, variant: Variant, column: str) -> None:
    shortest = min(len(run.rows) for run in variant.runs)
    epochs = [row["epoch"] for row in variant.runs[0].rows[:shortest]]
    values = [[run.rows[i][column] for run in variant.runs] for i in range(shortest)]
    label = f"{variant.label} (n={len(variant.runs)})"
    (line,) = panel.plot(
        epochs, [statistics.mean(v) for v in values], marker=".", markersize=4, label=label
    )
    low, high = [min(v) for v in values], [max(v) for v in values]
    panel.fill_between(epochs, low, high, alpha=0.2, color=line.get_color(), linewidth=0)


def report(folders: list[Path], out: Path) -> str:
    """Write report.md and curves.png to ``out`` and return the Markdown.

    Raises:
        ValueError: no finished run; nothing is written.
    """
    finished, unfinished = read_runs(folders)
    text = "".join(f"- unfinished, not counted: {place}\n" for place in unfinished)
    if not finished:
        raise ValueError(f"no finished run in {', '.join(map(str, folders))}")
    variants = group(finished)
    text = f"{table(variants)}{text}"
    out.mkdir(parents=True, exist_ok=True)
    draw(variants, out / "curves.png")
    (out / "report.md").write_text(f"{text}\n![curves](curves.png)\n")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, or folders above them")
    parser.add_argument("--out", type=Path, help="where to write; default: the first folder given")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0]
    try:
        print(report(arguments.runs, out))
    except (ValueError, OSError) as error:
        sys.exit(f"report.py: {error}")
    print(f"written: {out / 'report.md'}, {out / 'curves.png'}")


if __name__ == "__main__":
    main()
