"""The report: what is counted, what is concluded from it, and what the two files say."""

import base64
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from hydra import compose, initialize_config_dir
from scipy import stats

from models import augmented_layers, count_flops, count_parameters
from reporting import figures, page, paired, paper, render, runs
from scripts import report as report_command
from training.settings import build_model

from folders import CLASSES, make_run
from helpers import CONFIGS

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(autouse=True)
def sketches(request, monkeypatch):
    """Pictures are drawn where a test asks for ``pictures``: they take most of the time."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "_as_svg", lambda figure: "<svg/>")


@pytest.fixture
def pictures():
    """See `sketches`."""


def groups_of(root):
    found, _ = runs.read([root])
    return runs.group(found)[0]


# ---- What is counted ----------------------------------------------------------------------------


def test_mean_and_deviation_over_the_seeds(tmp_path):
    for seed, top1 in enumerate((70.0, 74.0, 75.0)):
        make_run(tmp_path / f"aa/seed={seed}", top1, seed, "aa")
    make_run(tmp_path / "none/seed=0", 20.0)
    text = render.report([tmp_path], tmp_path / "out")
    # mean 73, deviations -3, 1, 2: variance 14 / 2
    row = (
        "| AA | 3 | 2,700,000 | 1.11 | 73.00 ± 2.65 | 93.00 ± 2.65 | 0: 70.00, 1: 74.00, 2: 75.00 |"
    )
    assert row in text
    assert "| plain | 1 | 2,750,000 | 0.776 | 20.00 | 40.00 | 0: 20.00 |" in text
    assert row in (tmp_path / "out" / "report.md").read_text()


def test_what_is_no_result_is_listed_and_in_no_number(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"none/seed={seed}", 70.0, seed)
    make_run(tmp_path / "a", 1.0, 2, finished=False)
    (make_run(tmp_path / "b", 1.0, 3, finished=False) / "failed.json").write_text(
        json.dumps({"error": "the loss is not finite at epoch 2"})
    )
    make_run(tmp_path / "c", 1.0, 4, facts={"eval_loss": math.nan})
    make_run(tmp_path / "d", 1.0, 5, data__name="cifar10")
    make_run(tmp_path / "e", 1.0, 6, facts={"evaluated_on": "validation"})
    make_run(tmp_path / "f", 1.0, 1)
    (make_run(tmp_path / "g", 1.0, 7) / "summary.json").write_text("{")
    make_run(tmp_path / "h", 1.0, 8, facts={"epochs": 2})
    (tmp_path / "i").mkdir()
    (tmp_path / "i" / "failed.json").write_text(json.dumps({"error": "at epoch 1"}))
    (tmp_path / "j" / ".hydra").mkdir(parents=True)
    (tmp_path / "j" / ".hydra" / "config.yaml").write_text("epochs: 9\n")
    (tmp_path / "j" / "last.pt").write_bytes(b"")
    found, left = runs.read([tmp_path])
    data, found, others = runs.of_one_data(found, None)
    groups, repeated = runs.group(found)
    assert data == "cifar100 test"
    # f comes before none/seed=1 and has the same settings and seed.
    assert [(r.folder.name, r.seed) for r in groups[0].runs] == [("seed=0", 0), ("f", 1)]
    kinds = {one.folder.name: (one.kind, one.why) for one in left + others + repeated}
    assert kinds == {
        "a": ("unfinished", "3 epochs"),
        "b": ("diverged", "the loss is not finite at epoch 2"),
        "c": ("diverged", "a figure of the last epoch is not finite"),
        "d": ("other data", "cifar10 test"),
        "e": ("other data", "cifar100 validation"),
        "g": ("unreadable", kinds["g"][1]),
        "h": ("unfinished", "2 of 3 epochs"),
        "i": ("diverged", "at epoch 1"),
        "j": ("unfinished", "0 of 9 epochs"),
        "seed=1": ("repeated", f"seed 1 of the same settings is in {tmp_path / 'f'}"),
    }
    render.report([tmp_path], tmp_path / "out")
    for name in ("report.md", "report.html"):
        text = (tmp_path / "out" / name).read_text()
        assert all(str(tmp_path / folder) in text for folder in "abcdeghij")


def test_the_data_set_can_be_chosen(tmp_path):
    make_run(tmp_path / "a", 70.0, 0)
    make_run(tmp_path / "b", 71.0, 1)
    make_run(tmp_path / "c", 90.0, 0, data__name="cifar10")
    assert "| plain | 2 |" in render.report([tmp_path], tmp_path / "o")
    assert "90.00" in render.report([tmp_path], tmp_path / "o", "cifar10")
    with pytest.raises(ValueError, match="--data svhn: no finished run is of it; there are cifar1"):
        render.report([tmp_path], tmp_path / "o", "svhn")


def test_without_runs_it_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is no folder"):
        render.report([tmp_path / "nowhere"], tmp_path)
    with pytest.raises(ValueError, match=r"there is no metrics\.csv"):
        render.report([tmp_path], tmp_path)
    make_run(tmp_path / "a", 1.0, finished=False)
    with pytest.raises(ValueError, match=r"no finished run in .*a unfinished \(3 epochs\)"):
        render.report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_both_files_and_says_where(tmp_path, monkeypatch, capsys):
    make_run(tmp_path / "a")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    report_command.main()
    assert f"written: {tmp_path / 'report.html'}" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path / "x")])
    with pytest.raises(SystemExit, match=r"report\.py: .*x is no folder"):
        report_command.main()


# ---- What belongs together ----------------------------------------------------------------------


def test_groups_are_named_by_what_tells_them_apart(tmp_path):
    make_run(tmp_path / "a", attention="plain")
    make_run(tmp_path / "b", attention="aa", attention__dk=8, attention__dv=16)
    make_run(tmp_path / "c", attention="aa", attention__dk=16, attention__dv=4)
    make_run(tmp_path / "d", attention="aa", attention__dk=8, attention__dv=16, epochs=4)
    make_run(tmp_path / "e", attention="ge")
    assert [one.label for one in groups_of(tmp_path)] == [
        "plain",
        "GE",
        "AA dk=8 dv=16 epochs=3",
        "AA dk=8 dv=16 epochs=4",
        "AA dk=16 dv=4 epochs=3",
    ]
    make_run(tmp_path / "f", facts={"model": "wrn28_10"}, model__name="wrn28_10")
    assert "wrn28_10 plain" in [one.label for one in groups_of(tmp_path)]


def test_names_and_places_do_not_part_runs_and_settings_do(tmp_path):
    make_run(tmp_path / "a", seed=0, name="x", data__root="y", wandb__mode="offline")
    make_run(tmp_path / "b", seed=1)
    assert [len(one.runs) for one in groups_of(tmp_path)] == [2]
    make_run(tmp_path / "c", seed=2, label_smoothing=0.1)
    assert sorted(len(one.runs) for one in groups_of(tmp_path)) == [1, 2]


def test_mixed_commits_and_hardware_are_noted(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, facts={"commit": "f" * 40 + "-dirty", "hardware": "A CPU"})
    text = render.report([tmp_path], tmp_path / "out")
    assert "Several commits within plain" in text
    assert "Several kinds of hardware within plain" in text
    assert "precisions" not in text
    whole = (tmp_path / "out" / "report.md").read_text()
    assert "mixed: 0123456789, ffffffffff-dirty | mixed: A CPU, Some GPU | bfloat16" in whole


def test_networks_of_different_commits_are_noted(tmp_path):
    make_run(tmp_path / "p")
    make_run(tmp_path / "a", attention="aa", facts={"commit": "f" * 40})
    text = render.report([tmp_path], tmp_path / "out")
    assert "The networks are of several commits" in text
    assert "within" not in text


# ---- What is concluded --------------------------------------------------------------------------


def test_paired_difference_by_hand():
    # differences 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7, standard error sqrt(7 / 3)
    found = paired.paired({0: 71.0, 1: 72.0, 2: 76.0, 9: 0.0}, {2: 70.0, 1: 70.0, 0: 70.0, 8: 1.0})
    assert found.by_seed == {0: 1.0, 1: 2.0, 2: 6.0}
    error = math.sqrt(7 / 3)
    assert found.mean == pytest.approx(3)
    assert found.t == pytest.approx(3 / error)
    # 4.302653 is the tables' 97.5 % quantile of Student's t with two degrees of freedom.
    assert found.low == pytest.approx(3 - 4.302653 * error, rel=1e-6)
    assert found.high == pytest.approx(3 + 4.302653 * error, rel=1e-6)
    # With two degrees of freedom the distribution is t / sqrt(2 + t^2), in closed form.
    t = 3 / error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.sign == 0


def test_an_interval_covers_as_often_as_it_says():
    draws = stats.norm.rvs(0.5, 1.0, (400, 4), random_state=0)
    zero = dict.fromkeys(range(4), 0.0)
    found = [paired.paired(dict(enumerate(map(float, row))), zero) for row in draws]
    covered = sum(one.low <= 0.5 <= one.high for one in found)
    assert 0.92 < covered / 400 < 0.98
    assert all((one.p < 0.05) == (one.sign != 0) for one in found)


@pytest.mark.parametrize(
    ("ours", "theirs", "n", "mean", "verdict"),
    [
        ({0: 71.0}, {0: 70.0}, 1, 1.0, "One pair of seeds"),
        ({0: 71.0}, {1: 70.0}, 0, None, "No seed in common"),
        ({0: 71.0, 1: 72.0}, {0: 70.0, 1: 71.0}, 2, 1.0, "All pairs differ by the same"),
    ],
)
def test_no_interval_is_made_up(ours, theirs, n, mean, verdict):
    found = paired.paired(ours, theirs)
    assert (found.n, found.mean, found.low, found.high, found.t, found.p) == (n, mean, *[None] * 4)
    assert page.verdict(found, "AA").startswith(verdict)
    assert page.interval(found) == page.DASH


def test_unequal_recipes_are_said(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"p{seed}", 70.0 + seed, seed, batch_size=1024)
        make_run(tmp_path / f"a{seed}", 72.0 + 3 * seed, seed, "aa")
    text = render.report([tmp_path], tmp_path / "out")
    assert "AA and plain are not trained alike: batch_size 256 / 1024." in text
    assert "the recipes differ: batch_size" in text


def test_the_twin_is_the_plain_network_of_the_nearest_recipe(tmp_path):
    make_run(tmp_path / "far", 60.0, batch_size=1024, optim__lr=0.8)
    make_run(tmp_path / "near", 70.0)
    make_run(tmp_path / "other", 50.0, model__depths=[4, 4, 4])
    make_run(tmp_path / "aa", 71.0, attention="aa")
    comparisons = paired.compare_with_plain(groups_of(tmp_path))
    assert [c.twin.runs[0].folder.name for c in comparisons] == ["near", "far"]
    assert [c.top1.mean for c in comparisons] == [pytest.approx(1), pytest.approx(11)]
    assert comparisons[0].differing == {}
    assert comparisons[1].differing == {"batch_size": (256, 1024), "optim.lr": (0.2, 0.8)}
    assert [c.twin.runs[0].folder.name for c in paired.nearest(comparisons)] == ["near"]


def test_the_page_says_better_only_where_the_interval_does(tmp_path):
    for seed, (plain, aa, se) in enumerate([(70, 72, 71), (71, 73.1, 69), (70.5, 72.4, 73)]):
        make_run(tmp_path / f"p{seed}", float(plain), seed)
        make_run(tmp_path / f"a{seed}", float(aa), seed, "aa")
        make_run(tmp_path / f"s{seed}", float(se), seed, "se")
    cards = page.cards(paired.compare_with_plain(groups_of(tmp_path)))
    assert [(c.title, c.number, c.tone) for c in cards] == [
        ("AA against plain", "+2.00", "better"),
        ("SE against plain", "+0.50", "open"),
    ]
    assert cards[0].verdict == "AA is better than plain."
    assert cards[1].verdict == "These runs do not tell the two apart."
    assert "n = 3 pairs of seeds, p < 0.001" in cards[0].details[1]


# ---- Beside the paper ---------------------------------------------------------------------------


def test_the_papers_rows_stand_beside_ours(tmp_path):
    ours = {"model": "wrn28_10", "parameters": 36_278_324, "flops": 10_430_000_000}
    make_run(tmp_path / "p", 81.0, facts=ours, model__name="wrn28_10")
    make_run(tmp_path / "a", 80.0, attention="aa", facts=ours, model__name="wrn28_10")
    text = render.report([tmp_path], tmp_path / "out")
    assert "| 81.00 | 36.3 M | 10.4 | 80.3 | 95.0 |" in text
    assert "| 80.00 | 36.2 M | 10.9 | 81.6 | 95.2 |" in text
    whole = (tmp_path / "out" / "report.md").read_text()
    assert f"80.00 / 81.6 ({MINUS}1.60)" in whole
    assert "81.00 / 80.3 (+0.70)" in whole
    recipe = whole[whole.index("| what differs |") :]
    assert "| epochs | plain, AA | 500 | 3 |" in recipe
    assert "| batch_size | plain | 1024 | 256 | from memory, not checked |" in recipe
    assert "| schedule | plain, AA | warmup_cosine | one_cycle |" in recipe
    assert "| optim.weight_decay | plain | 0.0002 | 0.0005 |" in recipe
    assert "attention.dk" not in recipe  # as in the paper
    assert "| batch_size | AA" not in recipe


def test_other_networks_are_not_held_against_the_papers_scores(tmp_path):
    make_run(tmp_path / "p", 81.0)
    render.report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text()
    assert "None of these runs is a Wide-ResNet-28-10" in whole
    assert "81.00 / 80.3" not in whole


def test_the_papers_numbers():
    assert [paper.TABLE1[k].top1 for k in ("plain", "ge", "se", "aa")] == [80.3, 79.8, 81.0, 81.6]
    assert all(one.sure in paper.SURE for one in paper.RECIPE)


def test_our_numbers_in_the_notes_on_the_paper():
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["experiment=table1", "attention=aa"])
    with torch.device("meta"):
        model = build_model(cfg, num_classes=100, image_size=(32, 32))
    parameters = count_parameters(model)
    tables = sum(
        (layer.Nh - 1) * (layer.key_rel_h.numel() + layer.key_rel_w.numel())
        for layer in augmented_layers(model).values()
    )
    flops, sizes = paper.NOTES
    assert f"come to {count_flops(model, (32, 32)) / 1e9:.1f} " in flops
    assert f"({parameters / 1e6:.2f} M)" in sizes
    assert f"give {(parameters + tables) / 1e6:.2f} M" in sizes


# ---- The files ----------------------------------------------------------------------------------


class Page(HTMLParser):
    """The parts of a page that a browser would act on."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def sweep(root):
    for dk in (8, 16):
        for dv in (4, 8, 12):
            for heads in (2, 4):
                settings = {"attention__dk": dk, "attention__dv": dv, "attention__Nh": heads}
                for seed in (0, 1):
                    top1 = 60.0 + dk / 10 + dv / 100 + heads / 1000 + seed * (1 + dv / 50)
                    folder = root / f"{dk},{dv},{heads},{seed}"
                    make_run(folder, top1, seed, "aa", **settings)
    make_run(root / "p0", 60.0, 0)
    make_run(root / "p1", 61.0, 1)


def test_the_page_needs_nothing_but_itself(tmp_path, pictures):
    sweep(tmp_path)
    render.report([tmp_path], tmp_path / "out")
    text = (tmp_path / "out" / "report.html").read_text()
    found = Page(text)
    assert found.open == []
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object")]
    links = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert len(links) > 6
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in text
    assert "@import" not in text
    pictures = [a for tag, a in found.tags if tag == "img"]
    assert all(len(a["alt"]) > 20 for a in pictures)
    names = re.findall(r"!\[.*\]\((.+)\)", (tmp_path / "out" / "report.md").read_text())
    for name, picture in zip(names, pictures, strict=True):
        svg = base64.b64decode(picture["src"].partition(",")[2])
        assert svg == (tmp_path / "out" / name).read_bytes()
        assert svg.lstrip().startswith(b"<?xml")
    assert "sweep1-Nh2.svg" in names


def test_the_same_runs_give_the_same_bytes(tmp_path, pictures):
    sweep(tmp_path / "runs")
    for name in "ab":
        render.report([tmp_path / "runs"], tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert first == second


def test_a_sweep_is_counted_and_drawn_by_cell(tmp_path, monkeypatch):
    sweep(tmp_path)
    groups = groups_of(tmp_path)
    drawn = []
    monkeypatch.setattr(page.figures, "heatmap", lambda *given: drawn.append(given) or "<svg/>")
    section = page.sweep_section(groups)
    assert [picture.name for picture in section.pictures] == ["sweep1-Nh2", "sweep1-Nh4"]
    (two, low, high, title), four = drawn
    assert title == "wrn16_4, Nh = 2"
    assert len(two) == 6
    assert four[0][16, 12] == (pytest.approx(60 + 1.6 + 0.12 + 0.004 + 0.62), 2)
    assert (low, high) == four[1:3]
    assert low == pytest.approx(60 + 0.8 + 0.04 + 0.002 + 0.54)
    assert high == four[0][16, 12][0]
    head, *_ = page.cards(paired.nearest(paired.compare_with_plain(groups)))
    assert head.title.startswith("12 augmented networks")
    assert "12 not told apart" in head.unit or "better" in head.number


def test_classes_are_compared_by_pair(tmp_path):
    def by_class(*values):
        return {"per_class_top1": [*values, None], "class_names": ["a", "b", "c"]}

    make_run(tmp_path / "p0", 70.0, 0, facts=by_class(10, 20))
    make_run(tmp_path / "p1", 71.0, 1, facts=by_class(30, 40))
    make_run(tmp_path / "a0", 70.0, 0, "aa", facts=by_class(15, 10))
    make_run(tmp_path / "a1", 72.0, 1, "aa", facts=by_class(33, 38))
    section = page.classes_section(paired.compare_with_plain(groups_of(tmp_path)))
    assert section.folded[1].rows == [
        ["a", "+4.00", "+5.00, +3.00"],
        ["b", f"{MINUS}6.00", f"{MINUS}10.00, {MINUS}2.00"],
    ]


def test_names_are_text_and_not_html(tmp_path):
    make_run(tmp_path / "p", 70.0)
    make_run(tmp_path / "a", 71.0, attention="aa")
    render.report([tmp_path], tmp_path / "out")
    assert "<rocket>" in CLASSES
    text = (tmp_path / "out" / "report.html").read_text()
    assert "&lt;rocket&gt;" in text
    assert "<rocket>" not in text


@pytest.mark.parametrize("attention", ["plain", "aa"])
def test_one_run_alone_has_a_page(tmp_path, pictures, attention):
    make_run(tmp_path / "a", 70.0, 0, attention, epochs=1)
    text = render.report([tmp_path], tmp_path / "out")
    assert "There is no finished network together with its plain twin." in text


def test_two_hundred_runs(tmp_path, pictures):
    """All of them are on the page: 64 augmented networks and two plain ones, three seeds each."""
    for number in range(66):
        for seed in range(3):
            attention = "aa" if number < 64 else "plain"
            settings = {"batch_size": 256 if number < 65 else 512}
            if attention == "aa":
                dk, dv, heads = 8 * (1 + number % 4), 4 * (1 + number // 4 % 4), 2 ** (number // 16)
                settings |= {"attention__dk": dk, "attention__dv": dv, "attention__Nh": heads}
            make_run(
                tmp_path / f"{number}/{seed}", 60 + (7 * number + seed * seed) % 13,
                seed, attention, epochs=4, **settings,
            )  # fmt: skip
    make_run(tmp_path / "x/0", 1.0, 3, finished=False)
    make_run(tmp_path / "x/1", 1.0, 0, data__name="cifar10")
    text = render.report([tmp_path], tmp_path / "out")
    assert "198 finished runs of 66 networks" in text
    assert "2 folders not counted" in text
    assert text.count("\n| AA ") == 64
    assert len([*(tmp_path / "out").glob("*.svg")]) == 11
    assert (tmp_path / "out" / "report.html").stat().st_size < 3e6


def test_colours_of_few_and_of_many(tmp_path):
    make_run(tmp_path / "p", 70.0, epochs=4)
    make_run(tmp_path / "q0", 60.0, 0)
    make_run(tmp_path / "q1", 60.0, 1)
    make_run(tmp_path / "se", 71.0, attention="se")
    make_run(tmp_path / "aa", 71.0, attention="aa")
    few = {one.label: colour for one, colour in figures.colours(groups_of(tmp_path)).items()}
    assert few["plain epochs=3"] == figures.PLAIN
    assert few["AA"] == figures.COLOURS[0]
    assert len(set(few.values())) == 4
    for dk in range(10, 20):
        make_run(tmp_path / f"{dk}", 70.0 + dk, attention="aa", attention__dk=dk)
    many = {one.label: colour for one, colour in figures.colours(groups_of(tmp_path)).items()}
    hued = [label for label, colour in many.items() if colour in figures.COLOURS]
    assert hued == [f"AA dk={dk}" for dk in (16, 17, 18, 19)]
    assert many["plain epochs=3"] == figures.PLAIN
    assert many["plain epochs=4"] == figures.OTHERS
