"""Factorial designs of runs, balanced or not: main effects, interactions, and the best cell.

A run has a level of each factor (a setting), a seed, and a score. The runs of one seed are a block.
Seeds are the samples: an effect is tested against its variation from seed to seed, pooled over all
factors, which gives (levels - 1)(seeds - 1) degrees of freedom for each factor instead of the one
or two of a test by seed. With a single seed, the highest-order interactions serve as the error, and
`Error.basis` says so.

All p-values and intervals of a family of contrasts come from the distribution of the largest |t|
(Hothorn, Bretz and Westfall, 2008, single step): an interval excludes zero if and only if p is
below 0.05. The set of cells not distinguishable from the best follows Hsu (1981).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
# Draws of the largest |t|: enough to estimate p = 0.05 to 0.001.
DRAWS = 50_000
# Up to this many levels, all pairs are compared; beyond, each level only with the first.
ALL_PAIRS = 6

Array = NDArray[Any]


@dataclass(frozen=True)
class Error:
    """The mean square that effects are tested against, its degrees of freedom, and its source."""

    mean_square: float
    df: int
    basis: str  # "seeds" or "interactions"

    @property
    def sd(self) -> float:
        return self.mean_square**0.5


@dataclass(frozen=True)
class Effect:
    """The score at one level of a factor minus the score at another, over all other factors.

    There is no interval and no p if there is no error estimate or if it is zero.
    """

    factor: int
    levels: tuple[int, int]
    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None


@dataclass(frozen=True)
class Interaction:
    """How far the effects of two factors are from additive: F-test and largest departure."""

    factors: tuple[int, int]
    departure: float
    levels: tuple[int, int]  # where the departure is largest
    f: float | None = None
    df: tuple[int, int] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Cell:
    """A combination of levels: its mean, its number of runs, and how it compares with the best."""

    levels: tuple[int, ...]
    mean: float
    n: int
    is_candidate: bool  # not distinguishable from the best
    low: float | None = None  # only for the best; allows for its having been picked
    high: float | None = None


@dataclass(frozen=True, eq=False)
class Design:
    """Scores of shape (runs,), their seeds, and the level of each factor, (runs, factors).

    A factor in ``trends`` has a number for each run, of shape (runs,), and is modeled as a straight
    line: if each run has a different value, as in a random search, nothing else can be estimated.
    """

    levels: Array
    seeds: Array
    scores: Array
    trends: dict[int, Array] = field(default_factory=dict)

    @cached_property
    def cells(self) -> Array:
        """The index of each run's combination of levels."""
        return numpy.unique(self.levels, axis=0, return_inverse=True)[1].reshape(-1)

    @cached_property
    def seeds_are_blocks(self) -> bool:
        """Whether some seed has runs in several cells, so that seed effects can be removed."""
        return any(len(set(self.cells[self.seeds == seed])) > 1 for seed in set(self.seeds))

    @cached_property
    def takes_seeds_out(self) -> bool:
        """Whether the seed effects are removed from the scores before the cells are ranked.

        In a balanced design, this does not change the ranking. Otherwise, the seeds must differ
        significantly (F-test at 5 %), and the runs must connect all of them. If only the best
        cells were trained again, their luck would be mistaken for an effect of the first seed; and
        if each run of a search has its own seed, the seed effects cannot be estimated.
        """
        if not self.seeds_are_blocks or self.is_balanced:
            return self.seeds_are_blocks
        found = self.explained([self.terms(self.cells)], [self.blocks])
        whole = self.blocks.shape[1] + self.cells.max()
        if found is None or self.residual is None or self.fit(self.saturated)[2] < whole:
            return False
        squares = self.residual.mean_square
        f = found.mean_square / squares if squares > 1e-18 else numpy.inf
        return bool(stats.f.sf(f, found.df, self.residual.df) < 1 - LEVEL)

    @cached_property
    def factors(self) -> range:
        return range(self.levels.shape[1])

    def terms(self, *columns: Array) -> Array:
        """Indicator columns, one for each combination of the columns' values."""
        _, number = numpy.unique(numpy.stack(columns, 1), axis=0, return_inverse=True)
        return numpy.eye(number.max() + 1)[number.reshape(-1)]

    @cached_property
    def blocks(self) -> Array:
        """The term of the seeds if they are blocks, else of the mean alone."""
        constant = numpy.zeros_like(self.seeds)
        return self.terms(self.seeds if self.seeds_are_blocks else constant)

    @cached_property
    def mains(self) -> list[Array]:
        return [
            self.trends[factor][:, None]
            if factor in self.trends
            else self.terms(self.levels[:, factor])
            for factor in self.factors
        ]

    @cached_property
    def pairs(self) -> dict[tuple[int, int], Array]:
        """The terms of each pair of factors that are not trends."""
        whole = [factor for factor in self.factors if factor not in self.trends]
        return {
            (a, b): self.terms(self.levels[:, a], self.levels[:, b])
            for a, b in combinations(whole, 2)
        }

    def fit(self, terms: list[Array]) -> tuple[Array, Array, int]:
        """Fit by least squares; return the coefficients, the residuals and the model's rank."""
        matrix = numpy.hstack(terms)
        solution, _, rank, _ = numpy.linalg.lstsq(matrix, self.scores, rcond=1e-9)
        return solution, self.scores - matrix @ solution, int(rank)

    def explained(self, base: list[Array], more: list[Array]) -> Error | None:
        """The mean square that ``more`` explains beyond ``base``; None if it adds no rank."""
        (_, before, rank), (_, after, full) = self.fit(base), self.fit([*base, *more])
        squares, df = float((before**2).sum()) - float((after**2).sum()), full - rank
        return Error(max(0.0, squares) / df, df, "seeds") if df else None

    def left_by(self, terms: list[Array], basis: str) -> Error | None:
        """The residual mean square of the terms; None if no degrees of freedom are left."""
        _, left, rank = self.fit(terms)
        df = len(self.scores) - rank
        return Error(float((left**2).sum()) / df, df, basis) if df else None

    @cached_property
    def by_seed(self) -> list[Array]:
        """The terms of the seed x factor interactions."""
        seeds = self.terms(self.seeds)
        return [
            (seeds[:, :, None] * term[:, None, :]).reshape(len(term), -1) for term in self.mains
        ]

    @cached_property
    def saturated(self) -> list[Array]:
        """A mean for each cell and for each block."""
        return [self.blocks, self.terms(self.cells)]

    @cached_property
    def residual(self) -> Error | None:
        """The error within the cells, and within blocks if there are any."""
        return self.left_by(self.saturated, "seeds")

    @cached_property
    def error(self) -> Error | None:
        """The error of the main effects."""
        if self.seeds_are_blocks:
            found = self.explained(self.saturated, self.by_seed)  # None with a single seed
        else:
            found = self.residual
        return found or self._from_interactions([*self.mains, *self.pairs.values()], self.mains)

    @cached_property
    def interaction_error(self) -> Error | None:
        """The error of the two-factor interactions."""
        if self.seeds_are_blocks and len(set(self.seeds)) > 1:
            more = [
                self.terms(self.seeds, self.levels[:, a], self.levels[:, b]) for a, b in self.pairs
            ]
            return self.explained([*self.saturated, *self.by_seed], more)
        return self.residual or self._from_interactions([*self.mains, *self.pairs.values()])

    def _from_interactions(self, *models: list[Array]) -> Error | None:
        """The residual error of the first of the ``models`` that is not saturated."""
        if len(self.factors) == 1:
            return None
        left = (self.left_by([self.blocks, *model], "interactions") for model in models)
        return next(filter(None, left), None)

    # ---- Effects --------------------------------------------------------------------------------

    def effects(self) -> list[Effect]:
        """The differences between levels, as one family over all factors.

        Fitted with additive factors and seeds; contrasts that cannot be identified are left out.
        """
        matrix = numpy.hstack([self.blocks, *self.mains])
        inverse = numpy.linalg.pinv(matrix.T @ matrix, rcond=1e-9)
        solution = inverse @ matrix.T @ self.scores
        seen = inverse @ matrix.T @ matrix
        first, found = self.blocks.shape[1], []
        for factor, term in zip(self.factors, self.mains, strict=True):
            for levels, weights in self._contrasts(factor):
                contrast = numpy.zeros(matrix.shape[1])
                contrast[first : first + term.shape[1]] = weights
                if numpy.allclose(contrast @ seen, contrast, atol=1e-6):
                    found.append((factor, levels, contrast))
            first += term.shape[1]
        if not found:
            return []
        family = numpy.stack([contrast for *_, contrast in found])
        means = family @ solution
        bounds = simultaneous(means, family @ inverse @ family.T, self.error)
        return [
            Effect(factor, levels, float(mean), *bound)
            for (factor, levels, _), mean, bound in zip(found, means, bounds, strict=True)
        ]

    def _contrasts(self, factor: int) -> Iterator[tuple[tuple[int, int], Array]]:
        """Yield pairs of a factor's levels and the weights of its columns in their difference.

        For a trend, the pair is the highest and the lowest level.
        """
        levels = [int(level) for level in numpy.unique(self.levels[:, factor])]
        if factor in self.trends:
            trend, of_run = self.trends[factor], self.levels[:, factor]
            ends = int(of_run[trend.argmax()]), int(of_run[trend.argmin()])
            yield ends, numpy.array([numpy.ptp(trend)])
            return
        unit = numpy.eye(len(levels))
        for low, high in combinations(range(len(levels)), 2):
            if not low or len(levels) <= ALL_PAIRS:
                yield (levels[high], levels[low]), unit[high] - unit[low]

    def interactions(self) -> list[Interaction]:
        """Test each pair of factors against the model with all the other pairs."""
        _, left, _ = self.fit([self.blocks, *self.mains])
        error = self.interaction_error
        found = []
        for (a, b), term in self.pairs.items():
            others = [one for pair, one in self.pairs.items() if pair != (a, b)]
            explained = self.explained([self.blocks, *self.mains, *others], [term])
            if explained is None:
                continue
            departures = (term.T @ left) / term.sum(0)
            most = int(numpy.abs(departures).argmax())
            at = self.levels[int(term[:, most].argmax())]
            one = Interaction((a, b), float(departures[most]), (int(at[a]), int(at[b])))
            if error is not None and error.mean_square > 1e-18:
                f, df = explained.mean_square / error.mean_square, (explained.df, error.df)
                one = replace(one, f=f, df=df, p=float(stats.f.sf(f, *df)))
            found.append(one)
        return found

    # ---- The best -------------------------------------------------------------------------------

    def ranked(self) -> list[Cell]:
        """All cells by descending mean, the first with an interval; see `takes_seeds_out`.

        The interval is for the accuracy over seeds. The upper end is Student's; the lower end also
        allows for this cell having been picked as the highest. With one seed or without an error
        there is no interval; without an error, every cell is a candidate.
        """
        counts = numpy.bincount(self.cells)
        means = numpy.bincount(self.cells, self._without_seeds) / counts
        order = numpy.argsort(-means, kind="stable")
        best = order[0]
        within = self.left_by(self._of_cells, "seeds") or self.error
        is_candidate, low, high = numpy.ones(len(counts), bool), None, None
        if len(counts) > 1 and within is not None and within.mean_square > 1e-18:
            spread = numpy.sqrt(within.mean_square * (1 / counts + 1 / counts[best]))
            reach = self._dunnett(counts, best, within.df)
            is_candidate = (means[best] - means) / spread <= reach
            if within.basis == "seeds":
                low, high = self._interval(means, counts, best, within)
        at = numpy.unique(self.levels, axis=0).tolist()
        cells = [
            Cell(tuple(at[cell]), float(means[cell]), int(counts[cell]), bool(is_candidate[cell]))
            for cell in order
        ]
        return [replace(cells[0], low=low, high=high), *cells[1:]]

    @cached_property
    def is_balanced(self) -> bool:
        """Whether every cell has a run of every seed."""
        return len(self.scores) == (self.cells.max() + 1) * len(set(self.seeds))

    @property
    def _of_cells(self) -> list[Array]:
        """The terms for ranking the cells."""
        return self.saturated if self.takes_seeds_out else [self.terms(self.cells)]

    @cached_property
    def _without_seeds(self) -> Array:
        """The scores without the seed effects, because not every cell may have every seed."""
        if not self.takes_seeds_out:
            return self.scores
        solution, _, _ = self.fit(self.saturated)
        of_seed = self.blocks @ solution[: self.blocks.shape[1]]
        return self.scores - of_seed + of_seed.mean()

    def _dunnett(self, counts: Array, best: int, df: float) -> float:
        """Dunnett's critical value: the `LEVEL` quantile of the largest t of cells minus best."""
        normal, scale = _draws(len(counts), df)
        z = normal / numpy.sqrt(counts)
        others = numpy.arange(len(counts)) != best
        spread = numpy.sqrt(1 / counts + 1 / counts[best])[others]
        largest = ((z[:, others] - z[:, [best]]) / spread).max(axis=1) / scale
        return float(numpy.quantile(largest, LEVEL))

    def _interval(
        self, means: Array, counts: Array, best: int, within: Error
    ) -> tuple[float, float]:
        """The interval of the ``best`` cell's accuracy over seeds; all cells share seed effects."""
        variance, df = within.mean_square, float(within.df)
        of_seed = self.explained([self.terms(self.cells)], self._of_cells)
        if of_seed is not None:
            share = 1 / len(means)
            parts = (share * of_seed.mean_square, (1 - share) * within.mean_square)
            variance = sum(parts)
            # Satterthwaite's degrees of freedom for the sum of two mean squares.
            df = variance**2 / (parts[0] ** 2 / of_seed.df + parts[1] ** 2 / within.df)
        error = float(numpy.sqrt(variance / counts[best]))
        normal, scale = _draws(len(means), df)
        picked = float(numpy.quantile(normal.max(axis=1) / scale, LEVEL))
        mean = float(means[best])
        high = mean + float(stats.t.ppf((1 + LEVEL) / 2, df)) * error
        return mean - picked * error, high


def simultaneous(
    means: Array, covariance: Array, error: Error | None
) -> list[tuple[float | None, float | None, float | None]]:
    """(low, high, p) of each mean, simultaneous at `LEVEL`; ``covariance`` is for unit variance."""
    if error is None or error.mean_square < 1e-18:
        return [(None, None, None)] * len(means)
    unit = numpy.sqrt(numpy.diag(covariance))
    spread = unit * numpy.sqrt(error.mean_square)
    t = numpy.abs(means) / spread
    if len(means) == 1:
        reach, p = stats.t.ppf((1 + LEVEL) / 2, error.df), 2 * stats.t.sf(t, error.df)
    else:
        values, vectors = numpy.linalg.eigh(covariance / numpy.outer(unit, unit))
        kept = values > 1e-9
        root = vectors[:, kept] * numpy.sqrt(values[kept])
        normal, scale = _draws(int(kept.sum()), error.df)
        largest = numpy.sort(numpy.abs(normal @ root.T).max(axis=1) / scale)
        reach = numpy.quantile(largest, LEVEL)
        p = (1 + len(largest) - numpy.searchsorted(largest, t)) / (1 + len(largest))
    return [
        (float(mean - reach * sd), float(mean + reach * sd), float(at))
        for mean, sd, at in zip(means, spread, p, strict=True)
    ]


def _draws(columns: int, df: float) -> tuple[Array, Array]:
    """Draw normals (draws, columns) and ratios of estimated to true deviation with a fixed seed."""
    generator = numpy.random.default_rng(0)
    draws = min(DRAWS, max(5_000, 5_000_000 // columns))
    scale = numpy.sqrt(generator.chisquare(df, draws) / df)
    return generator.standard_normal((draws, columns)), scale
