"""What each of attention's settings does: by seed, averaged over the others, corrected."""

import random
from itertools import product

import pytest
from scipy import stats

from reporting import dashboard, page
from reporting.analysis import Analysis
from reporting.differences import sweep_section
from reporting.paired import holm_bonferroni
from reporting.sweeps import effects

from folders import analysis_of, make_run, variants_of

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


def train(root, top1, seed, **settings):
    words = ",".join(f"{key}={value}" for key, value in [*settings.items(), ("seed", seed)])
    return make_run(root / words, top1, seed, "aa", **settings)


def test_effects_of_a_grid_against_loops(tmp_path):
    """dk, dv and Nh with holes: a seed's difference is the mean of its pairs, and no other's."""
    draw = random.Random(3)
    scores = {}
    for dk, dv, heads, seed in product((8, 24, 120), (4, 12), (2, 4), range(3)):
        if (dk, dv, heads) == (24, 12, 4) or ((dk, seed) == (120, 1) and heads == 2):
            continue  # as if not finished
        scores[dk, dv, heads, seed] = top1 = 60 + draw.gauss(dk / 50 + dv / 40, 1.0)
        settings = {"attention__dk": dk, "attention__dv": dv, "attention__Nh": heads}
        train(tmp_path, top1, seed, **settings)
    (found,) = effects(variants_of(tmp_path))
    names = [(e.setting.removeprefix("attention."), *e.values) for e in found]
    assert names == [
        ("dk", "24", "8"),
        ("dk", "120", "8"),
        ("dk", "120", "24"),
        ("dv", "12", "4"),
        ("Nh", "4", "2"),
    ]
    for effect, (name, ours, theirs) in zip(found, names, strict=True):
        place = ("dk", "dv", "Nh").index(name)
        for seed in range(3):
            pairs = []
            for key, score in scores.items():
                if key[3] == seed and key[place] == int(ours):
                    other = (*key[:place], int(theirs), *key[place + 1 :])
                    if other in scores:
                        pairs.append(score - scores[other])
            assert effect.top1.by_seed[seed] == pytest.approx(sum(pairs) / len(pairs))
        differences = list(effect.top1.by_seed.values())
        test = stats.ttest_1samp(differences, 0)
        assert effect.top1.p == pytest.approx(test.pvalue)
        assert effect.top1.low == pytest.approx(test.confidence_interval(0.95).low)
    assert [effect.combinations for effect in found] == [3, 4, 3, 5, 5]
    (table,) = sweep_section(analysis_of(tmp_path)).tables
    expected = holm_bonferroni([effect.top1.p for effect in found])
    assert [float(row[7]) for row in table.rows] == pytest.approx(expected, rel=0.1)
    assert "the 5 rows" in table.caption


def test_positions_are_compared_with_none(tmp_path):
    """A setting of words: none is the baseline of every other."""
    for number, position in enumerate(("relative", "none", "coord")):
        for seed in (0, 1):
            top1 = 70.0 + number - seed * number / 4
            train(tmp_path, top1, seed, attention__position=position)
    section = sweep_section(analysis_of(tmp_path))
    (table,) = section.tables
    assert [row[:5] for row in table.rows] == [
        ["position", f"coord {MINUS} none", "1", "2", "+0.88"],
        ["position", f"relative {MINUS} none", "1", "2", f"{MINUS}0.88"],
        ["position", f"relative {MINUS} coord", "1", "2", f"{MINUS}1.75"],
    ]
    assert table.rows[1][8] == f"0: {MINUS}1.00, 1: {MINUS}0.75"
    assert section.pictures == []  # a size alone is no heatmap


def test_two_values_are_one_test(tmp_path):
    for stages in ([2, 3], [3]):
        train(tmp_path, 70.0 + len(stages), 0, attention__stages=stages)
    (table,) = sweep_section(analysis_of(tmp_path)).tables
    assert table.rows == [
        ["stages", f"[3] {MINUS} [2, 3]", "1", "1", f"{MINUS}1.00", DASH, DASH, DASH, "0: "
         f"{MINUS}1.00"]
    ]  # fmt: skip
    assert "corrected" not in table.caption


def test_what_differs_in_two_settings_or_in_the_seed_is_no_pair(tmp_path):
    train(tmp_path, 70.0, 0, attention__dk=8, attention__dv=4)
    train(tmp_path, 71.0, 0, attention__dk=16, attention__dv=8)
    train(tmp_path, 72.0, 1, attention__dk=16, attention__dv=4)
    assert effects(variants_of(tmp_path)) == []


def test_recipes_and_networks_are_not_mixed(tmp_path):
    for epochs, dk in product((3, 4), (8, 16)):
        train(tmp_path, 60.0 + epochs + epochs * dk / 16, 0, attention__dk=dk, epochs=epochs)
    for dk in (8, 16):
        run = {"attention__dk": dk, "model__name": "wrn28_10"}
        train(tmp_path, 80.0 + dk / 16, 0, **run)
    make_run(tmp_path / "se", 75.0, 0, "se")
    tables = sweep_section(analysis_of(tmp_path)).tables
    assert sorted((t.caption.partition(":")[0], t.rows[0][4]) for t in tables) == [
        ("wrn16_4, epochs=3", "+1.50"),
        ("wrn16_4, epochs=4", "+2.00"),
        ("wrn28_10, epochs=3", "+0.50"),
    ]
    assert all(len(table.rows) == 1 for table in tables)


def test_without_a_second_variant_of_attention_there_is_no_section(tmp_path):
    train(tmp_path, 70.0, 0)
    train(tmp_path, 70.5, 1)
    make_run(tmp_path / "plain", 69.0, 0)
    assert sweep_section(analysis_of(tmp_path)) is None


def test_the_dashboard_has_the_same_as_numbers(tmp_path):
    for dk, seed in product((8, 16), range(3)):
        train(tmp_path, 70.0 + dk / 8 + seed * dk / 80, seed, attention__dk=dk)
    (row,) = dashboard._effects(analysis_of(tmp_path))
    seen = dict(zip(dashboard.SETTINGS, row, strict=True))
    words = [seen[key] for key in ("recipe", "setting", "value", "baseline", "combinations", "n")]
    assert words == ["", "dk", "16", "8", 1, 3]
    test = stats.ttest_1samp([1.0, 1.1, 1.2], 0)
    low, high = test.confidence_interval(0.95)
    numbers = [seen[key] for key in ("difference", "95 % low", "95 % high", "p", "p (Holm)")]
    assert numbers == pytest.approx([1.1, low, high, test.pvalue, test.pvalue])


def test_the_page_begins_with_how_many_differ(tmp_path):
    draw = random.Random(2)
    for dk, dv, seed in product((8, 16), (4, 8), range(3)):
        top1 = 70.0 + (3.0 if dk == 16 else 0.0) + draw.gauss(0, 0.1)
        train(tmp_path, top1, seed, attention__dk=dk, attention__dv=dv)
    analysis = analysis_of(tmp_path)
    card = page.sweep_card(analysis)
    ((dk, _),) = effects(variants_of(tmp_path))
    assert (card.number, card.unit) == (
        "1 of 2",
        "differences between two values is significant",
    )
    assert card.verdict == f"It is dk 16 vs. 8, +{dk.top1.mean:.2f} percentage points."
    assert card.details[1] == "n = 3 seeds"
    # Without a plain network there is no other answer, and the page says so first.
    cards = page.contents(analysis)["cards"]
    assert [one.title for one in cards] == ["No comparison", card.title]


def test_what_is_not_significant_and_what_cannot_be_tested_is_said(tmp_path):
    for dk, top1 in ((8, 70.0), (16, 70.5)):
        train(tmp_path, top1, 0, attention__dk=dk)
    card = page.sweep_card(analysis_of(tmp_path))
    assert (card.number, card.unit) == (
        "0 of 1",
        "differences between two values are significant",
    )
    assert card.verdict == (
        "Without several seeds each may be chance; the largest is dk 16 vs. 8, +0.50 percentage "
        "points."
    )
    for dk, top1 in ((8, 71.0), (16, 70.9)):
        train(tmp_path, top1, 1, attention__dk=dk)
    card = page.sweep_card(analysis_of(tmp_path))
    assert card.verdict.startswith("None is significant; the largest is dk 16 vs. 8, +0.20")
    make_run(tmp_path / "plain", 69.0, 0)
    plain = [v for v in variants_of(tmp_path) if v.attention == "none"]
    assert page.sweep_card(Analysis("cifar100 test", plain, [])) is None
