"""The report's differences: among all networks, at equal cost, by class, and their power."""

import json
import random
import statistics

import pytest
from scipy import stats

from reporting import dashboard, differences
from reporting.equal_cost import STEP_TIMES, at_equal_cost
from reporting.paired import holm_bonferroni, minimum_detectable_difference
from reporting.text import MINUS, p_value, signed

from folders import analysis_of, make_run

TOP1 = {"none": [70.0, 71.0, 70.4], "se": [71.5, 71.9, 71.8], "ge": [69.0, 70.5, 69.9]}
TOP1["aa"] = [70.9, 72.2, 71.0]
FLOPS = {"none": 100, "aa": 185, "se": 100, "ge": 100}


@pytest.fixture
def folder(tmp_path):
    """Four networks with three seeds and 10 epochs; all but plain take a quarter longer."""
    for attention, scores in TOP1.items():
        for seed, top1 in enumerate(scores):
            make_run(
                tmp_path / f"attention={attention}" / f"seed={seed}",
                top1,
                seed,
                attention,
                epochs=10,
                facts={"flops": FLOPS[attention]},
            )
    return tmp_path


def table(folder, word):
    """Return the only table of differences whose caption contains ``word``."""
    section = differences.differences_section(analysis_of(folder))
    (one,) = (t for t in section.tables if word in t.caption)
    return one


def from_plain(folder, attention):
    """Return the comparison of this kind of network with plain."""
    (found,) = (c for c in analysis_of(folder).nearest if c.variant.attention == attention)
    return found


def change(folder, attention, seed, **values):
    """Change values in the summary of a run, with "__" for a slash."""
    file = folder / f"attention={attention}" / f"seed={seed}" / "summary.json"
    changed = {key.replace("__", "/"): value for key, value in values.items()}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def test_holm_by_hand():
    assert holm_bonferroni([0.01, 0.04, None, 0.03]) == [pytest.approx(0.03), 0.06, None, 0.06]
    assert holm_bonferroni([0.5, 0.9]) == [1.0, 1.0]
    assert holm_bonferroni([]) == []


@pytest.mark.parametrize(("n", "sd"), [(2, 1.0), (3, 0.35), (5, 0.7)])
def test_the_detectable_difference_is_found_four_times_in_five(n, sd):
    shift = minimum_detectable_difference(n, sd)
    draw = random.Random(0)
    edge = stats.t.ppf(0.975, n - 1)
    found = 0
    for _ in range(4000):
        pairs = [draw.gauss(shift, sd) for _ in range(n)]
        found += abs(statistics.mean(pairs)) > edge * statistics.stdev(pairs) / n**0.5
    assert found / 4000 == pytest.approx(0.8, abs=0.03)


def test_the_other_differences_of_table_1(folder):
    others = analysis_of(folder).among_others
    pairs = [("GE", "plain"), ("SE", "plain"), ("AA", "GE"), ("AA", "SE")]
    assert [c.name for c in others] == [f"{a} {MINUS} {b}" for a, b in pairs]
    differences = list(others.values())
    assert differences[3].by_seed == pytest.approx({0: -0.6, 1: 0.3, 2: -0.8})
    rows = table(folder, "corrected for the 4 of them").rows
    expected = holm_bonferroni([found.p for found in differences])
    assert [float(row[5]) for row in rows] == pytest.approx(expected, rel=0.1)


def test_differences_without_pairs_by_hand(folder):
    make_run(folder / "more", 71.3, 7, "se", epochs=10)  # with a seed that only this network has
    rows = table(folder, "Unpaired").rows
    scores = {**TOP1, "se": [*TOP1["se"], 71.3]}
    squares = sum(statistics.pvariance(of) * len(of) for of in scores.values())
    sd, expected = (squares / 9) ** 0.5, {}  # 13 runs of four networks
    for name in ("ge", "se", "aa"):
        mean = statistics.mean(scores[name]) - statistics.mean(scores["none"])
        scale = sd * (1 / len(scores[name]) + 1 / 3) ** 0.5
        # From a table: the 97.5 % quantile of t with 9 degrees of freedom.
        expected[name.upper()] = (mean, 2.2622 * scale, 2 * stats.t.sf(abs(mean) / scale, 9))
    corrected = holm_bonferroni([p for _, _, p in expected.values()])
    for row, (name, (mean, half, _)), p in zip(rows, expected.items(), corrected, strict=True):
        assert row[:2] == [f"{name} {MINUS} plain", f"{len(scores[name.lower()])} and 3"]
        assert row[2] == f"{signed(mean)} ({signed(mean - half)} to {signed(mean + half)})"
        assert row[3] == p_value(p)
    assert f"({sd:.2f} points, " in table(folder, "Unpaired").caption


def test_without_a_second_seed_there_is_no_deviation(tmp_path):
    for kind in ("none", "aa"):
        make_run(tmp_path / kind, TOP1[kind][0], 0, kind, epochs=10)
    section = differences.differences_section(analysis_of(tmp_path))
    assert not [t for t in section.tables if "Unpaired" in t.caption]


def test_another_recipe_makes_no_family_of_differences(folder):
    make_run(folder / "more", 75.0, 0, "se", epochs=10, optim__lr=0.3)
    assert analysis_of(folder).among_others == {}


def test_the_power_is_told(folder):
    sd = from_plain(folder, "aa").top1.sd
    assert table(folder, "four of five cases").rows[2] == [
        f"AA {MINUS} plain",
        "3",
        f"{sd:.2f}",
        f"{minimum_detectable_difference(3, sd):.2f}",
    ]


def test_every_variant_of_a_sweep_has_its_rows(tmp_path):
    for seed in range(2):
        make_run(tmp_path / "plain" / str(seed), 70.0 + seed, seed, "none")
        for number, dk in enumerate((8, 16, 32, 64, 128)):
            run = tmp_path / f"{dk}-{seed}"
            make_run(run, 71.0 + number * (2 + seed) / 7, seed, "aa", attention__dk=dk)
    for word in ("training images", "four of five cases"):
        assert len(table(tmp_path, word).rows) == 5


def test_the_difference_in_training_is_told(folder):
    for attention, scores in (("none", [75.0, 77.5, 76.0]), ("aa", [74.0, 75.5, 76.5])):
        for seed, top1 in enumerate(scores):
            change(folder, attention, seed, train__top1=top1)
    rows = table(folder, "training images").rows
    assert [row[0] for row in rows] == [f"{kind} {MINUS} plain" for kind in ("GE", "SE", "AA")]
    interval = stats.ttest_1samp([-1.0, -2.0, 0.5], 0).confidence_interval(0.95)
    low, high = (f"{abs(value):.2f}" for value in interval)
    assert rows[2][1:] == [
        "3",
        f"{MINUS}0.83",
        f"{MINUS}{low} to +{high}",
        f"0: {MINUS}1.00, 1: {MINUS}2.00, 2: +0.50",
    ]


def test_the_dashboard_has_the_same_as_numbers(folder):
    table = dashboard._rows(analysis_of(folder))
    rows = {row[0]: dict(zip(dashboard.COLUMNS, row, strict=True)) for row in table}
    assert {rows["plain"][key] for key in dashboard.DIFFERENCE} == {None}
    top1 = from_plain(folder, "aa").top1
    numbers = [rows["AA"][key] for key in ("difference", "95 % low", "95 % high", "p")]
    assert numbers == [top1.mean, top1.low, top1.high, top1.p]
    own = [rows["AA"][key] for key in ("n", "mean top-1 %", "sd", "GFLOPs")]
    expected = [3, statistics.mean(TOP1["aa"]), statistics.stdev(TOP1["aa"]), 185e-9]
    assert own == pytest.approx(expected)


def test_of_a_single_pair_there_is_no_interval(tmp_path):
    for attention, top1 in (("none", 70.0), ("aa", 71.0)):
        make_run(tmp_path / attention, top1, 4, attention)
    (row,) = table(tmp_path, "training images").rows
    assert row[1:] == ["1", "+1.00", "\N{EN DASH}", "4: +1.00"]
    tables = differences.differences_section(analysis_of(tmp_path)).tables
    assert not any("four of five cases" in one.caption for one in tables)


def test_at_equal_cost_the_slower_curve_is_read_earlier(folder):
    aa = from_plain(folder, "aa")
    time, flops = at_equal_cost(aa)
    # 12 and 15 seconds per epoch: in 120 seconds, attention finishes 8 epochs.
    assert (time.cost, time.epochs) == ("training time of the runs", (8, 10))
    assert time.ratio == pytest.approx(1.25)
    assert flops.epochs == (5, 10)  # 10 / 1.85 = 5.4
    for found, epoch in ((time, 8), (flops, 5)):
        for seed in range(3):
            row = aa.variant.runs[seed].rows[epoch - 1]["test/top1"]
            assert found.top1.by_seed[seed] == pytest.approx(row - TOP1["none"][seed])


def test_times_that_were_measured_apart_are_taken(folder):
    times = {"ms": {"attention=none": 400.0, "attention=aa": 800.0, "attention=se": 400.0}}
    (folder / STEP_TIMES).write_text(json.dumps(times))
    found = {kind: at_equal_cost(from_plain(folder, kind)) for kind in ("aa", "se", "ge")}
    assert [one.cost for one in found["aa"]] == ["training time, measured apart", "FLOPs"]
    assert found["aa"][0].epochs == (5, 10)
    assert found["se"] == []  # as fast as plain, so there is no other difference
    # Not measured, so the times of the runs are used.
    assert [one.cost for one in found["ge"]] == ["training time of the runs"]
    section = differences.equal_cost_section(analysis_of(folder))
    assert [row[1] for row in section.tables[0].rows] == [
        one.cost for one in (*found["ge"], *found["aa"])
    ]


def test_a_trifle_more_is_as_much(folder):
    for attention, flops in (("none", 100_000), ("se", 100_050)):
        for seed in range(3):
            change(folder, attention, seed, flops=flops)
    found = at_equal_cost(from_plain(folder, "se"))
    assert [one.cost for one in found] == ["training time of the runs"]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"ms": 3}', '{"ms": {"a": -1}}', '{"ms": {"a": "x"}}', "\udc00", "[" * 10**6],
    ids=str.__len__,
)
def test_damaged_times_are_named(folder, text):
    (folder / STEP_TIMES).write_text(text, errors="surrogatepass")
    with pytest.raises(ValueError, match=r"step_times\.json is damaged: expected an object ms"):
        differences.equal_cost_section(analysis_of(folder))


def test_on_two_machines_no_times_are_compared(folder):
    make_run(folder / "x" / "seed=7", 70, 7, "aa", epochs=10, facts={"hardware": "Other"})
    aa = from_plain(folder, "aa")
    assert [one.cost for one in at_equal_cost(aa)] == ["FLOPs"]


def test_classes_are_corrected_for_their_number(folder):
    section = differences.classes_section(analysis_of(folder))
    assert "corrected by Holm for 7 classes" in section.text[0]
    _, table = section.folded
    assert table.head[3] == "p (Holm)"
    aa = from_plain(folder, "aa")
    names = aa.variant.first["class_names"]
    raw = []
    for number in range(len(names)):
        pairs = [
            (a.summary["per_class_top1"][number], b.summary["per_class_top1"][number])
            for a, b in zip(aa.variant.runs, aa.baseline.runs, strict=True)
        ]
        raw.append(float(stats.ttest_rel(*zip(*pairs, strict=True)).pvalue))
    expected = dict(zip(names, holm_bonferroni(raw), strict=True))
    assert {row[0] for row in table.rows} == expected.keys()
    for row in table.rows:
        assert float(row[3]) == pytest.approx(expected[row[0]], rel=0.1)
