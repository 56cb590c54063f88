"""Sweeps over attention's settings: what each setting does, and top-1 over dk and dv."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from reporting.paired import Difference, corrected, paired
from reporting.runs import Variant, differing_settings
from reporting.text import natural, short, shortened
from training.records import is_finite

SIZES = ("attention.dk", "attention.dv", "attention.Nh")
# Values that stand for leaving something out; others are compared with them.
ABSENT = ("none", "null", "false")


@dataclass(frozen=True)
class Effect:
    """A setting's one value against another one, in runs that are alike in all else."""

    recipe: str  # what it differs in from the others; empty where there is one
    setting: str
    values: tuple[str, str]  # the second is the baseline
    combinations: int  # of the other settings, that both values were run with
    top1: Difference


def effects(variants: list[Variant]) -> list[list[Effect]]:
    """What each setting of attention does to top-1, any two of its values against each other.

    A list for each recipe that has them, corrected for their number. Two runs form a pair if the
    seed and all settings but one are the same.
    """
    recipes: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        if variant.attention == "aa":
            recipes[str(_recipe(variant))].append(variant)
    differing = differing_settings([members[0] for members in recipes.values()])
    differing = [key for key in differing if not key.startswith(("attention.", "model."))]
    families = []
    for members in recipes.values():
        words = [f"{short(key)}={members[0].setting(key)}" for key in differing]
        name = shortened([members[0].model, *words], 4) if len(recipes) > 1 else ""
        found = _effects(name, members)
        top1 = corrected([effect.top1 for effect in found])
        families.append([replace(e, top1=t) for e, t in zip(found, top1, strict=True)])
    return [family for family in families if family]


def _recipe(variant: Variant) -> list[tuple[str, str]]:
    keys = sorted(key for key in variant.settings if not key.startswith("attention."))
    return [("model", variant.model), *((key, variant.setting(key)) for key in keys)]


def _effects(recipe: str, variants: list[Variant]) -> list[Effect]:
    """Of the variants of one recipe; sizes come first, and values ascend."""
    pairs: dict[tuple[str, str, str], list[tuple[Variant, Variant]]] = defaultdict(list)
    for key in differing_settings(variants):
        alike: dict[str, list[Variant]] = defaultdict(list)
        for variant in variants:
            rest = sorted((k, variant.setting(k)) for k in variant.settings if k != key)
            alike[str(rest)].append(variant)
        for both in (both for members in alike.values() for both in combinations(members, 2)):
            low, high = sorted(both, key=lambda variant: _ascending(variant.setting(key)))
            if low.setting(key) != high.setting(key):
                pairs[key, low.setting(key), high.setting(key)].append((high, low))

    def order(values: tuple[str, str, str]) -> tuple[Any, ...]:
        key, low, high = values
        size = SIZES.index(key) if key in SIZES else len(SIZES)
        return (size, key, _ascending(low), _ascending(high))

    found = [
        Effect(recipe, key, (high, low), len(pairs[key, low, high]), _mean(pairs[key, low, high]))
        for key, low, high in sorted(pairs, key=order)
    ]
    return [effect for effect in found if effect.top1.n]


def _mean(pairs: list[tuple[Variant, Variant]]) -> Difference:
    """A seed's difference is the mean over the pairs that have it.

    Seeds are the independent samples, the combinations of settings that they are trained in are
    not.
    """
    scores: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for ours, theirs in pairs:
        first, second = ours.by_seed("top1"), theirs.by_seed("top1")
        for seed in first.keys() & second.keys():
            scores[seed].append((first[seed], second[seed]))
    means = [
        {seed: statistics.mean(both[side] for both in found) for seed, found in scores.items()}
        for side in (0, 1)
    ]
    return paired(*means)


def _ascending(value: str) -> tuple[bool, list[tuple[float, str]]]:
    return (value not in ABSENT, natural(value))


@dataclass(frozen=True)
class Heatmap:
    """Mean top-1 and n over dk and dv at one Nh, and the lowest and highest mean at any Nh."""

    name: str
    title: str
    cells: dict[tuple[str, str], tuple[float, int]]  # {(dk, dv): (mean, n)}
    low: float
    high: float


def heatmaps(variants: list[Variant]) -> list[Heatmap]:
    """Over dk and dv, one for each Nh, of what is otherwise trained alike."""
    sweeps: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        if all(is_finite(variant.settings.get(size)) for size in SIZES):
            rest = {k: v for k, v in variant.settings.items() if k not in SIZES}
            sweeps[f"{variant.model} {sorted(rest.items(), key=str)}"].append(variant)
    found = []
    for number, members in enumerate((m for m in sweeps.values() if len(m) > 1), start=1):
        panels: dict[str, dict[tuple[str, str], tuple[float, int]]] = defaultdict(dict)
        for variant in members:
            dk, dv, heads = (variant.setting(size) for size in SIZES)
            panels[heads][dk, dv] = (variant.mean("top1"), len(variant.runs))
        means = [mean for cells in panels.values() for mean, _ in cells.values()]
        for heads, cells in sorted(panels.items(), key=lambda item: float(item[0])):
            name, title = f"sweep{number}-Nh{heads}", f"{members[0].model}, Nh = {heads}"
            found.append(Heatmap(name, title, cells, min(means), max(means)))
    return found
