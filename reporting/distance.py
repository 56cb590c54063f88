"""Accuracy on the lookup data set by the distance from cue to shapes: curves, table, picture."""

import statistics
from dataclasses import dataclass
from typing import Any

import torch

import models
from aaconv import text
from models import ATTENTIONS
from reporting import figures
from reporting.runs import Excluded, Run, Variant, differing_settings, group_by_variant, grouped
from reporting.text import MINUS, by_seed, count, first_few, single_line

DISTANCE = "data.distance"
# Line styles of the kinds of attention, in the order of `ATTENTIONS`.
DASHES: list[Any] = ["--", ":", "-.", "-", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1))]


@dataclass(frozen=True)
class Curve:
    """The scores of one network at each distance it was trained at."""

    model: str
    attention: str
    receptive_field: int  # of its convolutions, in pixels
    top1: dict[int, dict[int, float]]  # by distance in pixels, then by seed

    @property
    def label(self) -> str:
        """The network in words."""
        return single_line(f"{self.model} {ATTENTIONS[self.attention].label}")

    def ratio(self, distance: int) -> float:
        """The distance as a multiple of the receptive field."""
        return distance / self.receptive_field


def curves(runs: list[Run]) -> tuple[list[Curve], list[Excluded]]:
    """Return the curves of the ``runs`` that have a distance, smallest receptive field first.

    Raises:
        ValueError: if no run has a distance, or the runs of a network differ in more than
            attention, distance and seed.
    """
    chosen = [run for run in runs if run.settings.get(DISTANCE) is not None]
    others = [run for run in runs if run not in chosen]
    if not chosen:
        raise ValueError(
            f"none of {count(len(runs), 'finished run')} is of data=lookup with a {DISTANCE}"
        )
    variants, excluded = group_by_variant(chosen)
    excluded += [
        Excluded(r.folder, "of another data set", f"{r.data}, no distance") for r in others
    ]
    for model, members in grouped(variants, lambda variant: variant.model).items():
        _check_alike(model, members, (DISTANCE, "attention."))
    found = []
    lines = grouped(variants, lambda variant: (variant.model, variant.attention))
    for (model, attention), members in lines.items():
        _check_alike(f"{model} {ATTENTIONS[attention].label}", members, (DISTANCE,))
        top1 = {int(variant.settings[DISTANCE]): variant.by_seed("top1") for variant in members}
        field = _receptive_field(members[0].runs[0])
        found.append(Curve(model, attention, field, dict(sorted(top1.items()))))
    found.sort(key=lambda curve: curve.receptive_field)  # ties stay in the order of Table 1
    return found, excluded


def _check_alike(name: str, variants: list[Variant], but: tuple[str, ...]) -> None:
    differing = [key for key in differing_settings(variants) if not key.startswith(but)]
    if differing:
        raise ValueError(
            f"runs of {single_line(name)} differ in {first_few(differing)}, which no curve may "
            "mix; give the folders of one kind of runs"
        )


def _receptive_field(run: Run) -> int:
    """The receptive field of the run's network, built on the meta device without attention."""
    settings = run.summary["config"]["model"]
    try:
        arguments = {k: settings[k] for k in ("block", "depths", "widths", "stem", "shortcut")}
    except KeyError as error:
        raise ValueError(f"{run.folder}: its settings lack model.{error.args[0]}") from error
    with torch.device("meta"):
        strided_stem = settings.get("strided_stem", False)
        network = models.ResNet(**arguments, strided_stem=strided_stem, num_classes=1)
        return models.receptive_field(network)


def table(found: list[Curve]) -> list[str]:
    """A heading line, then a line for each network and distance."""
    seeds = {tuple(scores) for curve in found for scores in curve.top1.values()}
    headings = ["network", "attention", "distance", "distance / receptive field", "n"]
    lines = [[*headings, "mean top-1 %", "each seed"]]
    for curve in found:
        for distance, scores in curve.top1.items():
            words = [single_line(curve.model), ATTENTIONS[curve.attention].label, str(distance)]
            words += [f"{distance}/{curve.receptive_field} = {curve.ratio(distance):.2f}"]
            words += [str(len(scores)), f"{statistics.fmean(scores.values()):.2f}"]
            lines.append([*words, by_seed(scores, len(seeds) == 1)])
    return text.table(lines, "llrrrrl")


@figures.style()
def draw(curves: list[Curve], chance: float, ceiling: float) -> figures.Figure:
    """Plot top-1 over distance / receptive field: each seed and the mean over the seeds.

    ``chance`` (%) is the accuracy of guessing one of the shapes. ``ceiling`` (%) is the limit for
    plain networks whose receptive field is at most the distance + 1.
    """
    names = list(dict.fromkeys(curve.model for curve in curves))
    figure, panel = figures.one_panel(7.0, 3.8)
    for curve in curves:
        color = figures.COLORS[names.index(curve.model) % len(figures.COLORS)]
        dashes = DASHES[list(ATTENTIONS).index(curve.attention) % len(DASHES)]
        x = [curve.ratio(distance) for distance in curve.top1]
        seeds = [list(scores.values()) for scores in curve.top1.values()]
        same_n = len({len(values) for values in seeds}) == 1
        for at, values in zip(x, seeds, strict=True):
            panel.plot([at] * len(values), values, ".", color=color, alpha=0.5, markersize=5)
        panel.plot(
            x,
            [statistics.fmean(values) for values in seeds],
            color=color,
            linewidth=1.7,
            linestyle=dashes,
            label=figures.fit_label(curve.label, len(seeds[0]) if same_n else None),
        )
    begins = min(1 - 1 / curve.receptive_field for curve in curves)
    right = 1.05 * max(1, *(curve.ratio(d) for curve in curves for d in curve.top1))
    panel.axhline(chance, color="#777", linewidth=1, linestyle=":")
    panel.axhline(ceiling, color="#777", linewidth=1, linestyle=":")
    panel.plot([begins, right], [ceiling, ceiling], color=figures.PLAIN, linewidth=2.5)
    limit = f"limit of plain networks,\nproven from distance =\nreceptive field {MINUS} 1 on"
    for y, words in ((chance, "chance"), (ceiling, limit)):
        panel.annotate(
            f"{y:.3g} %: {words}",
            (1, y),
            (5, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    panel.set(xlim=(0, right), ylim=(0, 103))
    panel.set(xlabel="distance / receptive field of the convolutions", ylabel="top-1 accuracy (%)")
    figures.add_legend(figure, panel, {})
    return figure
