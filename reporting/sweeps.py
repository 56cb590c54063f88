"""Sweeps over attention's settings: what each setting does, and top-1 over dk and dv."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, replace
from itertools import combinations

from reporting.paired import Difference, corrected, paired
from reporting.runs import Variant, differing_settings
from reporting.text import natural, short, shortened
from training.run_folder import is_finite

SIZES = ("attention.dk", "attention.dv", "attention.Nh")
# Values that stand for leaving something out; others are compared with them.
ABSENT = ("none", "null", "false")


@dataclass(frozen=True)
class Effect:
    """A setting's one value against another one, in runs that are alike in all else."""

    setting: str
    values: tuple[str, str]  # the second is the baseline
    combinations: int  # of the other settings, that both values were run with
    top1: Difference
    recipe: str = ""  # by what it differs from the others, where there are several


def effects(variants: list[Variant]) -> list[Effect]:
    """What each setting of attention does to top-1, any two of its values against each other.

    ``variants`` are of one recipe. Two runs form a pair if the seed and all settings but this one
    are the same. Where such pairs differ in the other settings, a seed's difference is their mean:
    seeds are the independent samples, the combinations that they are trained in are not.
    """
    keys = {key for variant in variants for key in variant.settings if _of_attention(key)}
    found = []
    for key in sorted(keys, key=_first_the_sizes):
        values = sorted({variant.setting(key) for variant in variants}, key=_ascending)
        for low, high in combinations(values, 2):
            effect = _effect(variants, key, high, low)
            if effect is not None:
                found.append(effect)
    return found


def _effect(variants: list[Variant], key: str, ours: str, theirs: str) -> Effect | None:
    others: dict[str, dict[str, Variant]] = defaultdict(dict)
    for variant in variants:
        rest = sorted((k, variant.setting(k)) for k in variant.settings if k != key)
        others[str(rest)][variant.setting(key)] = variant
    pairs = [
        (both[ours], both[theirs]) for both in others.values() if {ours, theirs} <= both.keys()
    ]
    scores: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for one, other in pairs:
        first, second = one.by_seed("top1"), other.by_seed("top1")
        for seed in first.keys() & second.keys():
            scores[seed].append((first[seed], second[seed]))
    if not scores:
        return None
    means = [
        {seed: statistics.mean(pair[side] for pair in found) for seed, found in scores.items()}
        for side in (0, 1)
    ]
    return Effect(key, (ours, theirs), len(pairs), paired(*means))


def by_recipe(variants: list[Variant]) -> list[list[Effect]]:
    """For each recipe that has them its `effects`, corrected for their number."""
    recipes: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        if variant.attention == "aa":
            recipes[str(_recipe(variant))].append(variant)
    differing = differing_settings([members[0] for members in recipes.values()])
    differing = [k for k in differing if not _of_attention(k) and not k.startswith("model.")]
    outcomes = []
    for members in recipes.values():
        words = [f"{short(key)}={members[0].setting(key)}" for key in differing]
        name = shortened([members[0].model, *words], 4) if len(recipes) > 1 else ""
        found = effects(members)
        top1 = corrected([effect.top1 for effect in found])
        outcomes.append([replace(e, top1=t, recipe=name) for e, t in zip(found, top1, strict=True)])
    return [outcome for outcome in outcomes if outcome]


def _recipe(variant: Variant) -> list[tuple[str, str]]:
    settings = sorted((k, variant.setting(k)) for k in variant.settings if not _of_attention(k))
    return [("model", variant.model), *settings]


def _of_attention(key: str) -> bool:
    return key.startswith("attention.")


def _first_the_sizes(key: str) -> tuple[int, str]:
    return (SIZES.index(key) if key in SIZES else len(SIZES), key)


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
