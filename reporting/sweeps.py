"""Sweeps over attention settings: the variants of one recipe as a grid, and its analysis."""

import math
import statistics
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

from models.fields import is_finite
from reporting.factorial import ALL_PAIRS, LEVEL, Cell, Design, Effect, Interaction
from reporting.runs import Excluded, Variant, as_recipe, differing_settings, grouped, in_words
from reporting.text import first_few, natural, rounded, short

SIZES = ("attention.dk", "attention.dv", "attention.Nh")
# A cell of the grid: the level of each factor.
Levels = tuple[int, ...]
# Values that mean a feature is off; they come first, so that the others are compared with them.
ABSENT = ("none", "null", "false")


@dataclass(frozen=True, eq=False)
class Factor:
    """Settings that vary together, and their values in order; each combination is a level."""

    keys: tuple[str, ...]
    levels: list[tuple[str, ...]]

    @cached_property
    def numbers(self) -> list[float]:
        """The positions of the levels along a trend, from 0 to 1, linear or logarithmic.

        Empty if there are few levels, or if channel counts and fractions are mixed.
        """
        if len(self.levels) <= ALL_PAIRS or len(self.keys) > 1:
            return []
        values = [value for (value,) in self.levels]
        fractions = ["." in value for value in values]
        if self.keys[0] in SIZES and any(fractions) and not all(fractions):
            return []  # a mix of channel counts and fractions
        try:
            numbers = list(map(float, values))
        except ValueError:
            return []
        if is_logarithmic(numbers):
            numbers = [math.log(number) for number in numbers]
        low, high = min(numbers), max(numbers)
        return [(number - low) / (high - low) for number in numbers] if high > low else []

    @property
    def name(self) -> str:
        return ", ".join(map(short, self.keys))

    @cached_property
    def _shown(self) -> list[tuple[str, ...]]:
        columns = [rounded(values) for values in zip(*self.levels, strict=True)]
        return [
            tuple(shown[value] for shown, value in zip(columns, level, strict=True))
            for level in self.levels
        ]

    @property
    def values(self) -> list[str]:
        """The levels as text."""
        return [", ".join(values) for values in self._shown]

    def words(self, level: int) -> str:
        """`dk 0.5`, or `dk 0.5, dv 0.25` if these vary together."""
        pairs = zip(map(short, self.keys), self._shown[level], strict=True)
        return ", ".join(f"{key} {value}" for key, value in pairs)


@dataclass(frozen=True, eq=False)
class Sweep:
    """Variants of one kind of attention and one recipe that differ in attention settings."""

    recipe: str  # how it differs from the report's other sweeps; empty if it is the only one
    factors: list[Factor]
    by_levels: dict[Levels, Variant]
    missing: dict[Levels, str]  # why a cell has no finished run

    @cached_property
    def design(self) -> Design:
        """The design with the top-1 of every run, in percent."""
        runs = [(levels, run) for levels, v in self.by_levels.items() for run in v.runs]
        levels = numpy.array([levels for levels, _ in runs])
        return Design(
            levels,
            numpy.array([run.seed for _, run in runs]),
            numpy.array([run.last("top1") for _, run in runs]),
            {
                number: numpy.array(factor.numbers)[levels[:, number]]
                for number, factor in enumerate(self.factors)
                if factor.numbers
            },
        )

    @cached_property
    def effects(self) -> list[Effect]:
        """The effects of the settings, the largest first."""
        return sorted(self.design.effects(), key=lambda effect: -abs(effect.mean))

    @cached_property
    def ranking(self) -> list[Cell]:
        """The settings by top-1, the best first."""
        return self.design.ranked()

    def words(self, levels: Levels) -> str:
        """The settings of a cell: `dk 0.5, dv 0.125, Nh 4`."""
        named = zip(self.factors, levels, strict=True)
        return ", ".join(factor.words(level) for factor, level in named)


def is_logarithmic(numbers: list[float]) -> bool:
    """Whether the numbers are all positive and span more than a factor of ten."""
    return min(numbers) > 0 and max(numbers) > 10 * min(numbers)


def is_significant(effect: Effect | Interaction) -> bool:
    """Whether the effect's p is below 5 %."""
    return effect.p is not None and effect.p < 1 - LEVEL


def find_sweeps(variants: list[Variant], excluded: list[Excluded]) -> list[Sweep]:
    """Find the sweeps among the variants, each of one kind of attention and one recipe.

    If every run has its own recipe, as in a search over the learning rate, only network, data and
    epochs count as the recipe, and every other setting that differs is a factor.
    """
    is_kept = _is_of_recipe
    if not (groups := _groups(variants, is_kept)):
        is_kept = _is_of_subject
        groups = _groups(variants, is_kept)
    differing = differing_settings([members[0] for members in groups.values()])
    differing = [key for key in differing if not key.startswith(("attention.", "model."))]
    kinds = {members[0].attention for members in groups.values()}
    found = []
    for recipe, members in groups.items():
        first = members[0]
        name = [first.model, *([first.attention] if len(kinds) > 1 else [])]
        name += [f"{short(key)}={first.setting(key)}" for key in differing]
        factors = _factors(members)
        by_levels = {_levels(variant.settings, factors): variant for variant in members}
        missing = {}
        for one in excluded:
            if one.settings is not None and _recipe(one.settings, is_kept) == recipe:
                with suppress(ValueError):  # a value that no finished run has
                    missing[_levels(one.settings, factors)] = one.kind
        missing = {levels: why for levels, why in missing.items() if levels not in by_levels}
        label = first_few(name, 4) if len(groups) > 1 else ""
        found.append(Sweep(label, factors, by_levels, missing))
    return found


def _groups(variants: list[Variant], is_kept: Callable[[str], bool]) -> dict[str, list[Variant]]:
    """The variants of each recipe that has more than one."""
    groups = grouped(variants, lambda variant: _recipe(variant.settings, is_kept))
    return {recipe: members for recipe, members in groups.items() if len(members) > 1}


def _recipe(settings: dict[str, Any], is_kept: Callable[[str], bool]) -> str:
    return as_recipe({key: value for key, value in settings.items() if is_kept(key)})


def _is_of_recipe(key: str) -> bool:
    return not key.startswith("attention.") or key == "attention._target_"


def _is_of_subject(key: str) -> bool:
    return key.startswith(("model.", "data.", "epochs", "attention._target_"))


def _levels(settings: dict[str, Any], factors: list[Factor]) -> Levels:
    """The levels of a run with these settings; ValueError if a factor lacks one of them."""
    return tuple(
        factor.levels.index(tuple(in_words(settings, key) for key in factor.keys))
        for factor in factors
    )


def _factors(variants: list[Variant]) -> list[Factor]:
    """The factors, sizes first. Settings that split the variants identically are one factor.

    Settings with many values are not merged this way, because each may be a trend of its own.
    """

    def split(key: str) -> tuple[str | int, ...]:
        values = [variant.setting(key) for variant in variants]
        many = len(set(values)) > ALL_PAIRS
        return tuple(values if many else map(values.index, values))

    factors = []
    for keys in grouped(sorted(differing_settings(variants), key=_sizes_first), split).values():
        amounts: dict[tuple[str, ...], Any] = {}
        for variant in variants:
            value = tuple(variant.setting(key) for key in keys)
            amounts.setdefault(value, [_ascending(variant, key) for key in keys])
        factors.append(Factor(tuple(keys), sorted(amounts, key=lambda value: amounts[value])))
    return factors


def _sizes_first(key: str) -> tuple[int, str]:
    return (SIZES.index(key) if key in SIZES else len(SIZES), key)


def _ascending(variant: Variant, key: str) -> Any:
    """A sort key for a value: dk and dv are sorted by the resulting number of channels."""
    value, name = variant.setting(key), key.removeprefix("attention.")
    layers = variant.first.get("layers")
    channels = 0.0
    if name in ("dk", "dv") and isinstance(layers, list):
        amounts = [layer.get(name, 0) for layer in layers if isinstance(layer, dict)]
        channels = statistics.fmean(amounts) if amounts and all(map(is_finite, amounts)) else 0.0
    return (value not in ABSENT, channels, natural(value))
