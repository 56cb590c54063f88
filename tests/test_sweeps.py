"""Sweeps of attention settings: the statistics against slow or published ones, and the page."""

import json
import random
from itertools import combinations, product

import numpy
import pytest
from scipy import stats

from benchmarks.sweep_power import GRIDS, measure
from reporting import dashboard, figures, page
from reporting.analysis import analyze
from reporting.factorial import Design
from reporting.runs import Excluded
from reporting.sweep_section import section
from reporting.sweeps import Factor, find_sweeps
from reporting.text import MINUS, rounded
from training import run_folder

from folders import analysis_of, make_run, variants_of
from helpers import thorough


def design(runs):
    """Return the `Design` of runs {(levels, seed): score}."""
    return Design(
        numpy.array([levels for levels, _ in runs]),
        numpy.array([seed for _, seed in runs]),
        numpy.array(list(runs.values())),
    )


def grid(shape, seeds, draw, slopes=(1.0, 0.5, 0.2), missing=0.0):
    runs = {}
    for levels in product(*map(range, shape)):
        for seed in range(seeds):
            if draw.random() >= missing:
                top1 = 60 + sum(s * level for s, level in zip(slopes, levels, strict=False))
                runs[levels, seed] = top1 + draw.gauss(0, 0.4) + seed
    return runs


def apart(groups):
    """Return runs of one factor without common seeds, given the scores of each level."""
    return {
        ((level,), 10 * level + k): score
        for level, group in enumerate(groups)
        for k, score in enumerate(group)
    }


def left_by(runs, terms, steps=4000):
    """Residual sum of squares of additive terms, fitted one after the other until convergence.

    A term is a function from (levels, seed) to the group whose mean is removed.
    """
    left = dict(runs)
    for _ in range(steps):
        before = sum(value**2 for value in left.values())
        for term in terms:
            groups = {}
            for run in left:
                groups.setdefault(term(*run), []).append(run)
            for members in groups.values():
                mean = sum(left[run] for run in members) / len(members)
                for run in members:
                    left[run] -= mean
        after = sum(value**2 for value in left.values())
        if before - after < 1e-13 * before:
            break
    return after


def seed_by(factor):
    return lambda levels, seed: (seed, levels[factor])


@pytest.mark.parametrize("shape", [(3, 2, 5), (2, 3), (5,)])
def test_the_effects_of_a_balanced_grid_are_differences_of_means(shape):
    runs = grid(shape, 3, random.Random(3))
    found = design(runs)

    def mean(factor, level):
        return numpy.mean([score for (at, _), score in runs.items() if at[factor] == level])

    for effect in found.effects():
        high, low = (mean(effect.factor, level) for level in effect.levels)
        assert effect.mean == pytest.approx(high - low)
    pairs = sum(levels * (levels - 1) // 2 for levels in shape)
    assert len(found.effects()) == pairs
    assert (found.error.df, found.error.basis) == (sum(2 * (n - 1) for n in shape), "seeds")


@pytest.mark.parametrize(("number", "missing"), [(0, 0.0), (0, 0.15), (1, 0.15), (2, 0.15)])
def test_the_error_is_that_of_fitting_by_hand(number, missing):
    runs = grid((3, 3, 2), 3, random.Random(number), missing=missing)
    found = design(runs)
    cells = [lambda levels, seed: levels, lambda levels, seed: seed]
    by_seed = [seed_by(factor) for factor in range(3)]
    explained = left_by(runs, cells) - left_by(runs, [*cells, *by_seed])
    assert found.error.mean_square * found.error.df == pytest.approx(explained, rel=1e-5)
    interactions = found.interactions()
    assert [one.factors for one in interactions] == [(0, 1), (0, 2), (1, 2)]
    for one in interactions:
        a, b = one.factors
        pairs = {
            pair: lambda levels, seed, pair=pair: tuple(levels[f] for f in pair)
            for pair in combinations(range(3), 2)
        }
        others = [cells[1], *(term for pair, term in pairs.items() if pair != (a, b))]
        squares = left_by(runs, others) - left_by(runs, [*others, pairs[a, b]])
        f = squares / one.df[0] / found.interaction_error.mean_square
        assert one.f == pytest.approx(f, rel=1e-4)
        assert one.p == pytest.approx(stats.f.sf(f, *one.df), rel=1e-3)


def test_two_values_of_one_setting_are_the_paired_t_test():
    draw = random.Random(5)
    runs = {((level,), seed): draw.gauss(level, 1) for level in (0, 1) for seed in range(5)}
    (effect,) = design(runs).effects()
    high, low = ([runs[(level,), seed] for seed in range(5)] for level in (1, 0))
    test = stats.ttest_rel(high, low)
    bounds = test.confidence_interval(0.95)
    assert (effect.mean, effect.low, effect.high, effect.p) == pytest.approx(
        (numpy.mean(high) - numpy.mean(low), bounds.low, bounds.high, test.pvalue)
    )


def test_all_pairs_of_one_setting_are_tukeys():
    """If each run has its own seed, this is an ordinary analysis of variance."""
    draw = random.Random(2)
    groups = [[60 + 0.4 * level + draw.gauss(0, 0.5) for _ in range(4)] for level in range(4)]
    expected = stats.tukey_hsd(*groups)
    bounds = expected.confidence_interval(0.95)
    effects = design(apart(groups)).effects()
    assert len(effects) == 6
    for effect in effects:
        at = effect.levels
        assert effect.p == pytest.approx(expected.pvalue[at], abs=0.01)
        assert effect.low == pytest.approx(bounds.low[at], abs=0.03)
        assert effect.high == pytest.approx(bounds.high[at], abs=0.03)


def test_what_cannot_be_told_from_the_best_is_dunnetts():
    draw = random.Random(7)
    undecided = 0
    for _ in range(20):
        groups = [[60 + 0.3 * level + draw.gauss(0, 0.4) for _ in range(4)] for level in range(5)]
        first, *others = design(apart(groups)).ranked()
        best = groups[first.levels[0]]
        test = stats.dunnett(
            *(groups[cell.levels[0]] for cell in others), control=best, alternative="less"
        )
        for cell, p in zip(others, test.pvalue, strict=True):
            if abs(p - 0.05) > 0.01:
                assert cell.is_candidate == (p > 0.05)
                undecided += p > 0.05
    assert 10 < undecided < 70


@pytest.mark.parametrize(
    "name",
    [
        thorough("balanced, 2 seeds"),
        "10 % missing, 3 seeds",
        thorough("one seed"),
    ],
)
def test_made_up_grids_are_answered_as_often_as_said(name):
    """Run 60 repeats of benchmarks/sweep_power.py, which are deterministic."""
    row = measure(GRIDS[name], 60)
    assert float(row["found"]) > (0.6 if name == "one seed" else 0.75) > 0.5
    assert float(row["coverage"]) >= 0.88
    assert float(row["in set"]) >= 0.93


def test_a_seed_that_some_cells_lack_rules_none_of_them_out():
    """In an unfinished sweep, seed 1 (a point higher) is done in only five of nine cells."""
    draw = numpy.random.default_rng(0)
    cells = [(a, b) for a in range(3) for b in range(3)]
    runs = [(cell, seed) for seed in (0, 1) for cell in (cells if seed == 0 else cells[:5])]
    levels, seeds = numpy.array([c for c, _ in runs]), numpy.array([s for _, s in runs])
    found = Design(levels, seeds, 60 + seeds + draw.normal(0, 0.1, len(runs)))
    assert not found.is_balanced
    assert all(cell.is_candidate for cell in found.ranked())
    best = found.ranked()[0]
    assert best.mean == pytest.approx(60 + 5 / 14, abs=0.5)


def test_seeds_that_only_some_cells_have_are_not_taken_out():
    """A search where each cell has its own seed, and a winner that was trained again."""
    drawn = {((cell,), min(2, cell // 5)): 60 + 0.1 * (7 * cell % 11) for cell in range(13)}
    assert [cell.mean for cell in design(drawn).ranked()] == sorted(drawn.values(), reverse=True)
    scores = {((cell,), 0): 60 + 0.1 * cell for cell in range(6)}
    again = {((5,), seed): score for seed, score in ((1, 59.9), (2, 60.1))}
    ranking = design(scores | again).ranked()
    means = {cell.levels: cell.mean for cell in ranking}
    assert means[5,] == pytest.approx((60.5 + 59.9 + 60.1) / 3)
    assert ranking[0].levels == (4,)
    assert all(cell.is_candidate for cell in ranking if cell.mean > 60.1)


def test_seeds_that_are_seen_to_differ_are_taken_out_of_a_grid_that_is_under_way():
    draw = random.Random(1)
    scores = {
        ((cell,), seed): 60 + 0.5 * cell + 3 * (seed == 2) + draw.gauss(0, 0.1)
        for seed in range(3)
        for cell in range(4 if seed == 2 else 9)
    }
    assert [cell.levels for cell in design(scores).ranked()] == [(n,) for n in range(8, -1, -1)]


def test_a_trend_is_between_the_values_where_its_line_ends():
    """Levels are ordered by their effective value, such as a dk raised to a minimum for Nh."""
    levels = numpy.arange(8)[:, None]
    line = numpy.array([0.1, 0.0, 0.3, 0.2, 0.6, 1.0, 0.9, 0.8])
    (effect,) = Design(levels, numpy.zeros(8, int), 60 + 2 * line, {0: line}).effects()
    assert (effect.levels, effect.mean) == ((5, 1), pytest.approx(2))


def test_channels_and_fractions_are_on_no_common_line():
    values = ["8", "16", "32", "48", "0.25", "0.5", "1.0"]
    assert Factor(("attention.dk",), [(value,) for value in values]).numbers == []
    assert len(Factor(("attention.dk",), [(f"{n}",) for n in range(7)]).numbers) == 7
    mixed = ["1", "0.5", "0.1", "0.2", "0.3", "0.4", "2"]  # in other settings, 1 is just 1.0
    assert len(Factor(("optim.lr",), [(value,) for value in mixed]).numbers) == 7


def test_of_equally_large_sweeps_the_best_comes_first(tmp_path):
    for lr, top1 in ((0.1, 60), (0.2, 70)):
        for number, Nh in enumerate((2, 4, 8)):
            folder = tmp_path / f"{lr}-{Nh}"
            make_run(folder, top1 + number, 0, "aa", attention__Nh=Nh, optim__lr=lr)
    assert analyze([tmp_path]).main_sweep.recipe == "wrn16_4, lr=0.2"


def test_an_interval_excludes_zero_where_p_is_small_and_nowhere_else():
    small = []
    for number in range(40):
        draw = random.Random(number)
        for effect in design(grid((3, 2, 2), 3, draw, (0.3, 0.2, 0.1), 0.1)).effects():
            small.append(effect.p < 0.05)
            assert small[-1] == (effect.low > 0 or effect.high < 0)
    assert 20 < sum(small) < len(small) - 20


def test_what_the_runs_cannot_tell_is_left_out():
    assert design({((0, 0), 0): 70.0, ((1, 1), 0): 71.0, ((1, 0), 1): 72.0}).effects() == []
    alike = design({((level,), seed): 70.0 + level for level in (0, 1) for seed in (0, 1)})
    (effect,) = alike.effects()
    assert (effect.mean, effect.low, effect.p) == (pytest.approx(1.0), None, None)
    single = design({((level,), 0): 70.0 + level for level in range(4)})
    assert [effect.p for effect in single.effects()] == [None] * 6
    assert all(cell.is_candidate and cell.low is None for cell in single.ranked())


def test_with_one_seed_the_interactions_stand_for_the_error():
    runs = grid((3, 3), 1, random.Random(4))
    found = design(runs)
    additive = [lambda levels, seed: levels[0], lambda levels, seed: levels[1]]
    assert found.error.basis == "interactions"
    assert found.error.df == 4
    assert found.error.mean_square == pytest.approx(left_by(runs, additive) / 4)
    assert found.interactions()[0].p is None
    assert found.ranked()[0].low is None  # with one seed, the spread over seeds is unknown


def test_a_trend_over_many_values_is_an_ordinary_regression():
    draw = random.Random(6)
    x = [[draw.random() for _ in range(20)] for _ in range(2)]
    scores = [60 + 2 * a - b + draw.gauss(0, 0.3) for a, b in zip(*x, strict=True)]
    levels = numpy.array([[sorted(of).index(v) for v in of] for of in x]).T
    trends = {number: numpy.array(of) for number, of in enumerate(x)}
    found = Design(levels, numpy.zeros(20, int), numpy.array(scores), trends)
    effects = found.effects()
    assert [effect.factor for effect in effects] == [0, 1]
    for effect in effects:
        # Regress residuals on residuals, after removing the other factor from both.
        own, other = x[effect.factor], x[1 - effect.factor]
        a, b = stats.linregress(other, own), stats.linregress(other, scores)
        left = [v - a.intercept - a.slope * o for v, o in zip(own, other, strict=True)]
        of_scores = [v - b.intercept - b.slope * o for v, o in zip(scores, other, strict=True)]
        slope = stats.linregress(left, of_scores).slope
        assert effect.mean == pytest.approx(slope * (max(own) - min(own)))
        assert effect.levels == (19, 0)
    assert (found.error.df, found.error.basis) == (17, "interactions")
    assert found.interactions() == []


# ---- The page -----------------------------------------------------------------------------------


def train(root, top1, seed, **settings):
    words = ",".join(f"{key}={value}" for key, value in [*settings.items(), ("seed", seed)])
    return make_run(root / words, top1, seed, "aa", **settings)


def sweep_of(root, excluded=()):
    (sweep,) = find_sweeps(variants_of(root), list(excluded))
    return sweep


def test_the_page_begins_with_the_best_settings_and_the_largest_effect(tmp_path):
    draw = random.Random(2)
    for dk, dv, seed in product((8, 16), (4, 12), range(3)):
        top1 = 70.0 + (3.0 if dk == 16 else 0.0) + draw.gauss(0, 0.1)
        train(tmp_path, top1, seed, attention__dk=dk, attention__dv=dv)
    make_run(tmp_path / "plain", 69.0, 0)
    analysis = analysis_of(tmp_path)
    shown = page.contents(analysis)
    sweep = sweep_of(tmp_path)
    best, effect, many = shown["cards"]
    assert shown["title"] == "Which dk and dv are best?"
    assert shown["sections"][0].title == "Comparison of settings"
    mean = sweep.ranking[0].mean
    assert (best.title, best.number) == ("Best of 4 settings", f"{mean:.2f} %")
    assert best.verdict == f"{sweep.words(sweep.ranking[0].levels)}."
    assert best.verdict.startswith("dk 16, dv ")
    assert "not distinguishable from it: 1 other (dk 16" in " ".join(best.details)
    assert (effect.verdict, effect.tone) == ("dk 16 is better.", "better")
    assert effect.details[1] == "1 of 2 differences significant"
    assert many.title == "4 augmented variants, each vs. its plain baseline"
    ranking, effects, interactions = shown["sections"][0].tables
    assert [row[0] for row in ranking.rows] == ["1", "2", "3", "4"]
    assert [row[4] for row in ranking.rows] == ["best", "not distinguishable", "lower", "lower"]
    assert effects.rows[0][:2] == ["dk", f"16 {MINUS} 8"]
    assert interactions.rows[0][0] == "dk x dv"
    scores = next(made for made in shown["sections"] if made.title == "Scores")
    top1 = [float(row[2].split()[0]) for row in scores.tables[0].rows]
    assert top1 == sorted(top1, reverse=True)


def test_the_interval_of_the_best_is_one_of_accuracies(tmp_path):
    for dk, seed, top1 in ((8, 0, 3.0), (8, 1, 98.0), (16, 0, 97.0), (16, 1, 1.0)):
        train(tmp_path, top1, seed, attention__dk=dk)
    best = page.contents(analysis_of(tmp_path))["cards"][0]
    assert best.details[0].startswith("95 % interval 0.00 to 100.00 %, ")


def test_a_comparison_of_few_variants_keeps_its_own_beginning(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"plain{seed}", 69.0 + seed, seed)
        for dk in (8, 16):
            train(tmp_path, 70.0 + dk / 8 + seed, seed, attention__dk=dk)
    shown = page.contents(analysis_of(tmp_path))
    assert shown["title"] == "Does attention help?"
    titles = [made.title for made in shown["sections"]]
    assert titles.index("Scores") == 0 < titles.index("Comparison of settings")


def test_the_largest_effect_is_named_first_whether_or_not_it_is_significant(tmp_path):
    for dk, seed in product((8, 16), range(2)):
        for heads in (2, 4):
            top1 = 60.0 + (dk == 16) * (1 + 3 * seed) + (heads == 4) * 0.5
            train(tmp_path, top1, seed, attention__dk=dk, attention__Nh=heads)
    card = page.contents(analysis_of(tmp_path))["cards"][1]
    assert card.number == "+2.50"
    assert card.verdict == "The largest effect, and it may be chance."
    assert card.details[1] == "none of 2 differences significant"
    low, high = card.details[0].removeprefix("95 % interval ").split(",")[0].split(" to ")
    assert low.startswith(MINUS)
    assert high.startswith("+")


def test_positions_are_compared_with_none(tmp_path):
    """For a setting with words as values, none is the baseline of all others."""
    for number, position in enumerate(("relative", "none", "coord")):
        for seed in (0, 1):
            top1 = 70.0 + number - seed * number / 5
            train(tmp_path, top1, seed, attention__position=position)
    _, table = section(analysis_of(tmp_path).sweeps).tables
    assert [row[:3] for row in table.rows] == [
        ["position", f"relative {MINUS} coord", f"{MINUS}1.80"],
        ["position", f"coord {MINUS} none", "+0.90"],
        ["position", f"relative {MINUS} none", f"{MINUS}0.90"],
    ]
    assert section(analysis_of(tmp_path).sweeps).pictures == []  # a heatmap needs two settings


def test_settings_that_differ_together_are_one_factor(tmp_path):
    for ratio in (0.25, 0.5, 1.0):
        train(tmp_path, 70.0 + ratio, 0, attention__dk=ratio, attention__dv=ratio)
    sweep = sweep_of(tmp_path)
    assert [factor.name for factor in sweep.factors] == ["dk, dv"]
    assert sweep.words((2,)) == "dk 1.0, dv 1.0"


def test_recipes_and_networks_are_not_mixed(tmp_path):
    for epochs, dk in product((3, 4), (8, 16)):
        train(tmp_path, 60.0 + epochs + epochs * dk / 16, 0, attention__dk=dk, epochs=epochs)
    for dk in (8, 16):
        run = {"attention__dk": dk, "model__name": "wrn28_10", "facts": {"model": "wrn28_10"}}
        make_run(tmp_path / f"wide{dk}", 80.0 + dk / 16, 0, "aa", **run)
    make_run(tmp_path / "se", 75.0, 0, "se")
    found = find_sweeps(variants_of(tmp_path), [])
    assert sorted((sweep.recipe, round(sweep.effects[0].mean, 2)) for sweep in found) == [
        ("wrn16_4, epochs=3", 1.5),
        ("wrn16_4, epochs=4", 2.0),
        ("wrn28_10, epochs=3", 0.5),
    ]


def test_a_random_search_is_a_sweep_of_all_that_it_draws(tmp_path):
    draw = random.Random(8)
    for number in range(12):
        dk, lr = round(draw.uniform(0.1, 1), 3), round(10 ** draw.uniform(-2, 0), 4)
        train(
            tmp_path, 60 + 3 * dk + draw.gauss(0, 0.1), number % 2, attention__dk=dk, optim__lr=lr
        )
    make_run(tmp_path / "plain", 60.0, 0)
    shown = page.contents(analysis_of(tmp_path))
    assert shown["title"] == "Which dk and lr are best?"
    best, effect, *_ = shown["cards"]
    assert best.title == "Best of 12 settings"
    assert "points of top-1, dk (trend) 0." in effect.unit
    assert "is better." in effect.verdict
    (picture,) = section(analysis_of(tmp_path).sweeps).pictures
    over_dk, over_lr = picture.figure.axes
    assert (over_dk.get_xlabel(), over_dk.get_xscale()) == ("dk", "linear")
    assert (over_lr.get_xlabel(), over_lr.get_xscale()) == ("lr", "log")
    figures.as_png(picture.figure)
    assert all("$" not in tick.get_text() for tick in over_lr.get_xticklabels())
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in over_lr.lines}
    runs = [run for v in variants_of(tmp_path) if v.attention == "aa" for run in v.runs]
    assert points == {(run.settings["optim.lr"], run.last("top1")) for run in runs}
    (best,) = [line for line in over_lr.lines if line.get_markerfacecolor() != "none"]
    assert best.get_ydata()[0] == max(top1 for _, top1 in points)


def test_drawn_numbers_are_rounded_where_they_stay_apart(tmp_path):
    for number, dk in enumerate((0.7179977091277272, 0.99999999, 0.25)):
        train(tmp_path, 70.0 + number, 0, attention__dk=dk)
    assert [v.label for v in variants_of(tmp_path)] == ["AA dk=0.25", "AA dk=0.718", "AA dk=1.0"]
    (sweep,) = find_sweeps(variants_of(tmp_path), [])
    assert [sweep.words(cell.levels) for cell in sweep.ranking] == ["dk 0.25", "dk 1.0", "dk 0.718"]
    alike = ["0.010000001", "0.010000002"]
    assert rounded(alike) == dict(zip(alike, alike, strict=True))
    assert rounded(["1.2345678e-07", "16", "none", "[2.123456, 3]"]) == {
        "1.2345678e-07": "1.235e-07",
        "16": "16",
        "none": "none",
        "[2.123456, 3]": "[2.123456, 3]",
    }


def test_sizes_are_in_the_order_of_what_they_came_to(tmp_path):
    """dk=16 is half of the stage's 32 channels: more than dk=0.25, less than dk=1.0."""
    for dk, channels in ((1.0, 32), (16, 16), (0.25, 8)):
        folder = train(tmp_path, 70.0, 0, attention__dk=dk)
        path = folder / "summary.json"
        layers = f'"layers": [{{"name": "a", "out": 32, "dk": {channels}, "dv": 8}}], "segments"'
        text = path.read_text(encoding="utf-8").replace('"segments"', layers)
        path.write_text(text, encoding="utf-8")
    (factor,) = sweep_of(tmp_path).factors
    assert factor.levels == [("0.25",), ("16",), ("1.0",)]


def test_one_variant_of_attention_is_no_sweep(tmp_path):
    train(tmp_path, 70.0, 0)
    train(tmp_path, 70.5, 1)
    make_run(tmp_path / "plain", 69.0, 0)
    assert find_sweeps(variants_of(tmp_path), []) == []
    assert section([]) is None


def drawn_texts(figure):
    return [text.get_text() for panel in figure.axes for text in panel.texts]


def test_cells_without_a_run_say_why(tmp_path):
    for dk, heads in ((8, 2), (8, 4), (16, 2)):
        train(tmp_path, 70.0 + dk, 0, attention__dk=dk, attention__Nh=heads)
    variants = variants_of(tmp_path)
    settings = {**variants[0].settings, "attention.dk": 16, "attention.Nh": 4}
    lost = Excluded(tmp_path / "lost", "diverged", "nan", settings)
    other = Excluded(tmp_path / "other", "diverged", "nan", settings | {"optim.lr": 9.0})
    made = section(find_sweeps(variants, [other, lost]))
    assert made.notes == ["Without a finished run: dk 16, Nh 4 (diverged)."]
    assert "diverged" in drawn_texts(made.pictures[0].figure)
    assert "no\nrun" in drawn_texts(section(find_sweeps(variants, [other])).pictures[0].figure)


def test_a_refused_cell_is_read_from_its_folder_and_drawn(tmp_path):
    for dk, heads in ((8, 2), (8, 4), (16, 2)):
        train(tmp_path, 70.0 + dk, 0, attention__dk=dk, attention__Nh=heads)
    config = json.loads(next(tmp_path.rglob("summary.json")).read_text())["config"]
    config["attention"] |= {"dk": 16, "Nh": 4}
    for folder, why in ((tmp_path / "lost", "a reason"), (next(tmp_path.glob("*")), "not this")):
        run_folder.write_no_run(folder, "refused", why, config)  # the second has a run
    (found,) = analyze([tmp_path]).excluded
    assert (found.folder, found.kind, found.why) == (tmp_path / "lost", "refused", "a reason")
    (picture,) = section(analyze([tmp_path]).sweeps).pictures
    assert "refused" in drawn_texts(picture.figure)
    (tmp_path / "lost" / "no_run.json").write_text("{")
    (found,) = analyze([tmp_path]).excluded
    assert (found.kind, "no_run.json" in found.why) == ("unreadable", True)


def test_the_dashboard_has_the_same_as_numbers(tmp_path):
    for dk, seed in product((8, 16), range(3)):
        train(tmp_path, 70.0 + dk / 8 + seed * dk / 80, seed, attention__dk=dk)
    sweep = sweep_of(tmp_path)
    (row,) = dashboard._effects(sweep)
    seen = dict(zip(dashboard.SETTINGS, row, strict=True))
    words = [seen[key] for key in ("recipe", "setting", "value", "baseline")]
    assert words == ["", "dk", "16", "8"]
    (effect,) = sweep.effects
    numbers = [seen[key] for key in ("difference", "95 % low", "95 % high", "p")]
    assert numbers == [effect.mean, effect.low, effect.high, effect.p]
    ranking = dashboard._ranking(sweep)
    assert [row[2:4] for row in ranking] == [["dk 16", 3], ["dk 8", 3]]
    assert [row[5] for row in ranking] == [True, False]
