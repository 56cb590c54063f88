"""results/: the numbers on the pages match the raw rows and the command given on the pages."""

import re
import statistics

import pytest
import scipy.stats

from reporting.analysis import analyze
from reporting.paired import holm_bonferroni
from reporting.runs import conditions, group_by_variant, read
from reporting.text import MINUS, interval, p_value, signed
from training.run_folder import read_metrics

from folders import report
from helpers import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
# Their text without line breaks.
README_WORDS, WORDS = (" ".join(text.split()) for text in (README, PAGE))
SHOWN = ("Scores", "Differences from the plain baseline", "At equal cost")
# README's names for the networks.
NAMES = {
    "none": "ResNet-20, plain",
    "ge": "with gather-excite",
    "se": "with squeeze-and-excitation",
    "aa": "with attention in its last two stages",
}


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """The sections of report.md by title."""
    out = tmp_path_factory.mktemp("report")
    report([ROOT / "results" / "cpu20"], out)
    text = (out / "report.md").read_text(encoding="utf-8")
    parts = (part.partition("\n") for part in re.split(r"^## ", text, flags=re.MULTILINE))
    return {title: rest for title, _, rest in parts}


@pytest.mark.parametrize("section", SHOWN)
def test_the_page_has_the_tables_of_the_report(sections, section):
    tables = re.findall(r"(?:^\|.*\n)+", sections[section], re.MULTILINE)
    assert tables
    for table in tables:
        assert table in PAGE


def test_the_page_says_how_many_classes_differ(sections):
    (told,) = re.findall(r"corrected by Holm for .*?\.", sections["Classes"])
    assert told in WORDS


def test_readme_says_how_far_attention_is_from_plain():
    compared = analyze([ROOT / "results" / "cpu20"]).comparisons
    (found,) = (c.top1 for c in compared if c.variant.attention == "aa")
    where = "below" if found.mean < 0 else "above"
    pairs = {2: "two", 3: "three", 4: "four", 5: "five"}[found.n]
    low, high = signed(found.low, 1), signed(found.high, 1)
    words = (
        f"attention is {abs(found.mean):.1f} points {where} plain ({low} to {high}, {pairs} pairs)"
    )
    assert words in README_WORDS


def test_readme_has_the_rows():
    runs, excluded = read([ROOT / "results" / "cpu20"])
    assert excluded == []
    variants, _ = group_by_variant(runs)
    for variant in variants:
        scores = [f"{run.last('top1'):.2f}" for run in variant.runs]
        spread = f"{statistics.mean(map(float, scores)):.2f}"
        if len(scores) > 1:
            spread += f" ± {statistics.stdev(map(float, scores)):.2f}"
        (row,) = (line for line in README.splitlines() if NAMES[variant.attention] in line)
        cells = [cell.strip().replace("*", "") for cell in row.strip("|").split("|")]
        assert cells[2:5] == [str(len(scores)), ", ".join(scores), spread]
        assert cells[5] == f"{variant.first['parameters']:,}"


def test_every_run_is_of_the_planned_commit_and_recipe():
    runs, _ = read([ROOT / "results" / "cpu20"])
    (commit,) = conditions(runs, "commit")
    assert commit.startswith("39acecd")
    for key, value in (("epochs", 15), ("optim.lr", 0.2), ("label_smoothing", 0.1)):
        assert {run.settings[key] for run in runs} == {value}


# ---- Follow-up analyses -------------------------------------------------------------------------


def last_epochs(folder, column):
    """Return a column's values in the last epoch, by variant folder and seed."""
    values = {}
    for path in sorted((ROOT / "results" / folder).glob("*/seed=*")):
        seed = int(path.name.partition("=")[2])
        values.setdefault(path.parent.name, {})[seed] = read_metrics(path)[-1][column]
    return values


def test_the_page_has_the_unpaired_differences():
    analysis = analyze([ROOT / "results" / "cpu20"])
    error, found = analysis.unpaired("top1")
    assert f"({error.sd:.2f} points, {error.df} degrees of freedom)" in WORDS
    (one,) = (one for c, one in found.items() if c.variant.attention == "aa")
    assert f"{signed(one.mean)} points ({interval(one.low, one.high)})" in WORDS
    error, found = analysis.unpaired("loss")
    assert f"standard deviation is {error.sd:.3f} nats" in WORDS
    names = {"aa": "attention", "se": "SE", "ge": "GE"}
    assert {comparison.variant.attention for comparison in found} == names.keys()
    for comparison, one in found.items():
        assert f"{names[comparison.variant.attention]} {MINUS} plain" in WORDS
        assert f"{signed(one.mean, 3)} ({interval(one.low, one.high, 3)}" in WORDS


def test_the_page_says_when_attention_falls_back():
    gaps = []
    for seed in range(5):
        curves = []
        for kind in ("aa", "none"):
            folder = ROOT / "results" / "cpu20" / f"attention={kind}" / f"seed={seed}"
            curves.append([row["train/top1"] for row in read_metrics(folder)])
        gaps.append([a - b for a, b in zip(*curves, strict=True)])
    means = [-statistics.mean(of_epoch) for of_epoch in zip(*gaps, strict=True)]
    middle = means[2:9]
    assert (
        f"by {means[0]:.1f} points after the first epoch, by {min(middle):.1f} to "
        f"{max(middle):.1f} from the third to the ninth"
    ) in WORDS
    assert f"and by {means[-1]:.1f} at the end" in WORDS


def test_the_page_has_the_rows_of_the_four_recipes():
    paths = sorted((ROOT / "results" / "recipes15").glob("*/seed=0"))
    assert len(paths) == 4
    for path in paths:
        last = read_metrics(path)[-1]
        assert last["epoch"] == 15
        shown = f"{last['val/top1']:.2f} | {last['val/loss']:.3f} | {last['train/loss']:.3f}"
        assert f"| {shown} |" in PAGE


def test_the_page_has_the_rows_of_the_pilot():
    columns = ("val/top1", "val/loss", "train/loss")
    top1, val, train = (last_epochs("start-pilot", column) for column in columns)
    assert len(top1) == 4
    for variant, seeds in top1.items():
        scores = [seeds[seed] for seed in (0, 1, 2)]
        spread = f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
        losses = [f"{statistics.mean(of[variant].values()):.3f}" for of in (val, train)]
        row = [", ".join(f"{score:.2f}" for score in scores), spread, *losses]
        assert f"| 3 | {' | '.join(row)} |" in WORDS, variant


# ---- The users' sweep of dk, dv and Nh ----------------------------------------------------------

HEADS8 = ("dk", "dv", "Nh")
CONTRASTS = (f"dk, 64 {MINUS} 16", f"dv, 32 {MINUS} 8", f"Nh, 8 {MINUS} 2")


def heads8(column):
    """Return the last epoch's value of each run, by its dk, dv and Nh."""
    runs, _ = read([ROOT / "results" / "heads8"])
    assert [len(run.rows) for run in runs] == [4] * 27
    return {
        tuple(run.summary["config"]["attention"][name] for name in HEADS8): run.rows[-1][column]
        for run in runs
    }


def main_effects(values):
    """The residual sd of the main effects, and the planned contrasts of dk, dv and Nh: highest
    level minus lowest, with 95 % interval and Holm-corrected p."""
    grand = statistics.mean(values.values())
    means = [
        {
            level: statistics.mean(v for cell, v in values.items() if cell[factor] == level)
            for level in sorted({cell[factor] for cell in values})
        }
        for factor in range(3)
    ]
    left = [
        value - grand - sum(means[factor][cell[factor]] - grand for factor in range(3))
        for cell, value in values.items()
    ]
    sd = (sum(x * x for x in left) / 20) ** 0.5
    unit = sd * (2 / 9) ** 0.5
    effects = []
    for of_level in means:
        *_, high = of_level.values()
        low, *_ = of_level.values()
        effects.append(high - low)
    p = holm_bonferroni([2 * scipy.stats.t.sf(abs(e) / unit, 20) for e in effects])
    # From a table: 2.086 is the 97.5 % quantile of t with 20 degrees of freedom.
    return sd, [
        (effect, effect - 2.086 * unit, effect + 2.086 * unit, corrected)
        for effect, corrected in zip(effects, p, strict=True)
    ]


def test_the_page_has_the_planned_contrasts_of_the_sweep():
    sd, top1 = main_effects(heads8("val/top1"))
    sd_loss, losses = main_effects(heads8("val/loss"))
    assert f"{sd:.2f} points and {sd_loss:.3f} nats, 20 degrees of freedom" in WORDS
    for name, one, other in zip(CONTRASTS, top1, losses, strict=True):
        row = [name]
        for (mean, low, high, p), digits in ((one, 2), (other, 3)):
            row += [signed(mean, digits), interval(low, high, digits), p_value(p)]
        assert f"| {' | '.join(row)} |" in WORDS
    mean, low, high, _ = top1[1]
    words = f"{mean:.2f} points ({signed(low)} to {signed(high)})"
    assert f"dv of 32 instead of 8 gains {words}" in WORDS
    assert f"32 channels of attention instead of 8 gain {words}" in README_WORDS
    assert max(abs(bound) for one in (top1[0], top1[2]) for bound in one[1:3]) < 1.05


def test_the_page_has_every_cell_of_the_sweep():
    values = heads8("val/top1")
    for dk, dv in {cell[:2] for cell in values}:
        row = [f"{values[dk, dv, Nh]:.2f}" for Nh in (2, 4, 8)]
        assert f"| {dv} | {dk} | {' | '.join(row)} |" in PAGE
    ((plain,),) = ((seeds[0],) for seeds in last_epochs("heads8-plain", "val/top1").values())
    means = [
        statistics.mean(value for cell, value in values.items() if cell[1] == dv)
        for dv in (8, 16, 32)
    ]
    a, b, c = (f"{mean:.2f}" for mean in means)
    words = f"{plain:.2f} %, compared with {a}, {b}, and {c} % for dv of 8, 16, and 32 (means"
    assert words in WORDS


def test_the_report_of_the_sweep_says_what_the_page_does(tmp_path):
    report([ROOT / "results" / "heads8"], tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    (best, cell) = re.search(r"Best of 27 settings: ([\d.]+ %).*?\*\* (dk.*?)\.", text).groups()
    (others,) = re.findall(r"not distinguishable from it: (\d+) others", text)
    assert f"{cell} with {best}; {others} of the other 26 are indistinguishable" in WORDS
    (effect, bounds) = re.search(rf"\| dv \| 32 {MINUS} 8 \| (.*?) \| (.*?) \|", text).groups()
    assert f"dv 32 {MINUS} 8 is {effect} ({bounds})" in WORDS
    assert "1 of 9 differences significant" in text


# ---- Initialization and learning rate -----------------------------------------------------------


STARTS = {  # the page's names, by `attention.init` and `attention.qk_norm`
    ("kaiming", False): "former (kaiming)",
    ("torch", False): "its own",
    ("torch", True): "normalized q and k",
}


def cells_of_a():
    """A's runs by settings, then by seed; the runs with a learning rate of 0.2 are the pilot's."""
    cells = {}
    for folder in ("start-rate", "start-pilot"):
        runs, excluded = read([ROOT / "results" / folder])
        assert excluded == []
        for run in runs:
            config = run.summary["config"]
            own = config["attention"]
            start = STARTS.get((own.get("init"), own.get("qk_norm")), "plain")
            place = (f"{own['dv']:g}", own["blocks"]) if start != "plain" else None
            recipe = (config["optim"]["weight_decay"], config["label_smoothing"])
            cell = cells.setdefault((start, place, config["optim"]["lr"], *recipe), {})
            assert config["seed"] not in cell
            cell[config["seed"]] = run.rows[-1]
    return cells


def contrasts_of_a(column):
    """The pooled sd over seeds, its degrees of freedom, and each new start minus the former one,
    averaged over three learning rates: mean, 95 % interval and Holm-corrected p."""
    cells = {
        settings: {seed: row[column] for seed, row in cell.items()}
        for settings, cell in cells_of_a().items()
    }
    freedom = sum(len(cell) - 1 for cell in cells.values())
    means = {settings: sum(cell.values()) / len(cell) for settings, cell in cells.items()}
    squares = sum((x - means[s]) ** 2 for s, cell in cells.items() for x in cell.values())
    sd = (squares / freedom) ** 0.5
    found = []
    for start in ("its own", "normalized q and k"):
        mean, variance = 0, 0
        for rate, seeds in ((0.05, 1), (0.1, 1), (0.2, 3)):
            ours, former = (
                [cells[name, ("0.25", "all"), rate, 5e-4, 0.1][seed] for seed in range(seeds)]
                for name in (start, "former (kaiming)")
            )
            mean += (sum(ours) - sum(former)) / seeds / 3
            variance += sd**2 * 2 / seeds / 9
        found.append((mean, variance**0.5))
    p = holm_bonferroni([2 * scipy.stats.t.sf(abs(m) / unit, freedom) for m, unit in found])
    edge = scipy.stats.t.ppf(0.975, freedom)
    return (
        sd,
        freedom,
        [
            (mean, mean - edge * unit, mean + edge * unit, corrected)
            for (mean, unit), corrected in zip(found, p, strict=True)
        ],
    )


def test_the_page_has_the_planned_contrasts_of_starts():
    sd, freedom, top1 = contrasts_of_a("val/top1")
    sd_loss, _, losses = contrasts_of_a("val/loss")
    assert f"{sd:.2f} points and {sd_loss:.3f} nats, {freedom} degrees of freedom" in WORDS
    for name, one, other in zip(("its own start", "normalized q and k"), top1, losses, strict=True):
        row = [f"{name} {MINUS} the former start"]
        for (mean, low, high, p), digits in ((one, 2), (other, 3)):
            row += [signed(mean, digits), interval(low, high, digits), p_value(p)]
        assert f"| {' | '.join(row)} |" in WORDS
    own, normalized = (
        f"{mean:.1f} points ({signed(low, 1)} to {signed(high, 1)})" for mean, low, high, _ in top1
    )
    assert f"its own start gains {own}, and normalized" in WORDS
    assert f"normalized queries and keys gain {normalized.replace(' points', '')}" in WORDS
    assert f"own start gains {own}" in WORDS[: WORDS.index("What has since been learned")]
    assert f"the new start gains {own}" in README_WORDS
    alike = scipy.stats.t.ppf(0.975, freedom) * 2**0.5 * sd
    assert f"less than about {alike:.1f} points" in WORDS


def test_the_page_says_from_where_the_second_step_of_a_went_on():
    first = {settings: cell[0]["val/top1"] for settings, cell in cells_of_a().items()}
    aa = {s: v for s, v in first.items() if s[0] != "plain" and s[1] == ("0.25", "all")}
    best = max(aa, key=aa.get)
    assert (len(first), len(aa)) == (24, 9)
    assert best[::2] == ("its own", 0.2, 0.1)
    assert f"(its own start at 0.2, with {aa[best]:.2f} %)" in WORDS
    assert f"dv of 0.25 in all blocks, has {aa[best]:.2f} %" in WORDS


def test_the_page_has_the_three_best_cells_of_either_network():
    """The best by seed 0, with all their seeds; B uses the highest mean of three seeds."""
    cells = cells_of_a()
    by_first = sorted(cells, key=lambda settings: -cells[settings][0]["val/top1"])
    rows = re.findall(r"^\| (?:plain|attention) \| (?:decay|dv) .*\|$", PAGE, re.MULTILINE)
    best = [s for s in by_first if s[0] == "plain"][:3] + [s for s in by_first if s[0] != "plain"][
        :3
    ]
    assert len(rows) == 6
    for (start, place, rate, decay, smoothing), row in zip(best, rows, strict=True):
        assert rate == 0.2
        seeds = cells[start, place, rate, decay, smoothing]
        scores = [seeds[seed]["val/top1"] for seed in sorted(seeds)]
        if start == "plain":
            names = ["plain", f"decay {decay:g}, smoothing {smoothing:g}"]
        else:
            names = ["attention", f"dv {place[0]}, {place[1]} blocks, start: {start}"]
        names += [", ".join(f"{score:.2f}" for score in scores), f"{statistics.mean(scores):.2f}"]
        loss = statistics.mean(one["val/loss"] for one in seeds.values())
        assert row == f"| {' | '.join(names)} | {loss:.3f} |"
    assert all(len(cells[settings]) == 3 for settings in best)


def test_the_page_says_which_settings_b_compares():
    """Of either network the cell with three seeds and the highest mean."""
    means = {
        settings: statistics.mean(row["val/top1"] for row in cell.values())
        for settings, cell in cells_of_a().items()
        if len(cell) == 3
    }
    plain, attention = (
        max((s for s in means if (s[0] == "plain") == is_plain), key=means.__getitem__)
        for is_plain in (True, False)
    )
    assert plain == ("plain", None, 0.2, 0.001, 0)
    assert attention == ("its own", ("0.25", "unstrided"), 0.2, 0.0005, 0.1)
    ours, theirs = (f"{means[s]:.2f} %" for s in (plain, attention))
    assert f"plain with weight decay 0.001 and no label smoothing ({ours})" in WORDS
    assert f"attention with its own start in unstrided blocks only ({theirs})" in WORDS
    assert f"with the best of twelve settings each, plain {ours}, attention {theirs}" in WORDS
    ours, theirs = (f"{means[s]:.1f} %" for s in (plain, attention))
    assert f"plain gets {ours} and attention {theirs} of these images" in README_WORDS


def test_the_page_has_the_rows_of_start_and_rate():
    runs = [r for r in read([ROOT / "results" / "start-rate"])[0] if r.seed == 0]
    assert len(runs) == 20
    for run in runs:
        assert len(run.rows) == 5
        config, last = run.summary["config"], run.rows[-1]
        scores = [f"{last['val/top1']:.2f}"]
        scores += [f"{last[name]:.3f}" for name in ("val/loss", "train/loss")]
        if run.summary["attention"] == "none":
            cells = [config["optim"]["lr"], config["optim"]["weight_decay"]]
            cells = [f"{value:g}" for value in (*cells, config["label_smoothing"])] + scores
        else:
            entropies, sharpest = entropy_by_epoch(run)
            own = config["attention"]
            name, rate = STARTS[own["init"], own["qk_norm"]], config["optim"]["lr"]
            is_first_step = (own["dv"], own["blocks"]) == (0.25, "all")
            assert is_first_step or (name, rate) == ("its own", 0.2)
            cells = [name, f"{rate:g}"] if is_first_step else [f"{own['dv']:g}", own["blocks"]]
            cells += scores
            cells += [", ".join(f"{value:.2f}" for value in of) for of in (entropies, sharpest)]
        assert f"| {' | '.join(cells)} |" in PAGE


def test_the_page_has_the_plain_network_beside_them():
    """The gains of the former and the new starts over plain, at each learning rate."""
    above = {}
    cells = cells_of_a()
    for (start, place, rate, *recipe), cell in cells.items():
        if place == ("0.25", "all"):
            plain = cells[("plain", None, rate, *recipe)]
            above[start, rate] = statistics.mean(
                cell[seed]["val/top1"] - plain[seed]["val/top1"]
                for seed in range(3 if rate == 0.2 else 1)
            )
    plain = [cells["plain", None, rate, 5e-4, 0.1][0]["val/top1"] for rate in (0.05, 0.1)]
    assert f"the plain network gets {plain[0]:.2f} and {plain[1]:.2f} % at the rates" in WORDS
    former, own, new = (
        {rate: above[start, rate] for rate in (0.05, 0.1, 0.2)} for start in STARTS.values()
    )
    single = [of[rate] for of in (own, new) for rate in (0.05, 0.1)]
    assert f"between {-min(single):.1f} points below it and {max(single):.1f} above" in WORDS
    assert f"with its former start {-former[0.05]:.1f} and {-former[0.1]:.1f} below" in WORDS
    assert f"is {-new[0.2]:.1f} and {-own[0.2]:.1f} points ahead of the new starts" in WORDS
    means = statistics.mean(own.values()), statistics.mean(new.values())
    assert f"on average {-means[0]:.1f} points below it and {means[1]:.1f} above" in WORDS
    first = {settings: cell[0]["val/top1"] for settings, cell in cells.items()}
    best = max(first, key=first.get)
    assert best[1:3] == (("0.25", "unstrided"), 0.2)
    ahead = first[best] - max(score for s, score in first.items() if s[0] == "plain")
    assert (
        f"In unstrided blocks alone attention gets {first[best]:.2f} % there with seed 0" in WORDS
    )
    assert f"{ahead:.1f} points above the best plain one" in WORDS
    behind = [
        statistics.mean(row["val/top1"] for row in cells[settings].values())
        for settings in (("plain", None, 0.2, 0.001, 0), best)
    ]
    assert f"over three seeds it is {behind[0] - behind[1]:.1f} points below" in WORDS


def entropy_by_epoch(run):
    """Check how entropy moves; return it by epoch, and the sharpest layer's first and last."""
    entropies = [row["attention/entropy"] for row in run.rows]
    if run.summary["config"]["attention"]["init"] == "kaiming":  # softens
        assert entropies == sorted(entropies)
    else:  # sharpens, and stays
        assert entropies[0] == max(entropies)
        assert all(0.83 <= round(value, 2) <= 0.91 for value in entropies[2:])
    return entropies, [run.rows[n]["attention/lowest_entropy"] for n in (0, -1)]


# ---- Confirmation -------------------------------------------------------------------------------


def test_the_page_has_the_runs_of_b():
    """Those that have finished; the plan's contrast is for all 16."""
    runs, excluded = read([ROOT / "results" / "confirm"])
    assert excluded == []
    assert f"**{len(runs)} of 16 runs" in WORDS
    for run in runs:
        config, last = run.summary["config"], run.rows[-1]
        own = config["attention"]
        recipe = (config["optim"]["lr"], config["optim"]["weight_decay"], config["label_smoothing"])
        if run.summary["attention"] == "none":
            name = "plain"
            assert recipe == (0.2, 0.001, 0)
        else:
            name = "attention"
            assert recipe == (0.2, 0.0005, 0.1)
            assert (own["init"], own["qk_norm"], own["blocks"]) == ("torch", False, "unstrided")
        assert (len(run.rows), config["data"]["val_size"]) == (15, 0)
        assert 10 <= run.seed <= 17
        cells = [name, f"{run.seed}", f"{last['test/top1']:.2f}", f"{last['test/loss']:.3f}"]
        assert f"| {' | '.join(cells)} |" in PAGE
    (commit,) = conditions(runs, "commit")
    assert commit.startswith("cbcf112")
