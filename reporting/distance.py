"""Runs of the lookup data set over the distance between cue and shapes: curves and their table."""

from collections import defaultdict
from dataclasses import dataclass

import torch

import models
from aaconv import text
from models import ATTENTIONS
from reporting.runs import Excluded, Run, Variant, group_by_variant
from reporting.text import by_seed, count, one_line, shortened

DISTANCE = "data.distance"


@dataclass(frozen=True)
class Curve:
    """One network over the distances that it was trained at."""

    model: str
    attention: str
    receptive_field: int  # of its convolutions, in pixels
    top1: dict[int, dict[int, float]]  # by distance in pixels, then by seed

    @property
    def label(self) -> str:
        """The network in words."""
        return one_line(f"{self.model} {ATTENTIONS[self.attention].label}")

    def ratio(self, distance: int) -> float:
        """The distance as a multiple of the receptive field."""
        return distance / self.receptive_field


def curves(runs: list[Run]) -> tuple[list[Curve], list[Excluded]]:
    """The curves of those ``runs`` that have a distance, the smallest receptive field first.

    Raises:
        ValueError: no run has a distance, or those of a network differ in more than attention,
            distance and seed.
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
    networks: dict[str, list[Variant]] = defaultdict(list)
    lines: dict[tuple[str, str], list[Variant]] = defaultdict(list)
    for variant in variants:
        networks[variant.model].append(variant)
        lines[variant.model, variant.attention].append(variant)
    for model, members in networks.items():
        _check_alike(model, [k for k in _differing(members) if not k.startswith("attention.")])
    for (model, attention), members in lines.items():
        _check_alike(f"{model} {ATTENTIONS[attention].label}", _differing(members))
    found = [_curve(*key, members) for key, members in lines.items()]
    order = list(ATTENTIONS)
    found.sort(key=lambda c: (c.receptive_field, c.model, order.index(c.attention)))
    return found, excluded


def _differing(variants: list[Variant]) -> list[str]:
    keys = {key for variant in variants for key in variant.settings} - {DISTANCE}
    return sorted(key for key in keys if len({v.setting(key) for v in variants}) > 1)


def _check_alike(name: str, differing: list[str]) -> None:
    if differing:
        raise ValueError(
            f"runs of {one_line(name)} differ in {shortened(differing)}, which no curve may mix; "
            "give the folders of one kind of runs"
        )


def _curve(model: str, attention: str, variants: list[Variant]) -> Curve:
    top1 = {int(v.settings[DISTANCE]): v.by_seed("top1") for v in variants}
    return Curve(
        model, attention, _receptive_field(variants[0].runs[0]), dict(sorted(top1.items()))
    )


def _receptive_field(run: Run) -> int:
    """That of the run's network, which is built without memory and without attention."""
    settings = run.summary["config"]["model"]
    try:
        arguments = {k: settings[k] for k in ("block", "depths", "widths", "stem", "shortcut")}
    except KeyError as error:
        raise ValueError(f"{run.folder}: its settings lack model.{error.args[0]}") from error
    with torch.device("meta"):
        return models.receptive_field(models.ResNet(**arguments, num_classes=1))


def table(found: list[Curve]) -> list[str]:
    """A line for each network and distance, below a line of headings."""
    seeds = {tuple(scores) for curve in found for scores in curve.top1.values()}
    headings = ["network", "attention", "distance", "distance / receptive field", "n"]
    lines = [[*headings, "mean top-1 %", "each seed"]]
    for curve in found:
        for distance, scores in curve.top1.items():
            words = [one_line(curve.model), ATTENTIONS[curve.attention].label, str(distance)]
            words += [f"{distance}/{curve.receptive_field} = {curve.ratio(distance):.2f}"]
            words += [str(len(scores)), f"{sum(scores.values()) / len(scores):.2f}"]
            lines.append([*words, by_seed(scores, len(seeds) == 1)])
    return text.table(lines, "llrrrrl")
