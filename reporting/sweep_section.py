"""The report on a sweep of attention settings: which are best, and the effect of each."""

import itertools

from reporting import figures, text
from reporting.factorial import Effect, Error
from reporting.paired import holm_bonferroni
from reporting.parts import Card, Picture, Section, Table, tables
from reporting.sweeps import Levels, Sweep, is_significant
from reporting.text import DASH, MINUS, count, first_few, interval, p_value, signed

# More heatmap panels than this would be illegible.
PANELS = 12
# The most values of a setting that fit into a panel.
VALUES = 12


def title(sweep: Sweep) -> str:
    """`Which dk, dv and Nh are best?`"""
    names = [factor.name for factor in sweep.factors]
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return f"Which {listed} {'is' if len(names) == 1 else 'are'} best?"


def cards(sweep: Sweep) -> list[Card]:
    """Cards for the best settings and the largest effect of a single setting."""
    of = f" ({sweep.recipe})" if sweep.recipe else ""
    return [_best_card(sweep, of), *([_effect_card(sweep, of)] if sweep.effects else [])]


def _best_card(sweep: Sweep, of: str) -> Card:
    ranking = sweep.ranking
    best = ranking[0]
    first = sweep.by_levels[best.levels].first
    details = [f"n = {count(best.n, 'seed')}"]
    if best.low is not None and best.high is not None:
        low, high = max(best.low, 0.0), min(best.high, 100.0)  # limits of an accuracy
        reach = f"{low:.2f} to {high:.2f} %"
        details.insert(0, f"95 % interval {reach}, which allows for having picked the highest")
    others = [sweep.words(cell.levels) for cell in ranking[1:] if cell.is_candidate]
    if len(others) == len(ranking) - 1:
        details.append("no other setting is distinguishable from it")
    elif others:
        more = "; ..." if len(others) > 3 else ""
        words = f"{count(len(others), 'other')} ({'; '.join(others[:3])}{more})"
        details.append(f"not distinguishable from it: {words}")
    else:
        details.append("every other setting is lower")
    details.append(f"{first['parameters']:,} parameters, {text.gflops(first['flops'])} GFLOPs")
    return Card(
        f"Best of {len(ranking)} settings{of}",
        f"{best.mean:.2f} %",
        "top-1 accuracy",
        f"{sweep.words(best.levels)}.",
        details,
    )


def _effect_card(sweep: Sweep, of: str) -> Card:
    effect = sweep.effects[0]
    name, higher, lower = _words(sweep, effect)
    clear = sum(map(is_significant, sweep.effects))
    if effect.p is None:
        verdict = "There is no error estimate, so this may be chance."
    elif is_significant(effect):
        verdict = f"{name} {higher if effect.mean > 0 else lower} is better."
    else:
        verdict = "The largest effect, and it may be chance."
    details = [f"{clear or 'none'} of {count(len(sweep.effects), 'difference')} significant"]
    if effect.low is not None:
        reach = interval(effect.low, effect.high)
        details.insert(0, f"95 % interval {reach}, of all differences together")
    error = sweep.design.error
    if error is not None and error.basis == "interactions":
        details.append("too few repeated seeds: interactions of the settings stand for the error")
    return Card(
        f"The largest effect of one setting{of}",
        signed(effect.mean),
        f"percentage points of top-1, {name} {higher} vs. {lower}",
        verdict,
        details,
        "open" if not is_significant(effect) else "better" if effect.mean > 0 else "worse",
    )


def _words(sweep: Sweep, effect: Effect) -> tuple[str, str, str]:
    factor = sweep.factors[effect.factor]
    trend = " (trend)" if factor.numbers else ""
    high, low = effect.levels
    return f"{factor.name}{trend}", factor.values[high], factor.values[low]


def section(sweeps: list[Sweep]) -> Section | None:
    """Ranking, effects, interactions and heatmaps of each sweep; None if there is no sweep."""
    if not sweeps:
        return None
    made, notes = [], []
    for sweep in sweeps:
        made += [*_ranking(sweep), *_effects(sweep), *_interactions(sweep)]
        if sweep.missing:
            cells = (f"{sweep.words(at)} ({why})" for at, why in sorted(sweep.missing.items()))
            notes.append(f"{_head(sweep)}Without a finished run: {first_few(cells, 6)}.")
    words = []
    keys = {key for sweep in sweeps for factor in sweep.factors for key in factor.keys}
    if not keys.isdisjoint(("attention.dk", "attention.dv")):
        words.append(
            "dk and dv are numbers of channels or, written with a decimal point, fractions of the "
            "block's output channels."
        )
    return Section("Comparison of settings", words, made, pictures(sweeps), notes)


def pictures(sweeps: list[Sweep]) -> list[Picture]:
    """A heatmap for each sweep or, for a random search, top-1 over each setting."""
    made = (
        _heatmap(sweep, number) or _over_settings(sweep, number)
        for number, sweep in enumerate(sweeps, start=1)
    )
    return [picture for picture in made if picture is not None]


def _head(sweep: Sweep) -> str:
    return f"{sweep.recipe}: " if sweep.recipe else ""


def _ranking(sweep: Sweep) -> list[Table]:
    rows = []
    for rank, cell in enumerate(sweep.ranking, start=1):
        variant = sweep.by_levels[cell.levels]
        rows.append(
            {
                "rank": str(rank),
                "settings": sweep.words(cell.levels),
                "top-1 %": text.mean_and_sd(variant.by_seed("top1").values()),
                "n": str(cell.n),
                "vs. best": "best"
                if rank == 1
                else "not distinguishable"
                if cell.is_candidate
                else "lower",
                "parameters": f"{variant.first['parameters']:,}",
                "GFLOPs": text.gflops(variant.first["flops"]),
                "minutes": f"{variant.mean('perf/total_seconds') / 60:.1f}",
            }
        )
    caption = (
        f"{_head(sweep)}The settings by their mean top-1. Those that are not distinguishable "
        "cannot be ruled out as the best one at the level of 5 %, for all of them together."
    )
    if not sweep.design.is_balanced:
        caption += (
            " Not all have the same seeds, so the seeds' own differences are taken out first."
            if sweep.design.takes_seeds_out
            else " Not all have the same seeds, but they do not differ significantly."
        )
    return tables(rows, texts=2, caption=caption)


def _effects(sweep: Sweep) -> list[Table]:
    rows = []
    for effect in sweep.effects:
        name, higher, lower = _words(sweep, effect)
        rows.append(
            {
                "setting": name,
                "difference": f"{higher} {MINUS} {lower}",
                "top-1": signed(effect.mean),
                "95 % interval": interval(effect.low, effect.high),
                "p": p_value(effect.p),
            }
        )
    design, together = sweep.design, ""
    if len(rows) > 1 and any(effect.p is not None for effect in sweep.effects):
        together = f"Interval and p are corrected for all {len(rows)} rows together. "
    seeds = " and the seeds" if design.seeds_are_blocks and len(set(design.seeds)) > 1 else ""
    caption = (
        f"{_head(sweep)}What one setting does, in points of top-1, by least squares over all "
        f"values of the others{seeds}; the largest first. {together}{_basis(design.error)}"
    )
    return tables(rows, texts=2, caption=caption)


def _basis(error: Error | None) -> str:
    if error is None:
        return "With a single seed, there is no error estimate to test against."
    sd = f"{error.sd:.2f} points with {count(error.df, 'degree')} of freedom"
    if error.basis == "interactions":
        return (
            "Too few seeds are repeated, so the settings' interactions serve as the error "
            f"(standard deviation {sd}). This overestimates it if they are real and does not cover "
            "other seeds."
        )
    return f"The error is the pooled variation of the effects over seeds (standard deviation {sd})."


def _interactions(sweep: Sweep) -> list[Table]:
    found = sweep.design.interactions()
    rows = []
    for one, p in zip(found, holm_bonferroni([one.p for one in found]), strict=True):
        pair = [sweep.factors[factor] for factor in one.factors]
        at = ", ".join(f.words(level) for f, level in zip(pair, one.levels, strict=True))
        test = DASH
        if one.f is not None and one.df is not None:
            test = f"{one.f:.2f} ({one.df[0]}, {one.df[1]})"
        rows.append(
            {
                "settings": " x ".join(factor.name for factor in pair),
                "largest departure": f"{signed(one.departure)} at {at}",
                "F (df)": test,
                "p": p_value(one.p),
                "p (Holm)": p_value(p),
            }
        )
    caption = (
        f"{_head(sweep)}Whether two settings' effects add up: how far a combination is from their "
        "sum, and the F-test of all its departures."
    )
    return tables(rows, texts=2, caption=caption)


def _heatmap(sweep: Sweep, number: int) -> Picture | None:
    """A heatmap of the first two settings, with a panel for each combination of the others."""
    if len(sweep.factors) < 2:
        return None
    rows, columns, *others = sweep.factors
    combined = list(itertools.product(*(range(len(factor.levels)) for factor in others)))
    if len(combined) > PANELS or max(len(rows.levels), len(columns.levels)) > VALUES:
        return None
    shown: dict[Levels, tuple[float, int] | str] = {**sweep.missing}
    for levels, variant in sweep.by_levels.items():
        shown[levels] = (variant.mean("top1"), len(variant.runs))
    if 2 * len(shown) < len(combined) * len(rows.levels) * len(columns.levels):
        return None  # too sparse for a grid
    panels = {}
    for rest in combined:
        named = zip(others, rest, strict=True)
        title = ", ".join(factor.words(level) for factor, level in named)
        panels[title] = {(at[0], at[1]): cell for at, cell in shown.items() if at[2:] == rest}
    values = [(factor.name, factor.values) for factor in (rows, columns)]
    caption = f"{_head(sweep)}Mean top-1 (%) of the last epoch over n seeds."
    figure = figures.heatmaps(panels, *values)
    wide = len(panels) > 1
    return Picture(f"sweep{number}", "Top-1 over settings", figure, caption, wide)


def _over_settings(sweep: Sweep, number: int) -> Picture | None:
    """Top-1 over each setting, if one has so many values that it is a trend."""
    if not any(factor.numbers for factor in sweep.factors):
        return None
    panels = {
        factor.name: (
            factor.values,
            bool(factor.numbers),
            [(levels[place], variant.mean("top1")) for levels, variant in sweep.by_levels.items()],
        )
        for place, factor in enumerate(sweep.factors)
    }
    caption = f"{_head(sweep)}Top-1 (%) of the last epoch over each setting, a point for each run "
    caption += "or, with several seeds, their mean; the best one is filled."
    figure = figures.over_settings(panels)
    title = "Top-1 over each setting"
    return Picture(f"sweep{number}", title, figure, caption, wide=len(panels) > 1)
