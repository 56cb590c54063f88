"""The report's pictures, each as the text of an SVG file that brings its letters as outlines."""

import io
import itertools
import math
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from reporting.distance import Curve
from reporting.paired import Comparison
from reporting.runs import Run, Variant
from reporting.text import MINUS, one_line

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
    "text.parse_math": False,  # a class may be called $x$
}
# Okabe and Ito's colours, which the colour-blind can tell apart; the plain network is black.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000")
DASHES = {"none": "--", "aa": "-", "se": "-.", "ge": ":"}
PLAIN, OTHERS = "#222222", "#c4c4c4"
# More lines than this cannot be told apart: then only the best have a hue. More rows, or more
# classes at either end, cannot be read.
LINES, BEST, ROWS, CLASSES = 8, 4, 12, 12
# Characters of a label. A longer one would leave no room for the data.
LABEL = 40


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


def as_png(draw: Callable[[], str]) -> bytes:
    """The picture that ``draw`` makes by one of the functions below, as a PNG file."""
    _PNG.append(b"")
    try:
        draw()
        return _PNG[-1]
    finally:
        _PNG.pop()


# While `as_png` runs, the newest picture as it wants it.
_PNG: list[bytes] = []


def _as_svg(figure: Figure) -> str:
    text = io.StringIO()
    with warnings.catch_warnings():
        # Letters that matplotlib's font lacks become boxes; the tables have them.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
        if _PNG:
            png = io.BytesIO()
            figure.savefig(png, format="png", dpi=150)
            _PNG[-1] = png.getvalue()
    return text.getvalue()


def attention(title: str, image: Any, rows: list[str], columns: list[str]) -> str:
    """A PIL image of equal tiles, as many rows and columns of them as there are names."""
    names = ["\n".join(_label(line) for line in row.split("\n")) for row in rows]
    beside = 0.07 * max(len(line) for name in names for line in name.split("\n")) + 0.2
    with _panel(image.width / 107 + beside, image.height / 107 + 0.6) as (_, panel, svg):
        panel.imshow(image, interpolation="none")
        panel.grid(visible=False)
        panel.spines[:].set_visible(False)
        panel.set_title(one_line(title), fontsize=10, loc="center")
        panel.xaxis.tick_top()
        panel.tick_params(length=0, labelsize=8)
        middles = [(number + 0.5) / len(columns) * image.width for number in range(len(columns))]
        panel.set_xticks(middles, columns)
        middles = [(number + 0.5) / len(rows) * image.height for number in range(len(rows))]
        panel.set_yticks(middles, names)
    return svg[0]


def _label(text: str, n: int | None = None) -> str:
    """A name for an axis or a legend, short enough for it, with the number of samples."""
    text = one_line(text)
    if len(text) > LABEL:
        text = f"{text[: LABEL // 2]}\N{HORIZONTAL ELLIPSIS}{text[1 - LABEL // 2 :]}"
    if text.startswith("_"):
        text = f" {text}"  # matplotlib keeps such names out of legends
    return text if n is None else f"{text} (n={n})"


def colours(variants: list[Variant]) -> dict[Variant, str]:
    """A colour for each: black for the plain one of most runs, a hue, or grey where too many.

    Of many variants the best by top-1 have a hue.
    """
    plain = [variant for variant in variants if variant.attention == "none"]
    plain = [max(plain, key=lambda v: len(v.runs))] if plain else []
    others = [variant for variant in variants if variant not in plain]
    if len(variants) > LINES:
        others.sort(key=lambda v: -_mean_top1(v))
        others = others[:BEST]
    others.sort(key=lambda v: (v.attention != "aa", variants.index(v)))
    chosen = dict.fromkeys(variants, OTHERS) | dict.fromkeys(plain, PLAIN)
    return chosen | dict(zip(others, COLOURS, strict=False))


def _mean_top1(variant: Variant) -> float:
    return statistics.fmean(variant.by_seed("top1").values())


def reliability(rows: list[dict[str, float | None]], error: float) -> str:
    """Accuracy over confidence, a bar for each bin of `training.scores.Calibration`."""
    width = 1 / len(rows)
    with _panel(width=4.2, height=4.0) as (_, panel, svg):
        shares = [row["images"] or 0.0 for row in rows]
        for number, row in enumerate(rows):
            if row["accuracy"] is None:
                continue
            alpha = 0.35 + 0.65 * shares[number] / max(shares)
            panel.bar(
                (number + 0.5) * width,
                row["accuracy"],
                width,
                color=COLOURS[0],
                alpha=alpha,
                edgecolor="white",
            )
        panel.plot([0, 1], [0, 1], color=PLAIN, linewidth=1, linestyle="--")
        panel.set_xlim(0, 1)
        panel.set_ylim(0, 1)
        panel.set_aspect("equal")
        panel.set_xlabel("confidence (darker: more images)")
        panel.set_ylabel("accuracy")
        panel.set_title(f"expected calibration error {100 * error:.1f} points")
    return svg[0]


def over_epochs(variants: list[Variant], column: str, label: str) -> str:
    """A column of metrics.csv over the epochs: mean of the seeds, a band from lowest to highest."""
    return _lines(variants, column, label, lambda run: run.each_epoch("epoch"), "epoch")


def over_time(variants: list[Variant], column: str, label: str) -> str:
    """The same over the minutes that training and evaluation have taken, mean of the seeds."""

    def minutes(run: Run) -> list[float]:
        return [s / 60 for s in itertools.accumulate(run.each_epoch("perf/epoch_seconds"))]

    return _lines(variants, column, label, minutes, "training time (minutes)")


def _lines(
    variants: list[Variant],
    column: str,
    label: str,
    along: Callable[[Run], list[float]],
    x_label: str,
) -> str:
    chosen = colours(variants)
    with _panel() as (figure, panel, svg):
        for variant in _grey_first(chosen):
            x = [statistics.fmean(at) for at in zip(*map(along, variant.runs), strict=True)]
            seeds = [run.each_epoch(column) for run in variant.runs]
            _line_and_band(panel, x, seeds, variant, chosen[variant])
        panel.set_xlabel(x_label)
        panel.set_ylabel(label)
        if x_label == "epoch":
            panel.xaxis.get_major_locator().set_params(integer=True)
        _legend(figure, panel, chosen)
    return svg[0]


def _grey_first(chosen: dict[Variant, str]) -> list[Variant]:
    """In the order of drawing: what has a hue comes on top."""
    return sorted(chosen, key=lambda variant: chosen[variant] != OTHERS)


def _line_and_band(
    panel: Any, x: list[float], seeds: list[list[float]], variant: Variant, colour: str
) -> None:
    """A variant's line, the mean of its seeds, and a band from the lowest to the highest."""
    values = list(zip(*seeds, strict=True))
    grey = colour == OTHERS
    panel.plot(
        x,
        [statistics.fmean(v) for v in values],
        color=colour,
        linewidth=0.7 if grey else 1.7,
        linestyle="--" if variant.attention == "none" else "-",
        marker="." if len(x) <= 20 and not grey else None,
        label=None if grey else _label(variant.label, len(seeds)),
    )
    if not grey:
        low, high = [min(v) for v in values], [max(v) for v in values]
        panel.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)


def gain_by_epoch(comparison: Comparison) -> dict[int, list[float]]:
    """Top-1 minus the baseline's after each epoch, by seed; empty if their epochs differ."""
    ours = {run.seed: run.each_epoch("top1") for run in comparison.variant.runs}
    theirs = {run.seed: run.each_epoch("top1") for run in comparison.baseline.runs}
    if comparison.variant.first["epochs"] != comparison.baseline.first["epochs"]:
        return {}
    return {
        seed: [a - b for a, b in zip(ours[seed], theirs[seed], strict=True)]
        for seed in comparison.top1.by_seed
    }


def gain_over_epochs(variants: list[Variant], comparisons: list[Comparison]) -> str:
    """`gain_by_epoch` of every comparison that has one; colours as in the other pictures."""
    gains = {c.variant: list(gain_by_epoch(c).values()) for c in comparisons}
    chosen = {v: colour for v, colour in colours(variants).items() if gains.get(v)}
    with _panel() as (figure, panel, svg):
        panel.axhline(0, color=PLAIN, linewidth=1.2, linestyle="--")
        for variant in _grey_first(chosen):
            epochs = variant.runs[0].each_epoch("epoch")
            _line_and_band(panel, epochs, gains[variant], variant, chosen[variant])
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_ylabel("top-1 minus plain (points)")
        _legend(figure, panel, chosen)
    return svg[0]


def _legend(figure: Figure, panel: Any, chosen: dict[Variant, str]) -> None:
    """Above the data, never on them: matplotlib's search for a free place is slow, too."""
    grey = sum(colour == OTHERS for colour in chosen.values())
    if grey:
        name = "1 other variant" if grey == 1 else f"{grey} other variants"
        panel.plot([], [], color=OTHERS, linewidth=0.7, label=name)
    names = panel.get_legend_handles_labels()[1]
    # A line of the legend has room for some 76 letters, a handle for the width of six.
    columns = max(1, min(4, 76 // (6 + max(map(len, names)))))
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(len(names) / columns) - 1))
    figure.legend(loc="outside upper left", ncols=columns)


def over_flops(variants: list[Variant]) -> str:
    """Top-1 of the last epoch against the cost of an image: each seed, and mean with deviation."""
    chosen = colours(variants)
    large = max(variant.first["flops"] for variant in variants) >= 1e8
    unit, name = (1e9, "GFLOPs") if large else (1e6, "MFLOPs")
    with _panel() as (figure, panel, svg):
        for variant in _grey_first(chosen):
            colour, values = chosen[variant], list(variant.by_seed("top1").values())
            x, mean = variant.first["flops"] / unit, statistics.fmean(values)
            if colour == OTHERS:
                panel.plot([x], [mean], "o", color=OTHERS, markersize=4)
                continue
            panel.plot([x] * len(values), values, ".", color=colour, alpha=0.45, markersize=4)
            panel.errorbar(
                x,
                mean,
                yerr=statistics.stdev(values) if len(values) > 1 else None,
                fmt="s" if variant.attention == "none" else "o",
                color=colour,
                markersize=6,
                capsize=3,
                label=_label(variant.label, len(values)),
            )
        panel.set_xlabel(f"{name} of the forward pass, one image")
        panel.locator_params(axis="x", nbins=6)
        panel.ticklabel_format(useOffset=False)
        panel.set_ylabel("top-1 accuracy (%)")
        panel.margins(x=0.15)
        _legend(figure, panel, chosen)
    return svg[0]


def over_distance(curves: list[Curve], chance: float, ceiling: float) -> str:
    """Top-1 over the distance as a multiple of the receptive field: mean of the seeds, and each.

    ``chance`` and ``ceiling`` (%) are what guessing one of the shapes gives, and what no plain
    network exceeds whose receptive field is at most the distance + 1.
    """
    names = list(dict.fromkeys(curve.model for curve in curves))
    with _panel(7.0, 3.8) as (figure, panel, svg):
        for curve in curves:
            colour = COLOURS[names.index(curve.model) % len(COLOURS)]
            x = [curve.ratio(distance) for distance in curve.top1]
            seeds = [list(scores.values()) for scores in curve.top1.values()]
            same_n = len({len(values) for values in seeds}) == 1
            for at, values in zip(x, seeds, strict=True):
                panel.plot([at] * len(values), values, ".", color=colour, alpha=0.5, markersize=5)
            panel.plot(
                x,
                [statistics.fmean(values) for values in seeds],
                color=colour,
                linewidth=1.7,
                linestyle=DASHES[curve.attention],
                label=_label(curve.label, len(seeds[0]) if same_n else None),
            )
        begins = min(1 - 1 / curve.receptive_field for curve in curves)
        right = 1.05 * max(1, *(curve.ratio(d) for curve in curves for d in curve.top1))
        panel.axhline(chance, color="#777", linewidth=1, linestyle=":")
        panel.axhline(ceiling, color="#777", linewidth=1, linestyle=":")
        panel.plot([begins, right], [ceiling, ceiling], color=PLAIN, linewidth=2.5)
        limit = f"limit of plain networks,\nproven from distance =\nreceptive field {MINUS} 1 on"
        for y, text in ((chance, "chance"), (ceiling, limit)):
            panel.annotate(
                f"{y:.3g} %: {text}",
                (1, y),
                (5, 0),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        panel.set_xlim(0, right)
        panel.set_ylim(0, 103)
        panel.set_xlabel("distance / receptive field of the convolutions")
        panel.set_ylabel("top-1 accuracy (%)")
        _legend(figure, panel, {})
    return svg[0]


def differences(comparisons: list[Comparison]) -> str:
    """Differences in top-1 from the plain baseline: each pair, their mean, its interval."""
    with _panel(5.2, 1.1 + 0.36 * len(comparisons)) as (_, panel, svg):
        panel.axvline(0, color="#555", linewidth=1)
        for y, comparison in enumerate(reversed(comparisons)):
            found = comparison.top1
            pairs = list(found.by_seed.values())
            panel.plot(pairs, [y] * len(pairs), "o", color="#888", markersize=4, fillstyle="none")
            if found.low is not None:
                panel.plot([found.low, found.high], [y, y], color=COLOURS[0], linewidth=2.2)
            panel.plot(found.mean, y, "D", color=COLOURS[0], markersize=6)
        names = [_label(c.variant.label, c.top1.n) for c in reversed(comparisons)]
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(-0.6, len(comparisons) - 0.4)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel("top-1 minus plain (points)")
    return svg[0]


def heatmap(
    cells: dict[tuple[str, str], tuple[float, int]], low: float, high: float, title: str
) -> str:
    """Mean top-1 and n over dk and dv, {(dk, dv): (mean, n)}; the colours go from low to high."""
    rows = sorted({dk for dk, _ in cells}, key=float)
    columns = sorted({dv for _, dv in cells}, key=float)
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
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        panel.set_title(_label(title))
        panel.set_xlabel("dv")
        panel.set_ylabel("dk")
        figure.colorbar(image, label="top-1 accuracy (%)")
    return svg[0]


def classes(rows: list[tuple[str, float, list[float]]], label: str) -> str:
    """Differences by class, given in ascending order: (name, mean, each pair of seeds).

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
        panel.set_yticks(range(len(ends)), [_label(name.replace("_", " ")) for name, _, _ in ends])
        panel.set_ylim(-0.7, len(ends) - 0.3)
        panel.tick_params(axis="y", labelsize=8)
        panel.grid(axis="y", visible=False)
        panel.set_xlabel(label)
    return svg[0]
