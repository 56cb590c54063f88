"""The report's pictures, each as the text of an SVG file whose letters need no font."""

import io
import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from reporting.paired import Comparison
from reporting.runs import Group

Figure = Any  # matplotlib is not typed

STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "aaconv",  # the same runs give the same bytes
    "svg.fonttype": "path",
    "path.simplify_threshold": 0.5,
}
# Okabe and Ito's colours, which the colour-blind can tell apart; the plain network is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000")
PLAIN, OTHERS = "#222222", "#c4c4c4"
# More lines than this cannot be told apart: then only the best have a hue. More rows, or more
# classes at either end, cannot be read.
LINES, BEST, ROWS, CLASSES = 8, 4, 12, 12


@contextmanager
def _panel(width: float = 5.2, height: float = 3.5) -> Iterator[tuple[Figure, Any, list[str]]]:
    """A figure of one panel; when the ``with`` ends its SVG is in the list."""
    svg: list[str] = []
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(width, height), layout="constrained")
        try:
            yield figure, panel, svg
            svg.append(_as_svg(figure))
        finally:
            plt.close(figure)


def _as_svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()


def colours(groups: list[Group]) -> dict[Group, str]:
    """A colour for each group: a hue, dark for the plain one of most runs, or grey where too many.

    Of many groups the best by top-1 have a hue.
    """
    plain = [one for one in groups if one.attention == "plain"]
    plain = [max(plain, key=lambda g: len(g.runs))] if plain else []
    others = [one for one in groups if one not in plain]
    if len(groups) > LINES:
        others.sort(key=lambda g: -statistics.fmean(g.scores("top1").values()))
        others = others[:BEST]
    others.sort(key=lambda g: (g.attention != "aa", groups.index(g)))
    chosen = dict.fromkeys(groups, OTHERS) | dict.fromkeys(plain, PLAIN)
    return chosen | dict(zip(others, COLOURS, strict=False))


def over_epochs(groups: list[Group], column: str, label: str) -> str:
    """A column of metrics.csv over the epochs: the mean of the seeds, a band from least to most."""
    return _lines(groups, column, label, lambda run: [r["epoch"] for r in run.rows], "epoch")


def over_time(groups: list[Group], column: str, label: str) -> str:
    """The same over the minutes that training and evaluation have taken, mean of the seeds."""

    def minutes(run: Any) -> list[float]:
        total, at = 0.0, []
        for row in run.rows:
            total += row["seconds"] / 60
            at.append(total)
        return at

    return _lines(groups, column, label, minutes, "training time (minutes)")


def _lines(
    groups: list[Group],
    column: str,
    label: str,
    along: Callable[[Any], list[float]],
    x_label: str,
) -> str:
    chosen = colours(groups)
    with _panel() as (figure, panel, svg):
        for one in sorted(groups, key=lambda g: chosen[g] != OTHERS):
            x = [statistics.fmean(at) for at in zip(*map(along, one.runs), strict=True)]
            _spread(panel, x, [[r[column] for r in run.rows] for run in one.runs], one, chosen)
        panel.set_xlabel(x_label)
        panel.set_ylabel(label)
        if x_label == "epoch":
            panel.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, panel, chosen)
    return svg[0]


def _spread(
    panel: Any, x: list[float], seeds: list[list[float]], one: Group, chosen: dict[Group, str]
) -> None:
    """A group's line: the mean of the seeds, and a band from the least to the most of them."""
    colour, values = chosen[one], list(zip(*seeds, strict=True))
    grey = colour == OTHERS
    panel.plot(
        x,
        [statistics.fmean(v) for v in values],
        color=colour,
        linewidth=0.7 if grey else 1.7,
        linestyle="--" if one.attention == "plain" else "-",
        marker="." if len(x) <= 20 and not grey else None,
        label=None if grey else f"{one.label} (n={len(seeds)})",
    )
    if not grey:
        low, high = [min(v) for v in values], [max(v) for v in values]
        panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def same_length(one: Comparison) -> bool:
    """Whether the two are trained for as many epochs, in pairs."""
    return one.top1.n > 0 and one.group.first["epochs"] == one.twin.first["epochs"]


def lead_over_epochs(groups: list[Group], comparisons: list[Comparison]) -> str:
    """Top-1 minus the plain twin's of the same seed over the epochs, where both have as many."""
    drawn = {one.group: one for one in comparisons if same_length(one)}
    chosen = {group: colour for group, colour in colours(groups).items() if group in drawn}
    with _panel() as (figure, panel, svg):
        panel.axhline(0, color=PLAIN, linewidth=1.2, linestyle="--")
        for group in sorted(chosen, key=lambda g: chosen[g] != OTHERS):
            ours = {run.seed: run.rows for run in group.runs}
            theirs = {run.seed: run.rows for run in drawn[group].twin.runs}
            pairs = [
                [a["top1"] - b["top1"] for a, b in zip(ours[seed], theirs[seed], strict=True)]
                for seed in drawn[group].top1.by_seed
            ]
            epochs = [row["epoch"] for row in group.runs[0].rows]
            _spread(panel, epochs, pairs, group, chosen)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel("top-1 minus plain (points)")
        _legend(figure, panel, chosen)
    return svg[0]


def _legend(figure: Figure, panel: Any, chosen: dict[Group, str]) -> None:
    """Beside the data, never on them: matplotlib's search for a free place is slow, too."""
    grey = sum(colour == OTHERS for colour in chosen.values())
    if grey:
        panel.plot([], [], color=OTHERS, linewidth=0.7, label=f"{grey} other networks")
    entries = len(panel.get_legend_handles_labels()[0])
    long = max(len(group.label) for group in chosen) > 24
    columns = 1 if long else 2 if entries > 4 else 4
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(entries / columns) - 1))
    figure.legend(loc="outside upper left", ncols=columns)


def over_flops(groups: list[Group]) -> str:
    """Top-1 of the last epoch against the cost of an image: each seed, and mean with deviation."""
    chosen = colours(groups)
    unit, name = (
        (1e9, "GFLOPs") if max(g.first["flops"] for g in groups) >= 1e8 else (1e6, "MFLOPs")
    )
    with _panel() as (figure, panel, svg):
        others = [one for one in groups if chosen[one] == OTHERS]
        means = [statistics.fmean(one.scores("top1").values()) for one in others]
        panel.plot([one.first["flops"] / unit for one in others], means, "o", color=OTHERS, ms=4)
        for one in groups:
            if one in others:
                continue
            colour, values = chosen[one], list(one.scores("top1").values())
            x = one.first["flops"] / unit
            panel.plot([x] * len(values), values, ".", color=colour, alpha=0.45, markersize=4)
            panel.errorbar(
                x,
                statistics.fmean(values),
                yerr=statistics.stdev(values) if len(values) > 1 else None,
                fmt="s" if one.attention == "plain" else "o",
                color=colour,
                markersize=6,
                capsize=3,
                label=f"{one.label} (n={len(values)})",
            )
        panel.set_xlabel(f"{name} of the forward pass, one image")
        panel.locator_params(axis="x", nbins=6)
        panel.ticklabel_format(useOffset=False)
        panel.set_ylabel("top-1 accuracy (%)")
        panel.margins(x=0.15)
        _legend(figure, panel, chosen)
    return svg[0]


def differences(comparisons: list[Comparison]) -> str:
    """Differences in top-1 to the plain twin: each pair of seeds, their mean, its interval."""
    with _panel(5.2, 1.1 + 0.36 * len(comparisons)) as (_, panel, svg):
        panel.axvline(0, color="#555", linewidth=1)
        for row, one in enumerate(comparisons):
            found, y = one.top1, len(comparisons) - 1 - row
            pairs = list(found.by_seed.values())
            panel.plot(pairs, [y] * len(pairs), "o", color="#888", markersize=4, fillstyle="none")
            if found.low is not None:
                panel.plot([found.low, found.high], [y, y], color=COLOURS[0], linewidth=2.2)
            panel.plot(found.mean, y, "D", color=COLOURS[0], markersize=6)
        panel.set_yticks(
            range(len(comparisons)),
            [f"{one.group.label} (n={one.top1.n})" for one in reversed(comparisons)],
        )
        panel.set_ylim(-0.6, len(comparisons) - 0.4)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("top-1 minus plain (percentage points)")
    return svg[0]


def heatmap(
    cells: dict[tuple[float, float], tuple[float, int]], low: float, high: float, title: str
) -> str:
    """Mean top-1 and n over dk and dv, {(dk, dv): (mean, n)}; the colours go from low to high."""
    rows = sorted({dk for dk, _ in cells})
    columns = sorted({dv for _, dv in cells})
    nothing = (math.nan, 0)
    grid = [[cells.get((dk, dv), nothing)[0] for dv in columns] for dk in rows]
    with _panel(5.2, 1.5 + 0.55 * len(rows)) as (figure, panel, svg):
        panel.grid(visible=False)
        image = panel.imshow(
            grid, cmap="cividis", vmin=low, vmax=high, aspect="auto", origin="lower"
        )
        for (dk, dv), (mean, n) in cells.items():
            panel.text(
                columns.index(dv),
                rows.index(dk),
                f"{mean:.2f}\nn={n}",
                ha="center",
                va="center",
                fontsize=9,
                color="white" if mean < (low + high) / 2 else "black",
            )
        panel.set_xticks(range(len(columns)), [f"{dv:g}" for dv in columns])
        panel.set_yticks(range(len(rows)), [f"{dk:g}" for dk in rows])
        panel.set_title(title)
        panel.set_xlabel("dv")
        panel.set_ylabel("dk")
        figure.colorbar(image, label="top-1 accuracy (%)")
    return svg[0]


def classes(rows: list[tuple[str, float, list[float]]], label: str) -> str:
    """Differences by class, given from least to most: (name, mean, each pair of seeds).

    Of many classes only the two ends are drawn.
    """
    ends = rows if len(rows) <= 2 * CLASSES else rows[:CLASSES] + rows[-CLASSES:]
    with _panel(5.2, 1.0 + 0.21 * len(ends)) as (_, panel, svg):
        for y, (_, mean, pairs) in enumerate(ends):
            colour = COLOURS[0] if mean >= 0 else COLOURS[1]
            panel.barh(y, mean, color=colour, alpha=0.75, height=0.7)
            if len(pairs) > 1:
                panel.plot(pairs, [y] * len(pairs), ".", color="#333", markersize=3)
        if len(ends) < len(rows):
            panel.axhline(CLASSES - 0.5, color="#999", linewidth=0.8, linestyle=":")
        panel.axvline(0, color="#555", linewidth=1)
        panel.set_yticks(range(len(ends)), [name.replace("_", " ") for name, _, _ in ends])
        panel.set_ylim(-0.7, len(ends) - 0.3)
        panel.tick_params(axis="y", labelsize=8)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(label)
    return svg[0]
