"""Sweeps over attention's settings: what each setting does, and the heatmaps over dk and dv."""

import statistics
from collections import defaultdict
from dataclasses import dataclass
from itertools import combinations

from reporting import figures
from reporting.paired import LEVEL, Difference, holm, paired
from reporting.parts import Card, Picture, Section, Table
from reporting.runs import Variant
from reporting.text import (
    MINUS,
    by_seed_signed,
    count,
    interval,
    natural,
    p_value,
    short,
    shortened,
    signed_or_dash,
)
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


def by_recipe(variants: list[Variant]) -> list[tuple[str, list[Effect], list[float | None]]]:
    """For each recipe that has them: its name, its effects, and their p by Holm.

    The name is empty where there is only one recipe.
    """
    recipes: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        if variant.attention == "aa":
            recipes[str(_recipe(variant))].append(variant)
    differing = _differing([members[0] for members in recipes.values()])
    outcomes = []
    for members in recipes.values():
        found = effects(members)
        if found:
            words = [f"{short(key)}={members[0].setting(key)}" for key in differing]
            name = shortened([members[0].model, *words], 4) if len(recipes) > 1 else ""
            outcomes.append((name, found, holm([effect.top1.p for effect in found])))
    return outcomes


def _recipe(variant: Variant) -> list[tuple[str, str]]:
    settings = sorted((k, variant.setting(k)) for k in variant.settings if not _of_attention(k))
    return [("model", variant.model), *settings]


def _differing(variants: list[Variant]) -> list[str]:
    """The settings beside the network's and attention's that recipes differ in."""
    keys = sorted({key for variant in variants for key in variant.settings})
    keys = [key for key in keys if not _of_attention(key) and not key.startswith("model.")]
    return [key for key in keys if len({variant.setting(key) for variant in variants}) > 1]


def _of_attention(key: str) -> bool:
    return key.startswith("attention.")


def _first_the_sizes(key: str) -> tuple[int, str]:
    return (SIZES.index(key) if key in SIZES else len(SIZES), key)


def _ascending(value: str) -> tuple[bool, list[tuple[float, str]]]:
    return (value not in ABSENT, natural(value))


# ---- On the page --------------------------------------------------------------------------------


def sweep_card(variants: list[Variant]) -> Card | None:
    """How many differences between attention's settings are significant, and the largest one."""
    rows = [
        (recipe, effect, p)
        for recipe, found, corrected in by_recipe(variants)
        for effect, p in zip(found, corrected, strict=True)
    ]
    if not rows:
        return None
    tested = [row for row in rows if row[2] is not None]
    clear = [row for row in tested if row[2] is not None and row[2] < 1 - LEVEL]
    recipe, effect, p = max(clear or rows, key=lambda row: abs(row[1].top1.mean or 0.0))
    ours, theirs = effect.values
    largest = f"{short(effect.setting)} {ours} vs. {theirs}, {signed_or_dash(effect.top1.mean)}"
    largest += f" percentage points{f' ({recipe})' if recipe else ''}"
    details = [f"n = {count(effect.top1.n, 'seed')}"]
    if effect.top1.low is not None:
        details.insert(0, f"95 % interval {interval(effect.top1.low, effect.top1.high)}")
    if p is not None:
        details.append(f"p {p_value(p)}, corrected for the number of differences (Holm)")
    if clear:
        verdict = f"{'It is' if len(clear) == 1 else 'The largest of them is'} {largest}."
    elif tested:
        verdict = f"None is significant; the largest is {largest}."
    else:
        verdict = f"Without several seeds each may be chance; the largest is {largest}."
    return Card(
        "Settings of the attention, against each other",
        f"{len(clear)} of {len(rows)}",
        f"differences between two values {'is' if len(clear) == 1 else 'are'} significant",
        verdict,
        "open",
        details,
    )


def sweep_section(variants: list[Variant]) -> Section | None:
    """What attention's settings do; None where no two variants differ in one of them alone."""
    tables = [_table(*outcome) for outcome in by_recipe(variants)]
    pictures = _heatmaps(variants)
    if not tables and not pictures:
        return None
    text = []
    if pictures:
        text.append(
            "dk and dv are numbers of channels or, written with a decimal point, fractions of the "
            "block's output channels. All panels of a network share one colour scale."
        )
    return Section("Settings of the attention", text, tables, pictures)


def _table(recipe: str, found: list[Effect], corrected: list[float | None]) -> Table:
    rows = [
        [
            short(effect.setting),
            f" {MINUS} ".join(effect.values),
            str(effect.combinations),
            str(effect.top1.n),
            signed_or_dash(effect.top1.mean),
            interval(effect.top1.low, effect.top1.high),
            p_value(effect.top1.p).removeprefix("= "),
            p_value(p).removeprefix("= "),
            by_seed_signed(effect.top1.by_seed),
        ]
        for effect, p in zip(found, corrected, strict=True)
    ]
    head = ["setting", "difference", "combinations", "n", "top-1", "95 % interval", "p"]
    caption = (
        f"{recipe}{': ' if recipe else ''}Top-1 with one value of a setting minus that with "
        "another, by seed and all other settings alike: the mean over the combinations of the "
        "others that both values were run with. The last p is corrected for the "
        f"{len(rows)} rows, the intervals are not."
    )
    if len(rows) == 1:
        caption = caption.partition(" The last p")[0]
    return Table([*head, "p by Holm", "by seed"], rows, texts=2, caption=caption)


def _heatmaps(variants: list[Variant]) -> list[Picture]:
    """Heatmaps over dk and dv, one for each Nh, of what is otherwise trained alike."""
    sweeps: dict[str, list[Variant]] = defaultdict(list)
    for variant in variants:
        if all(is_finite(variant.settings.get(size)) for size in SIZES):
            rest = {k: v for k, v in variant.settings.items() if k not in SIZES}
            sweeps[f"{variant.model} {sorted(rest.items(), key=str)}"].append(variant)
    pictures = []
    for number, members in enumerate((m for m in sweeps.values() if len(m) > 1), start=1):
        panels: dict[str, dict[tuple[str, str], tuple[float, int]]] = defaultdict(dict)
        for variant in members:
            dk, dv, heads = (variant.setting(size) for size in SIZES)
            values = variant.by_seed("top1").values()
            panels[heads][dk, dv] = (statistics.mean(values), len(values))
        means = [mean for cells in panels.values() for mean, _ in cells.values()]
        for heads, cells in sorted(panels.items(), key=lambda item: float(item[0])):
            title = f"{members[0].model}, Nh = {heads}"
            svg = figures.heatmap(cells, min(means), max(means), title)
            caption = f"{title}: mean top-1 (%) of the last epoch over n seeds."
            pictures.append(Picture(f"sweep{number}-Nh{heads}", title, svg, caption))
    return pictures
