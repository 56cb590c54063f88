"""Power and coverage of the report's analysis of sweeps, on synthetic grids whose truth is known.

    python -m benchmarks.sweep_power [--repeats 200]

Grids of dk, dv and Nh with three values each, true effects of 0.5 to 2 points between the lowest
and the highest, and noise of 0.4 points: balanced with two seeds, with 10 % of the runs missing,
with effects that differ by seed, with an interaction of dk and dv, with one seed, and 300 runs.
For each, `found` is the share of true effects above LARGE whose p is below 0.05, `coverage` the
share of repeats in which all intervals of the family hold the truth together, `width` their median
width in points, `best` the share of repeats in which the interval of the best setting holds its
true accuracy, and `in set` the share in which the truly best setting is among those that cannot be
told from the best one.
"""

import argparse
import itertools

import numpy

from reporting.factorial import Array, Design

# True effects of the three values of dk, dv and Nh, in points.
TRUE = ((0.0, 1.0, 2.0), (0.0, 0.6, 1.2), (0.0, 0.25, 0.5))
NOISE = 0.4
LARGE = 0.4
GRIDS: dict[str, dict[str, float]] = {
    "balanced, 2 seeds": {},
    "balanced, 3 seeds": {"seeds": 3},
    "10 % missing, 2 seeds": {"missing": 0.1},
    "10 % missing, 3 seeds": {"missing": 0.1, "seeds": 3},
    "effects differ by seed (sd 0.3), 3 seeds": {"by_seed": 0.3, "seeds": 3},
    "dk and dv interact, 2 seeds": {"interaction": 0.8},
    "all seeds shifted (sd 1), 3 seeds": {"shift": 1.0, "seeds": 3},
    "30 % missing, seeds shifted (sd 1), 2 seeds": {"missing": 0.3, "shift": 1.0},
    "one seed": {"seeds": 1},
    "nothing differs, 2 seeds": {"effect": 0.0},
    "300 runs: 100 cells, 3 seeds": {"seeds": 3, "values": 10},
}


def truth(levels: Array, effect: float, interaction: float, values: int) -> Array:
    """Return the true accuracy of each combination of levels."""
    at = [numpy.interp(numpy.linspace(0, 2, values), range(3), t) * effect for t in TRUE[:2]]
    at.append(numpy.array(TRUE[2]) * effect if values == 3 else numpy.zeros(1))
    top1 = 60 + sum(one[levels[:, factor]] for factor, one in enumerate(at))
    center = (values - 1) / 2
    return top1 + interaction * (levels[:, 0] - center) * (levels[:, 1] - center) / center**2


def simulate(
    draw: numpy.random.Generator,
    seeds: int = 2,
    missing: float = 0.0,
    by_seed: float = 0.0,
    interaction: float = 0.0,
    shift: float = 0.0,
    effect: float = 1.0,
    values: int = 3,
) -> tuple[Design, Array]:
    """Return a synthetic grid, and the true accuracy of each of its runs."""
    heads = 3 if values == 3 else 1
    grid = list(itertools.product(range(values), range(values), range(heads)))
    levels = numpy.array([cell for cell in grid for _ in range(seeds)])
    seed = numpy.array(list(range(seeds)) * len(grid))
    top1 = truth(levels, effect, interaction, values)
    scores = top1 + draw.normal(0, NOISE, len(top1)) + draw.normal(0, shift, seeds)[seed]
    for factor in range(3):
        scores = scores + draw.normal(0, by_seed, (seeds, values))[seed, levels[:, factor]]
    kept = draw.random(len(top1)) >= missing
    return Design(levels[kept], seed[kept], scores[kept]), top1[kept]


def measure(settings: dict[str, float], repeats: int) -> dict[str, str]:
    """Return the row of a grid."""
    draw = numpy.random.default_rng(1)
    found, covers, widths, best, in_set = [], [], [], [], []
    for _ in range(repeats):
        design, top1 = simulate(draw, **settings)  # type: ignore[arg-type]
        effects, holds = design.effects(), []
        exact = Design(design.levels, design.seeds, top1).effects()
        for effect, true in zip(effects, exact, strict=True):
            if effect.low is not None and effect.high is not None:
                holds.append(effect.low <= true.mean <= effect.high)
                widths.append(effect.high - effect.low)
            if abs(true.mean) > LARGE:
                found.append(effect.p is not None and effect.p < 0.05)
        covers.append(all(holds))
        cells = design.ranked()
        accuracy = {tuple(row): value for row, value in zip(design.levels, top1, strict=True)}
        first = cells[0]
        if first.low is not None and first.high is not None:
            best.append(first.low <= accuracy[first.levels] <= first.high)
        highest = max(accuracy.values())
        in_set.append(any(c.is_candidate for c in cells if accuracy[c.levels] > highest - 1e-9))

    def share(values: list[bool]) -> str:
        return f"{numpy.mean(values):.2f}" if values else "-"

    return {
        "found": share(found),
        "coverage": share(covers),
        "width": f"{numpy.median(widths):.2f}" if widths else "-",
        "best": share(best),
        "in set": share(in_set),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=200)
    repeats = parser.parse_args().repeats
    for number, (name, settings) in enumerate(GRIDS.items()):
        row = measure(settings, repeats)
        if not number:
            print(f"{'grid':42}", *(f"{heading:>10}" for heading in row))
        print(f"{name:42}", *(f"{value:>10}" for value in row.values()), flush=True)


if __name__ == "__main__":
    main()
