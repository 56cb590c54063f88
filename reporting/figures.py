"""The report's pictures as matplotlib figures, saved as SVG or PNG."""

import io
import itertools
import math
import re
import statistics
import unicodedata
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text

from reporting.paired import Comparison, Difference
from reporting.runs import Run, Variant
from reporting.sweeps import is_logarithmic
from reporting.text import single_line
from training.attention_picture import AttentionPicture
from training.scores import most_mistaken

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
    "svg.hashsalt": "aaconv",  # makes the files reproducible byte for byte
    "svg.fonttype": "path",
    "path.simplify_threshold": 0.5,
    "text.parse_math": False,  # a class may be called $x$
}
# Okabe and Ito's colorblind-safe palette; the plain network is black.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6000")
PLAIN, OTHERS = "#222222", "#c4c4c4"
# With more than LINES lines, only the BEST have a hue, because more cannot be told apart. More
# ROWS, or more CLASSES at either end, would be illegible.
LINES, BEST, ROWS, CLASSES = 8, 4, 12, 12
# The most classes in a confusion matrix, and the most that leave room for numbers in the cells.
MOST_CLASSES, NUMBERED_CLASSES = 100, 20
# The most characters of a label. A longer one would leave no room for the data.
LABEL = 40
CENTERED = {"ha": "center", "va": "center"}


# Use as a decorator (as here) or a context manager around drawing and saving.
style = partial(matplotlib.rc_context, STYLE)


def as_svg(figure: Figure) -> str:
    """Return the figure as an SVG file with its text as outlines."""
    return _save(figure, format="svg", metadata={"Date": None, "Creator": None}).decode()


def as_png(figure: Figure) -> bytes:
    """Return the figure as the bytes of a PNG file."""
    return _save(figure, format="png", dpi=150)


@style()
def _save(figure: Figure, **options: Any) -> bytes:
    content, lacking = _drawn(figure, options)
    if lacking:
        fonts, lacking = _fonts_with(lacking)
        for text in figure.findobj(Text):
            text.set_fontfamily([*text.get_fontfamily(), *fonts])
        if lacking:  # drawn as boxes; the tables show the characters
            names = sorted({_script(letter) for letter in lacking})
            words = f"boxes: no font here has {', '.join(names)}"
            figure.supxlabel(words, fontsize=7, color="#666")
        content, _ = _drawn(figure, options)
    return content


def _drawn(figure: Figure, options: dict[str, Any]) -> tuple[bytes, set[str]]:
    """Return the bytes of the file and the characters that matplotlib found no font for."""
    file, lacking = io.BytesIO(), set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        figure.savefig(file, **options)
    for warning in caught:
        letter = re.match(r"Glyph (\d+) .*missing from", str(warning.message))
        if letter is None:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
        else:
            lacking.add(chr(int(letter[1])))
    return file.getvalue(), lacking


def _fonts_with(letters: set[str]) -> tuple[list[str], set[str]]:
    """Return installed fonts that have the ``letters``, and the letters that no font has."""
    fonts, lacking = [], set(letters)
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: entry.fname):
        if not lacking:
            break
        if entry.name.startswith("Last Resort"):  # draws a box for every character
            continue
        try:
            known = font_manager.get_font(entry.fname).get_charmap()
        except (OSError, RuntimeError):  # removed or damaged since matplotlib listed it
            continue
        found = {letter for letter in lacking if ord(letter) in known}
        if found:
            fonts.append(entry.name)
            lacking -= found
    return fonts, lacking


def _script(letter: str) -> str:
    """The first word of a letter's Unicode name, such as DEVANAGARI."""
    return unicodedata.name(letter, f"U+{ord(letter):04X}").partition(" ")[0]


def one_panel(width: float = 5.2, height: float = 3.5) -> tuple[Figure, Any]:
    """Return a figure with one panel, sizes in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


@style()
def attention(layer: str, picture: AttentionPicture) -> Figure:
    """Draw the attention tiles of a layer, with labels for their rows and columns."""
    image, columns = picture.image, picture.columns
    rows = ["\n".join(fit_label(line) for line in row.split("\n")) for row in picture.rows]
    beside = 0.08 * max(len(line) for row in rows for line in row.split("\n")) + 0.4
    figure, panel = one_panel(image.width / 107 + beside, image.height / 107 + 0.6)
    panel.imshow(image, interpolation="none")
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.set_title(single_line(f"{layer} ({picture.words})"), fontsize=10, loc="center")
    panel.xaxis.tick_top()
    panel.tick_params(length=0, labelsize=8)
    middles = [(number + 0.5) / len(columns) * image.width for number in range(len(columns))]
    panel.set_xticks(middles, columns)
    middles = [(number + 0.5) / len(rows) * image.height for number in range(len(rows))]
    panel.set_yticks(middles, rows)
    return figure


def fit_label(text: str, n: int | None = None) -> str:
    """Shorten a name to fit an axis or a legend, and append the number of samples if given."""
    text = single_line(text)
    if len(text) > LABEL:
        text = f"{text[: LABEL // 2]}\N{HORIZONTAL ELLIPSIS}{text[1 - LABEL // 2 :]}"
    if text.startswith("_"):
        text = f" {text}"  # matplotlib keeps such names out of legends
    return text if n is None else f"{text} (n={n})"


def colors(variants: list[Variant]) -> dict[Variant, str]:
    """Choose colors: black for the plain variant with the most runs, hues for the others.

    With more than `LINES` variants, only the best by top-1 get a hue; the others are gray.
    """
    plain = [variant for variant in variants if variant.attention == "none"]
    plain = [max(plain, key=lambda v: len(v.runs))] if plain else []
    others = [variant for variant in variants if variant not in plain]
    if len(variants) > LINES:
        others.sort(key=lambda v: -v.mean("top1"))
        others = others[:BEST]
    others.sort(key=lambda v: (v.attention != "aa", variants.index(v)))
    chosen = dict.fromkeys(variants, OTHERS) | dict.fromkeys(plain, PLAIN)
    return chosen | dict(zip(others, COLORS, strict=False))


def _gray_first(chosen: dict[Variant, str]) -> list[Variant]:
    """The variants in drawing order: gray first, so that lines with a hue are on top."""
    return sorted(chosen, key=lambda variant: chosen[variant] != OTHERS)


def add_legend(figure: Figure, panel: Any, chosen: dict[Variant, str]) -> None:
    """Add a legend above the plot: it never covers data, and "best" placement would be slow."""
    gray = sum(color == OTHERS for color in chosen.values())
    if gray:
        name = "1 other variant" if gray == 1 else f"{gray} other variants"
        panel.plot([], [], color=OTHERS, linewidth=0.7, label=name)
    number = len(panel.get_legend_handles_labels()[1])
    for columns in range(min(4, number), 0, -1):
        legend = figure.legend(loc="outside upper left", ncols=columns)
        if columns == 1 or _width(figure, legend) < figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + 0.18 * (math.ceil(number / columns) - 1))


def _width(figure: Figure, legend: Legend) -> float:
    """The width of the legend in pixels, including margins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_save` handles characters that the font lacks
        renderer = FigureCanvasAgg(figure).get_renderer()
        return float(legend.get_window_extent(renderer).width)


# ---- Curves of several variants -----------------------------------------------------------------


def _minutes(run: Run) -> list[float]:
    return [s / 60 for s in itertools.accumulate(run.each_epoch("perf/epoch_seconds"))]


@style()
def curves(
    variants: list[Variant],
    seeds: dict[Variant, list[list[float]]],
    label: str,
    *,
    over_time: bool = False,
    zero: bool = False,
) -> Figure:
    """Plot the mean over the seeds by epoch, with a band from the lowest to the highest seed.

    With ``over_time``, the x axis is the mean minutes of training and evaluation. ``seeds`` has one
    curve per seed; colors are chosen over all ``variants``, even those without curves.
    """
    figure, panel = one_panel()
    if zero:
        panel.axhline(0, color=PLAIN, linewidth=1.2, linestyle="--")
    chosen = {variant: color for variant, color in colors(variants).items() if variant in seeds}
    for variant in _gray_first(chosen):
        along = [_minutes(run) if over_time else run.each_epoch("epoch") for run in variant.runs]
        x = [statistics.fmean(at) for at in zip(*along, strict=True)]
        values, color = list(zip(*seeds[variant], strict=True)), chosen[variant]
        gray = color == OTHERS
        panel.plot(
            x,
            [statistics.fmean(v) for v in values],
            color=color,
            linewidth=0.7 if gray else 1.7,
            linestyle="--" if variant.attention == "none" else "-",
            marker="." if len(x) <= 20 and not gray else None,
            label=None if gray else fit_label(variant.label, len(seeds[variant])),
        )
        if not gray:
            low, high = [min(v) for v in values], [max(v) for v in values]
            panel.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0)
    panel.set(xlabel="training time (minutes)" if over_time else "epoch")
    panel.set_ylabel(single_line(label))
    if not over_time:
        panel.xaxis.get_major_locator().set_params(integer=True)
    add_legend(figure, panel, chosen)
    return figure


@style()
def over_flops(variants: list[Variant]) -> Figure:
    """Plot last-epoch top-1 against FLOPs per image: each seed, mean and standard deviation."""
    chosen = colors(variants)
    large = max(variant.first["flops"] for variant in variants) >= 1e8
    unit, name = (1e9, "GFLOPs") if large else (1e6, "MFLOPs")
    figure, panel = one_panel()
    for variant in _gray_first(chosen):
        color, values = chosen[variant], list(variant.by_seed("top1").values())
        x, mean = variant.first["flops"] / unit, statistics.fmean(values)
        if color == OTHERS:
            panel.plot([x], [mean], "o", color=OTHERS, markersize=4)
            continue
        panel.plot([x] * len(values), values, ".", color=color, alpha=0.45, markersize=4)
        panel.errorbar(
            x,
            mean,
            yerr=statistics.stdev(values) if len(values) > 1 else None,
            fmt="s" if variant.attention == "none" else "o",
            color=color,
            markersize=6,
            capsize=3,
            label=fit_label(variant.label, len(values)),
        )
    panel.set(xlabel=f"{name} of the forward pass, one image", ylabel="top-1 accuracy (%)")
    panel.locator_params(axis="x", nbins=6)
    panel.ticklabel_format(useOffset=False)
    panel.margins(x=0.15)
    add_legend(figure, panel, chosen)
    return figure


# ---- Single findings ----------------------------------------------------------------------------


def _named_rows(panel: Any, names: list[str], margin: float) -> None:
    """Set up one horizontal row per name, the first at the bottom, and a line at zero."""
    panel.axvline(0, color="#555", linewidth=1)
    panel.set_yticks(range(len(names)), names)
    panel.set_ylim(-margin, len(names) - 1 + margin)
    panel.grid(axis="y", visible=False)


@style()
def differences(comparisons: list[Comparison], is_cut: bool) -> Figure:
    """Plot differences in top-1 from the plain baseline: each pair, their mean, its interval.

    If the list ``is_cut``, a line between its two halves marks the omitted rows.
    """
    figure, panel = one_panel(5.2, 1.1 + 0.36 * len(comparisons))
    rows = comparisons[::-1]
    _named_rows(panel, [fit_label(c.variant.label, c.top1.n) for c in rows], margin=0.6)
    for y, comparison in enumerate(rows):
        found = comparison.top1
        pairs = list(found.by_seed.values())
        panel.plot(pairs, [y] * len(pairs), "o", color="#888", markersize=4, fillstyle="none")
        if found.low is not None:
            panel.plot([found.low, found.high], [y, y], color=COLORS[0], linewidth=2.2)
        panel.plot(found.mean, y, "D", color=COLORS[0], markersize=6)
    if is_cut:
        panel.axhline(len(rows) / 2 - 0.5, color="#999", linewidth=0.8, linestyle=":")
    panel.set_xlabel("top-1 minus plain (points)")
    return figure


@style()
def by_class(rows: list[tuple[str, Difference]]) -> Figure:
    """Plot AA minus plain by class in ascending order; with many classes, only the two ends."""
    ends = rows if len(rows) <= 2 * CLASSES else rows[:CLASSES] + rows[-CLASSES:]
    figure, panel = one_panel(5.2, 1.0 + 0.21 * len(ends))
    for y, (_, found) in enumerate(ends):
        mean, pairs = found.mean or 0.0, list(found.by_seed.values())
        color = COLORS[0] if mean >= 0 else COLORS[1]
        panel.barh(y, mean, color=color, alpha=0.75, height=0.7)
        if len(pairs) > 1:
            panel.plot(pairs, [y] * len(pairs), ".", color="#333", markersize=3)
    if len(ends) < len(rows):
        panel.axhline(CLASSES - 0.5, color="#999", linewidth=0.8, linestyle=":")
    _named_rows(panel, [fit_label(name.replace("_", " ")) for name, _ in ends], margin=0.7)
    panel.tick_params(axis="y", labelsize=8)
    panel.set_xlabel("AA minus plain, top-1 (percentage points)")
    return figure


@style()
def heatmaps(
    panels: dict[str, dict[tuple[int, int], tuple[float, int] | str]],
    rows: tuple[str, list[str]],
    columns: tuple[str, list[str]],
) -> Figure:
    """Plot top-1 over two settings, with a panel per combination of the others and one color scale.

    Cells are {(row, column): (mean, n)}, or a text saying why there is no score; ``rows`` and
    ``columns`` are a setting's name and its values in order.
    """
    means = [c[0] for cells in panels.values() for c in cells.values() if not isinstance(c, str)]
    low, high = min(means), max(means)
    height, width = len(rows[1]), len(columns[1])
    across = min(len(panels), max(1, 9 // width))
    down = math.ceil(len(panels) / across)
    figure = Figure(
        figsize=(max(5.2, 1.4 + across * (0.3 + 0.78 * width)), 0.8 + down * (0.6 + 0.52 * height)),
        layout="constrained",
    )
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True)
    for spare in axes.flat[len(panels) :]:
        spare.set_visible(False)
    for panel, (title, cells) in zip(axes.flat, panels.items(), strict=False):
        grid = [[math.nan] * width for _ in range(height)]
        for (row, column), cell in cells.items():
            if not isinstance(cell, str):
                grid[row][column] = cell[0]
        panel.set_facecolor("#ececec")
        panel.grid(visible=False)
        image = panel.imshow(
            grid, cmap="cividis", vmin=low, vmax=high, aspect="auto", origin="lower"
        )
        for edge in range(1, height):
            panel.axhline(edge - 0.5, color="white", linewidth=1)
        for edge in range(1, width):
            panel.axvline(edge - 0.5, color="white", linewidth=1)
        for row, column in itertools.product(range(height), range(width)):
            cell = cells.get((row, column), "no run")
            if isinstance(cell, str):
                words, size, color = cell.replace(" ", "\n"), 7.5, "#555"
            else:
                words, size = f"{cell[0]:.2f}\nn={cell[1]}", 9.0
                color = "white" if cell[0] < (low + high) / 2 else "black"
            panel.text(column, row, words, CENTERED, fontsize=size, color=color)
        panel.set_title(fit_label(title))
        panel.set_xticks(range(width), map(fit_label, columns[1]))
        panel.set_yticks(range(height), map(fit_label, rows[1]))
    for panel in axes[:, 0]:
        panel.set_ylabel(fit_label(rows[0]))
    for panel in axes[-1]:
        panel.set_xlabel(fit_label(columns[0]))
    figure.colorbar(image, ax=axes, label="top-1 accuracy (%)")
    return figure


@style()
def over_settings(panels: dict[str, tuple[list[str], bool, list[tuple[int, float]]]]) -> Figure:
    """Plot top-1 over each setting of a sweep; the best point is filled.

    A panel holds a setting's values in order, whether to plot them as numbers, and the points
    (index of the value, top-1). A numeric axis is logarithmic where `is_logarithmic`.
    """
    width = 0.6 + 2.7 * len(panels)
    figure = Figure(figsize=(max(5.2, width), 3.0), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for panel, (name, (values, numeric, points)) in zip(axes, panels.items(), strict=True):
        numbers = [float(value) for value in values] if numeric else [*range(len(values))]
        if numeric and is_logarithmic(numbers):
            panel.set_xscale("log")
            panel.xaxis.set_major_formatter("{x:g}")
            panel.xaxis.set_minor_formatter("")
        if not numeric:
            panel.set_xticks(numbers, map(fit_label, values))
            panel.margins(x=0.15)
        best = max(points, key=lambda point: point[1])
        for level, top1 in points:
            filled = COLORS[0] if (level, top1) == best else "none"
            panel.plot(numbers[level], top1, "o", color=COLORS[0], markerfacecolor=filled)
        panel.set_xlabel(fit_label(name))
    axes[0].set_ylabel("top-1 accuracy (%)")
    return figure


@style()
def reliability(rows: list[dict[str, float | None]], error: float) -> Figure:
    """Plot accuracy over confidence, with a bar for each bin of `training.scores.Calibration`."""
    width = 1 / len(rows)
    figure, panel = one_panel(4.2, 4.0)
    shares = [row["images"] or 0.0 for row in rows]
    for number, row in enumerate(rows):
        if row["accuracy"] is None:
            continue
        alpha = 0.35 + 0.65 * shares[number] / max(shares)
        middle = (number + 0.5) * width
        panel.bar(middle, row["accuracy"], width, color=COLORS[0], alpha=alpha, edgecolor="white")
    panel.plot([0, 1], [0, 1], color=PLAIN, linewidth=1, linestyle="--")
    panel.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    panel.set(xlabel="confidence (darker: more images)", ylabel="accuracy")
    panel.set_title(f"expected calibration error {100 * error:.1f} points")
    return figure


@style()
def confusion(counts: Sequence[Sequence[int]], names: Sequence[str]) -> Figure:
    """Plot the confusion matrix: true classes in rows, predicted classes in columns.

    Colors are shares of a row's images. With more than `MOST_CLASSES` classes, those with the most
    mistakes are drawn; with few, the cells show numbers. A class without images has a gray row.
    """
    chosen = most_mistaken(counts, MOST_CLASSES)
    rows = [[counts[row][column] for column in chosen] for row in chosen]
    of_class = [sum(counts[row]) for row in chosen]
    shares = [
        [100 * number / images if images else math.nan for number in row]
        for row, images in zip(rows, of_class, strict=True)
    ]
    labels = [fit_label(names[index].replace("_", " ")) for index in chosen]
    few = len(chosen) <= NUMBERED_CLASSES
    # Sizes in inches of a cell and of the label margin (0.085 per character).
    cell = 0.5 if few else 0.14
    beside = 0.085 * max(map(len, labels)) + 0.9
    side = max(cell * len(chosen), 2.5)
    figure, panel = one_panel(side + beside + 0.9, side + beside)
    figure.set_layout_engine("compressed")  # for a panel with a fixed aspect ratio
    panel.set_facecolor("#ececec")
    panel.grid(visible=False)
    # The square-root scale keeps the few mistakes visible next to the large diagonal.
    scale = PowerNorm(0.5, vmin=0, vmax=100)
    image = panel.imshow(shares, cmap="Blues", norm=scale, interpolation="none")
    ticks = range(len(chosen))
    panel.set_xticks(ticks, labels, rotation=90)
    panel.set_yticks(ticks, labels)
    panel.tick_params(length=0, labelsize=9 if few else 7)
    if few:
        for row, column in itertools.product(ticks, ticks):
            if rows[row][column]:
                color = "white" if shares[row][column] > 35 else "black"
                panel.text(column, row, str(rows[row][column]), CENTERED, fontsize=8, color=color)
    step = 1 if few else 5  # grid lines that lead the eye from a cell to its labels
    for edge in range(step, len(chosen), step):
        panel.axhline(edge - 0.5, color="#ccc", linewidth=0.4)
        panel.axvline(edge - 0.5, color="#ccc", linewidth=0.4)
    panel.set(xlabel="predicted as", ylabel="true class")
    if len(chosen) < len(names):
        panel.set_title(f"the {len(chosen)} of {len(names)} classes with the most mistakes")
    figure.colorbar(image, ax=panel, label="% of the class's images", shrink=min(1, 4 / side))
    return figure
