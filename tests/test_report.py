"""The report: what is counted, what is concluded from it, and what the two files say."""

import base64
import csv
import errno
import html
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from matplotlib.container import ErrorbarContainer
from scipy import stats

from models import augmented_layers, count_flops, count_parameters
from reporting import figures, page, paired, paper, render, runs, text
from scripts import report as report_command
from training.settings import build_model

from folders import NASTY, failed, make_run, nasty_runs, stretch
from helpers import CONFIGS, ROOT

MINUS = "\N{MINUS SIGN}"


@pytest.fixture(autouse=True)
def sketches(request, monkeypatch):
    """Pictures are drawn where a test asks for ``pictures``: they take most of the time."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(figures, "_as_svg", lambda figure: "<svg/>")


@pytest.fixture
def pictures():
    """See `sketches`."""


def variants_of(root):
    found, _ = runs.read([root])
    return runs.group_by_variant(found)[0]


# ---- What is counted ----------------------------------------------------------------------------


def test_mean_and_deviation_over_the_seeds(tmp_path):
    for seed, top1 in enumerate((70.0, 74.0, 75.0)):
        make_run(tmp_path / f"aa/seed={seed}", top1, seed, "aa")
    make_run(tmp_path / "none/seed=0", 20.0)
    written = render.report([tmp_path], tmp_path / "out")
    # mean 73, deviations -3, 1, 2: variance 14 / 2
    row = (
        "| AA | 3 | 2,700,000 | 1.11 | 73.00 ± 2.65 | 93.00 ± 2.65 | 0: 70.00, 1: 74.00, 2: 75.00 |"
    )
    assert row in written
    assert "| plain | 1 | 2,750,000 | 0.776 | 20.00 | 40.00 | 0: 20.00 |" in written
    assert row in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_what_is_no_result_is_listed_and_in_no_number(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"none/seed={seed}", 70.0, seed)
    make_run(tmp_path / "a", 1.0, 2, finished=False)
    failed(make_run(tmp_path / "b", 1.0, 3, finished=False))
    make_run(tmp_path / "c", 1.0, 4, facts={"test/loss": math.nan})
    make_run(tmp_path / "d", 1.0, 5, data__name="cifar10")
    make_run(tmp_path / "e", 1.0, 6, evaluated_on="val")
    make_run(tmp_path / "f", 1.0, 1)
    (make_run(tmp_path / "g", 1.0, 7) / "summary.json").write_text("{")
    make_run(tmp_path / "h", 1.0, 8, facts={"epochs": 2})
    failed(tmp_path / "i", "at epoch 1")
    (tmp_path / "j" / ".hydra").mkdir(parents=True)
    (tmp_path / "j" / ".hydra" / "config.yaml").write_text("epochs: 9\n")
    (tmp_path / "j" / "last.pt").write_bytes(b"")
    diverging = make_run(tmp_path / "k", 70.0, 9) / "metrics.csv"
    lines = diverging.read_text(encoding="utf-8").splitlines()
    cells = lines[2].split(",")
    lines[2] = ",".join([cells[0], "inf", *cells[2:]])
    diverging.write_text("\n".join(lines) + "\n")
    found, excluded = runs.read([tmp_path])
    data, found, others = runs.select_data(found, None)
    variants, duplicates = runs.group_by_variant(found)
    assert data == "cifar100 test"
    # f comes before none/seed=1 and has the same settings and seed.
    assert [(r.folder.name, r.seed) for r in variants[0].runs] == [("seed=0", 0), ("f", 1)]
    excluded += others + duplicates
    assert {one.folder.name: (one.kind, one.why) for one in excluded} == {
        "a": ("unfinished", "3 epochs"),
        "b": ("diverged", "the loss is not finite at epoch 2"),
        "c": ("diverged", "loss is nan in summary.json"),
        "d": ("of another data set", "cifar10 test"),
        "e": ("of another data set", "cifar100 val"),
        "g": (
            "unreadable",
            "summary.json is damaged: Expecting property name enclosed in double quotes: "
            "line 1 column 2 (char 1)",
        ),
        "h": ("unreadable", "summary.json: epochs is 2, but config.epochs is 3"),
        "i": ("diverged", "at epoch 1"),
        "j": ("unfinished", "0 of 9 epochs"),
        "k": ("diverged", "train/loss is inf at epoch 2"),
        "seed=1": ("duplicate", f"seed 1 of the same settings is in {tmp_path / 'f'}"),
    }
    render.report([tmp_path], tmp_path / "out")
    for name in ("report.md", "report.html"):
        written = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert all(str(tmp_path / folder) in written for folder in "abcdeghijk")
        assert (
            "4 diverged, 2 unfinished, 2 of another data set, 1 duplicate, 2 unreadable" in written
        )


def test_a_folder_given_twice_is_read_once(tmp_path):
    make_run(tmp_path / "a" / "b")
    folders = [tmp_path, tmp_path / "a", tmp_path / "a" / ".." / "a" / "b"]
    found, excluded = runs.read(folders)
    assert len(found) == 1
    assert excluded == []


def test_the_data_set_can_be_chosen(tmp_path):
    make_run(tmp_path / "a", 70.0, 0)
    make_run(tmp_path / "b", 71.0, 1)
    make_run(tmp_path / "c", 90.0, 0, data__name="cifar10")
    assert "| plain | 2 |" in render.report([tmp_path], tmp_path / "o")
    assert "90.00" in render.report([tmp_path], tmp_path / "o", "cifar10")
    with pytest.raises(ValueError, match="--data svhn: no finished run uses it; there are cifar1"):
        render.report([tmp_path], tmp_path / "o", "svhn")


def test_validation_scores_are_reported_as_such(tmp_path):
    make_run(tmp_path / "a", 70.0, evaluated_on="val")
    make_run(tmp_path / "b", 72.0, attention="aa", evaluated_on="val")
    head = render.report([tmp_path], tmp_path / "out")
    assert "2 finished runs of 2 variants on CIFAR-100, evaluated on the validation set" in head
    assert "AA vs. plain: +2.00" in head


def test_without_runs_it_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no .*nowhere$"):
        render.report([tmp_path / "nowhere"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is not a folder"):
        render.report([tmp_path / "file"], tmp_path)
    with pytest.raises(ValueError, match=r"no folder there has a metrics\.csv"):
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
    with pytest.raises(SystemExit) as stopped:
        report_command.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err == f"report.py: there is no {tmp_path / 'x'}\n"


# ---- What belongs together ----------------------------------------------------------------------


def test_variants_are_named_by_what_tells_them_apart(tmp_path):
    make_run(tmp_path / "a", attention="none")
    make_run(tmp_path / "b", attention="aa", attention__dk=8, attention__dv=16)
    make_run(tmp_path / "c", attention="aa", attention__dk=16, attention__dv=4)
    make_run(tmp_path / "d", attention="aa", attention__dk=8, attention__dv=16, epochs=4)
    make_run(tmp_path / "e", attention="ge")
    assert [variant.label for variant in variants_of(tmp_path)] == [
        "plain",
        "GE",
        "AA dk=8 dv=16 epochs=3",
        "AA dk=8 dv=16 epochs=4",
        "AA dk=16 dv=4 epochs=3",
    ]
    make_run(tmp_path / "f", facts={"model": "wrn28_10"}, model__name="wrn28_10")
    assert "wrn28_10 plain" in [variant.label for variant in variants_of(tmp_path)]


def test_names_and_places_do_not_part_runs_and_settings_do(tmp_path):
    make_run(tmp_path / "a", seed=0, name="x", data__root="y", wandb__mode="offline")
    make_run(tmp_path / "b", seed=1)
    assert [len(variant.runs) for variant in variants_of(tmp_path)] == [2]
    make_run(tmp_path / "d", seed=3, model__aa={"dk": 0.3})  # the default of what attention.dk is
    assert [len(variant.runs) for variant in variants_of(tmp_path)] == [3]
    make_run(tmp_path / "c", seed=2, label_smoothing=0.1)
    assert sorted(len(variant.runs) for variant in variants_of(tmp_path)) == [1, 3]


def test_a_setting_that_is_missing_or_of_another_type_parts_runs(tmp_path):
    make_run(tmp_path / "a", attention="aa", attention__dk=1)
    make_run(tmp_path / "b", attention="aa", attention__dk=1.0)
    make_run(tmp_path / "c", attention="aa", attention__dk=1, grad_clip=None)
    assert {variant.label for variant in variants_of(tmp_path)} == {
        "AA dk=1.0",
        "AA dk=1 grad_clip=not set",
        "AA dk=1 grad_clip=null",
    } or {variant.label for variant in variants_of(tmp_path)} == {
        "AA dk=1 grad_clip=not set",
        "AA dk=1.0 grad_clip=not set",
        "AA dk=1 grad_clip=null",
    }


# ---- Where it comes from ------------------------------------------------------------------------


def test_mixed_commits_and_hardware_are_noted(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, facts={"commit": "f" * 40 + "-dirty", "hardware": "A CPU"})
    head = render.report([tmp_path], tmp_path / "out")
    assert (
        "Caveat: The runs of plain were trained at different commits (0123456789, "
        "ffffffffff-dirty); see “Where the numbers come from”." in head
    )
    assert "The runs of plain were trained on different hardware (A CPU, Some GPU)" in head
    assert "precisions" not in head
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "mixed: 0123456789, ffffffffff-dirty | mixed: A CPU, Some GPU | bfloat16" in whole
    assert "interrupted" not in whole


def test_variants_of_different_commits_are_noted(tmp_path):
    make_run(tmp_path / "p")
    make_run(tmp_path / "a", attention="aa", facts={"commit": "f" * 40})
    head = render.report([tmp_path], tmp_path / "out")
    assert "The variants were trained at different commits (0123456789, ffffffffff)" in head
    assert "The runs of" not in head


def test_a_continued_run_names_all_that_it_was_trained_on(tmp_path):
    other = stretch(2, commit="f" * 40, hardware="A CPU", torch="2.14.1", precision="float32")
    make_run(tmp_path / "p")
    make_run(tmp_path / "a", attention="aa", facts={"stretches": [stretch(), other]})
    make_run(tmp_path / "b", seed=1, facts={"stretches": [stretch(), stretch(3)]})
    head = render.report([tmp_path], tmp_path / "out")
    for differently in (
        "at different commits (0123456789, ffffffffff)",
        "on different hardware (A CPU, Some GPU)",
        "in different precisions (bfloat16, float32)",
        "with different versions of torch (2.13.0, 2.14.1)",
    ):
        assert f"The runs of AA were trained {differently};" in head
    assert "numbers of processes" not in head
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert (
        "| AA | 0 | mixed: 0123456789, ffffffffff | mixed: A CPU, Some GPU | "
        "mixed: bfloat16, float32 | mixed: 2.13.0, 2.14.1 | 1 |" in whole
    )
    stretches = whole[whole.index("Runs that were continued under different conditions") :]
    assert (
        "| AA | 0 | 1 | 0123456789 | Some GPU | bfloat16 | 2.13.0 | 1 |\n"
        "| AA | 0 | 2 | ffffffffff | A CPU | float32 | 2.14.1 | 1 |\n\n" in stretches
    )
    assert (
        "2 of 3 runs were interrupted and continued, 1 of them under different conditions" in whole
    )
    assert "Measured on A CPU, Some GPU. Times on different hardware are not comparable." in whole


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
        ({0: 71.0}, {0: 70.0}, 1, 1.0, "A single pair of seeds"),
        ({0: 71.0}, {1: 70.0}, 0, None, "No seed in common"),
        ({0: 71.0, 1: 72.0}, {0: 70.0, 1: 71.0}, 2, 1.0, "All pairs differ by the same"),
    ],
)
def test_no_interval_is_made_up(ours, theirs, n, mean, verdict):
    found = paired.paired(ours, theirs)
    assert (found.n, found.mean, found.low, found.high, found.t, found.p) == (n, mean, *[None] * 4)
    assert page.verdict(found, "AA").startswith(verdict)
    assert text.interval(found.low, found.high) == text.DASH


def test_unequal_recipes_are_said(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path / f"p{seed}", 70.0 + seed, seed, batch_size=1024)
        make_run(tmp_path / f"a{seed}", 72.0 + 3 * seed, seed, "aa")
    written = render.report([tmp_path], tmp_path / "out")
    assert (
        "Caveat: AA and plain were not trained with the same settings: batch_size 256 vs. 1024."
        in written
    )
    assert "other settings differ: batch_size" in written


def test_the_twin_is_the_plain_network_of_the_nearest_recipe(tmp_path):
    make_run(tmp_path / "far", 60.0, batch_size=1024, optim__lr=0.8)
    make_run(tmp_path / "near", 70.0)
    make_run(tmp_path / "other", 50.0, model__depths=[4, 4, 4])
    make_run(tmp_path / "aa", 71.0, attention="aa")
    comparisons = paired.compare_with_plain(variants_of(tmp_path))
    assert [c.baseline.runs[0].folder.name for c in comparisons] == ["near", "far"]
    assert [c.top1.mean for c in comparisons] == [pytest.approx(1), pytest.approx(11)]
    assert comparisons[0].differing == {}
    assert comparisons[1].differing == {
        "batch_size": ("256", "1024"),
        "optim.lr": ("0.2", "0.8"),
    }
    assert [c.baseline.runs[0].folder.name for c in paired.nearest(comparisons)] == ["near"]


def test_the_page_says_better_only_where_the_interval_does(tmp_path):
    for seed, (plain, aa, se) in enumerate([(70, 72, 71), (71, 73.1, 69), (70.5, 72.4, 73)]):
        make_run(tmp_path / f"p{seed}", float(plain), seed)
        make_run(tmp_path / f"a{seed}", float(aa), seed, "aa")
        make_run(tmp_path / f"s{seed}", float(se), seed, "se")
    cards = page.cards(paired.compare_with_plain(variants_of(tmp_path)))
    assert [(c.title, c.number, c.tone) for c in cards] == [
        ("AA vs. plain", "+2.00", "better"),
        ("SE vs. plain", "+0.50", "open"),
    ]
    assert cards[0].verdict == "AA is better than plain."
    assert cards[1].verdict == "No significant difference."
    assert "n = 3 pairs of seeds, p < 0.001" in cards[0].details[1]


# ---- Beside the paper ---------------------------------------------------------------------------


def test_the_papers_rows_are_shown_with_ours(tmp_path):
    ours = {"model": "wrn28_10", "parameters": 36_278_324, "flops": 10_430_000_000}
    make_run(tmp_path / "p", 81.0, facts=ours, model__name="wrn28_10")
    make_run(tmp_path / "a", 80.0, attention="aa", facts=ours, model__name="wrn28_10")
    written = render.report([tmp_path], tmp_path / "out")
    assert "| 81.00 | 36.3 M | 10.4 | 80.3 | 95.0 |" in written
    assert "| 80.00 | 36.2 M | 10.9 | 81.6 | 95.2 |" in written
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert f"80.00 / 81.6 ({MINUS}1.60)" in whole
    assert "81.00 / 80.3 (+0.70)" in whole
    recipe = whole[whole.index("Settings that differ from the paper's.") :]
    assert "| epochs | plain, AA | 500 | 3 |" in recipe
    assert "| batch_size | plain | 1024 | 256 | from memory, not checked |" in recipe
    assert "| schedule | plain, AA | warmup_cosine | one_cycle |" in recipe
    assert "| optim.weight_decay | plain | 0.0002 | 0.0005 |" in recipe
    assert "attention.dk" not in recipe  # as in the paper
    assert "| batch_size | AA" not in recipe


def test_other_networks_are_not_held_against_the_papers_scores(tmp_path):
    make_run(tmp_path / "p", 81.0)
    render.report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "None of these runs is a Wide-ResNet-28-10 evaluated" in whole
    assert "81.00 / 80.3" not in whole


def test_every_attention_has_a_name_and_a_row_of_the_paper():
    choices = {path.stem for path in (CONFIGS / "attention").glob("*.yaml")}
    assert set(runs.ATTENTION) == set(paper.TABLE1) == choices


def test_the_papers_numbers():
    assert [paper.TABLE1[k].top1 for k in ("none", "ge", "se", "aa")] == [80.3, 79.8, 81.0, 81.6]
    assert all(one.sure in paper.SURE for one in paper.RECIPE)


@pytest.mark.slow
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


# ---- What is drawn ------------------------------------------------------------------------------


def contents(figure):
    """What a figure's panel shows, as plain values."""
    panel = figure.axes[0]
    lines = [(str(line.get_label()), *map(list, line.get_data())) for line in panel.lines]
    return {
        "labels": (panel.get_xlabel(), panel.get_ylabel()),
        "lines": [line for line in lines if not line[0].startswith("_")],
        "unnamed": [line[1:] for line in lines if line[0].startswith("_")],
        "bands": [band.get_paths()[0].vertices for band in panel.collections],
        "bars": [(b.get_y() + b.get_height() / 2, b.get_width()) for b in panel.patches],
        "means": [
            c.lines[0].get_data() for c in panel.containers if isinstance(c, ErrorbarContainer)
        ],
        "rows": [tick.get_text() for tick in panel.get_yticklabels()],
        "columns": [tick.get_text() for tick in panel.get_xticklabels()],
        "legend": [text.get_text() for legend in figure.legends for text in legend.get_texts()],
        "images": [image.get_array() for image in panel.images],
        "texts": {(text.get_position(), text.get_text()) for text in panel.texts},
    }


@pytest.fixture
def drawn(monkeypatch):
    """A function from a folder to the contents of the pictures in a report on it."""
    panels = []
    monkeypatch.setattr(figures, "_as_svg", lambda figure: panels.append(contents(figure)) or "")

    def draw(folder):
        panels.clear()
        render.report([folder], folder / "out")
        return panels

    return draw


def column(folder, name):
    """A column of a metrics.csv, read without the report's own readers."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def labelled(panels, *labels):
    (panel,) = [panel for panel in panels if panel["labels"] == labels]
    return panel


def test_curves_show_the_metrics(tmp_path, drawn):
    for seed in (0, 1):
        make_run(tmp_path / f"p{seed}", 70.0 + seed, seed, epochs=4)
        make_run(tmp_path / f"a{seed}", 72.0 + 3 * seed, seed, "aa", epochs=4)
    panels = drawn(tmp_path)
    for name, label in (
        ("test/top1", "top-1 accuracy (%)"),
        ("train/loss", "training loss (nats)"),
    ):
        panel = labelled(panels, "epoch", label)
        assert panel["legend"] == ["plain (n=2)", "AA (n=2)"]
        for (line, x, y), letter, band in zip(panel["lines"], "pa", panel["bands"], strict=True):
            assert line == {"p": "plain (n=2)", "a": "AA (n=2)"}[letter]
            seeds = [column(tmp_path / f"{letter}{seed}", name) for seed in (0, 1)]
            assert x == [1, 2, 3, 4]
            assert y == pytest.approx([(a + b) / 2 for a, b in zip(*seeds, strict=True)])
            edges = {(i + 1, round(value, 9)) for s in seeds for i, value in enumerate(s)}
            assert {(int(a), round(b, 9)) for a, b in band} == edges
    panel = labelled(panels, "training time (minutes)", "top-1 accuracy (%)")
    for (_, x, y), letter, minutes in zip(panel["lines"], "pa", (0.2, 0.25), strict=True):
        assert x == pytest.approx([minutes * epoch for epoch in (1, 2, 3, 4)])
        seeds = [column(tmp_path / f"{letter}{seed}", "test/top1") for seed in (0, 1)]
        assert y == pytest.approx([(a + b) / 2 for a, b in zip(*seeds, strict=True)])
    panel = labelled(panels, "epoch", "top-1 minus plain (points)")
    ((line, x, y),) = panel["lines"]
    gains = []
    for seed in (0, 1):
        ours, theirs = (column(tmp_path / f"{name}{seed}", "test/top1") for name in "ap")
        gains.append([a - b for a, b in zip(ours, theirs, strict=True)])
    assert (line, x) == ("AA (n=2)", [1, 2, 3, 4])
    assert y == pytest.approx([(a + b) / 2 for a, b in zip(*gains, strict=True)])
    assert y[-1] == pytest.approx(3.0)
    assert panel["unnamed"] == [([0, 1], [0, 0])]


def test_gains_are_drawn_only_where_the_epochs_agree(tmp_path, drawn):
    make_run(tmp_path / "p", 70.0, epochs=4)
    make_run(tmp_path / "a", 72.0, attention="aa", epochs=5)
    panels = drawn(tmp_path)
    assert [p for p in panels if p["labels"] == ("top-1 minus plain (points)", "")]
    assert not [p for p in panels if p["labels"] == ("epoch", "top-1 minus plain (points)")]


def test_differences_and_costs_are_drawn_at_their_variants(tmp_path, drawn):
    for seed in (0, 1):
        make_run(tmp_path / f"p{seed}", 70.0, seed)
        make_run(tmp_path / f"s{seed}", 69.0 + seed / 2, seed, "se")
        make_run(tmp_path / f"a{seed}", 72.0 + seed, seed, "aa")
    panels = drawn(tmp_path)
    panel = labelled(panels, "top-1 minus plain (points)", "")
    # From bottom to top; of each the pairs, the interval and the mean.
    assert panel["rows"] == ["SE (n=2)", "AA (n=2)"]
    _zero, *marks = panel["unnamed"]
    for y, pairs in enumerate([(-1.0, -0.5), (2.0, 3.0)]):
        shown, bar, diamond = marks[3 * y : 3 * y + 3]
        mean, half = sum(pairs) / 2, 12.7062047 * abs(pairs[1] - pairs[0]) / 2
        assert shown == (pytest.approx(list(pairs)), [y, y])
        assert bar == (pytest.approx([mean - half, mean + half]), [y, y])
        assert diamond == (pytest.approx([mean]), [y])
    panel = labelled(panels, "GFLOPs of the forward pass, one image", "top-1 accuracy (%)")
    assert panel["legend"] == ["plain (n=2)", "SE (n=2)", "AA (n=2)"]
    points = [(float(x[0]), float(y[0])) for x, y in panel["means"]]
    assert points == [
        pytest.approx((0.776, 70.0)),
        pytest.approx((0.777, 69.25)),
        pytest.approx((1.11, 72.5)),
    ]


def test_a_heatmap_has_its_cells_where_the_axes_say(tmp_path, drawn):
    scores = {(8, 4): 60.0, (8, 12): 61.0, (16, 4): 62.0}
    for (dk, dv), top1 in scores.items():
        settings = {"attention__dk": dk, "attention__dv": dv, "attention__Nh": 2}
        make_run(tmp_path / f"{dk},{dv}", top1, 0, "aa", **settings)
    panel = labelled(drawn(tmp_path), "dv", "dk")
    (image,) = panel["images"]
    assert (panel["rows"], panel["columns"]) == (["8", "16"], ["4", "12"])
    for (dk, dv), top1 in scores.items():
        row, place = panel["rows"].index(str(dk)), panel["columns"].index(str(dv))
        assert image[row][place] == top1
        assert ((place, row), f"{top1:.2f}\nn=1") in panel["texts"]
    assert image.mask.tolist() == [[False, False], [False, True]]


def test_classes_are_drawn_in_order_with_their_pairs(tmp_path, drawn):
    def by_class(*values):
        return {"per_class_top1": [*values], "class_names": ["x", "up_high", "down"]}

    make_run(tmp_path / "p", 70.0, facts=by_class(50, 50, 50))
    make_run(tmp_path / "a", 71.0, attention="aa", facts=by_class(51, 60, 47))
    panel = labelled(drawn(tmp_path), "AA minus plain, top-1 (percentage points)", "")
    assert panel["rows"] == ["down", "x", "up high"]
    assert panel["bars"] == [(0, -3), (1, 1), (2, 10)]


def test_the_card_shows_the_scores_that_it_compares(tmp_path):
    """Of the seeds that both have, so that they differ by the number above them."""
    for seed, top1 in enumerate((70.0, 71.0, 40.0)):
        make_run(tmp_path / f"p{seed}", top1, seed)
    for seed, top1 in enumerate((72.0, 73.5)):
        make_run(tmp_path / f"a{seed}", top1, seed, "aa")
    (card,) = page.cards(paired.compare_with_plain(variants_of(tmp_path)))
    assert card.number == "+2.25"
    assert "72.75 % vs. 70.50 %" in card.details


def test_costs_and_shared_settings_in_the_tables(tmp_path):
    make_run(tmp_path / "p", 70.0)
    make_run(tmp_path / "a", 71.0, attention="aa", batch_size=128)
    render.report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| plain | 1 | 0.60 | 0.776 | 70.00 |" in whole  # 3 epochs of 12 seconds
    assert "| AA | 1 | 0.75 | 1.11 | 71.00 |" in whole
    shared = whole[whole.index("settings that all variants share") :]
    assert "| epochs | 3 |" in shared
    assert "| batch_size |" not in shared
    assert "model.aa" not in shared


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
    written = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = Page(written)
    assert found.open == []
    assert not [tag for tag, _ in found.tags if tag in ("script", "iframe", "object")]
    links = [a[k] for _, a in found.tags for k in ("src", "href") if k in a]
    assert len(links) > 6
    assert all(link.startswith("data:") for link in links)
    assert "url(" not in written
    assert "@import" not in written
    pictures = [a for tag, a in found.tags if tag == "img"]
    assert all(len(a["alt"]) > 20 for a in pictures)
    names = re.findall(
        r"!\[.*\]\((.+)\)", (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    )
    for name, picture in zip(names, pictures, strict=True):
        svg = base64.b64decode(picture["src"].partition(",")[2])
        assert svg == (tmp_path / "out" / name).read_bytes()
        assert svg.lstrip().startswith(b"<?xml")
    assert "sweep1-Nh2.svg" in names


@pytest.mark.slow
def test_the_same_runs_give_the_same_bytes(tmp_path, pictures):
    sweep(tmp_path / "runs")
    for name in "ab":
        render.report([tmp_path / "runs"], tmp_path / name)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / n).iterdir()} for n in "ab")
    assert first == second


def test_a_sweep_is_counted_and_drawn_by_cell(tmp_path, monkeypatch):
    sweep(tmp_path)
    variants = variants_of(tmp_path)
    drawn = []
    monkeypatch.setattr(page.figures, "heatmap", lambda *given: drawn.append(given) or "<svg/>")
    section = page.sweep_section(variants)
    assert [picture.name for picture in section.pictures] == ["sweep1-Nh2", "sweep1-Nh4"]
    (two, low, high, title), four = drawn
    assert title == "wrn16_4, Nh = 2"
    assert len(two) == 6
    assert four[0]["16", "12"] == (pytest.approx(60 + 1.6 + 0.12 + 0.004 + 0.62), 2)
    assert (low, high) == four[1:3]
    assert low == pytest.approx(60 + 0.8 + 0.04 + 0.002 + 0.54)
    assert high == four[0]["16", "12"][0]
    head, *_ = page.cards(paired.nearest(paired.compare_with_plain(variants)))
    assert head.title.startswith("12 augmented variants")
    # Differences by seed: dk / 10 + dv / 100 + heads / 1000, and dv / 50 more at seed 1. With one
    # degree of freedom t must pass 12.7: only a mean above 6.35 * dv / 50 would do.
    decided = {
        (dk, dv, heads)
        for dk in (8, 16) for dv in (4, 8, 12) for heads in (2, 4)
        if dk / 10 + dv / 100 + heads / 1000 + dv / 100 > 12.7062 * dv / 100
    }  # fmt: skip
    assert 0 < len(decided) < 12
    assert head.number == f"{len(decided)} better, 0 worse"
    assert head.unit == f"and {12 - len(decided)} undecided"
    assert "12 of them have at least two pairs" in head.details[0]
    assert "about 0.6 of 12 would exclude zero" in head.details[1]
    assert head.verdict == "Mean differences in top-1 range from +0.88 to +1.84 percentage points."


def test_classes_are_compared_by_pair(tmp_path):
    def by_class(*values):
        return {"per_class_top1": [*values, None], "class_names": ["a", "b", "c"]}

    make_run(tmp_path / "p0", 70.0, 0, facts=by_class(10, 20))
    make_run(tmp_path / "p1", 71.0, 1, facts=by_class(30, 40))
    make_run(tmp_path / "a0", 70.0, 0, "aa", facts=by_class(15, 10))
    make_run(tmp_path / "a1", 72.0, 1, "aa", facts=by_class(33, 38))
    section = page.classes_section(paired.compare_with_plain(variants_of(tmp_path)))
    assert section.folded[1].rows == [  # t = 4 and -1.5 with one degree of freedom
        ["a", "+4.00", "+5.00, +3.00", "0.31"],
        ["b", f"{MINUS}6.00", f"{MINUS}10.00, {MINUS}2.00", "0.37"],
    ]


@pytest.mark.parametrize("attention", ["none", "aa"])
def test_one_run_alone_has_a_page(tmp_path, pictures, attention):
    make_run(tmp_path / "a", 70.0, 0, attention, epochs=1)
    written = render.report([tmp_path], tmp_path / "out")
    assert "There are no finished runs of both a plain network and one with attention." in written


@pytest.mark.slow
def test_two_hundred_runs(tmp_path, pictures):
    """All of them are on the page: 64 augmented variants and two plain ones, three seeds each."""
    for number in range(66):
        for seed in range(3):
            attention = "aa" if number < 64 else "none"
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
    written = render.report([tmp_path], tmp_path / "out")
    assert "198 finished runs of 66 variants" in written
    assert "2 folders excluded" in written
    assert written.count("\n| AA ") == 64
    assert len([*(tmp_path / "out").glob("*.svg")]) == 11
    assert (tmp_path / "out" / "report.html").stat().st_size < 3e6


def test_colours_of_few_and_of_many(tmp_path):
    make_run(tmp_path / "p", 70.0, epochs=4)
    make_run(tmp_path / "q0", 60.0, 0)
    make_run(tmp_path / "q1", 60.0, 1)
    make_run(tmp_path / "se", 71.0, attention="se")
    make_run(tmp_path / "aa", 71.0, attention="aa")
    few = {one.label: colour for one, colour in figures.colours(variants_of(tmp_path)).items()}
    assert few["plain epochs=3"] == figures.PLAIN
    assert few["AA"] == figures.COLOURS[0]
    assert len(set(few.values())) == 4
    for dk in range(10, 20):
        make_run(tmp_path / f"{dk}", 70.0 + dk, attention="aa", attention__dk=dk)
    many = {one.label: colour for one, colour in figures.colours(variants_of(tmp_path)).items()}
    hued = [label for label, colour in many.items() if colour in figures.COLOURS]
    assert hued == [f"AA dk={dk}" for dk in (16, 17, 18, 19)]
    assert many["plain epochs=3"] == figures.PLAIN
    assert many["plain epochs=4"] == figures.OTHERS


# ---- Names from outside -------------------------------------------------------------------------


def of_markdown(line):
    """What a reader sees of a line of Markdown in which everything is escaped."""
    assert not re.search(r"(?<!\\)(?:\\\\)*[`*\[\]~$<>|]", line), line
    assert not re.search(r"://|www\.|^(#|[-+=]+|\d+[.)])( |$)", line), line
    for underscore in re.finditer(r"(?<!\\)_", line):
        around = line[underscore.start() - 1 : underscore.end() + 1]
        assert re.fullmatch(r"[A-Za-z0-9]_[A-Za-z0-9]", around), line
    return html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", line))


@pytest.mark.parametrize("name", [*NASTY, "- item", "+", "1. item", "12)", "# head", "---", "==="])
def test_markdown_shows_a_name_as_it_is(name):
    line = text.markdown(name)
    assert of_markdown(line) == text.one_line(name)
    assert not re.search(r"[\x00-\x1f\x7f\u202a-\u202e\ud800-\udfff]", line)
    # Ordinary names and numbers are left alone.
    for plain in ("wrn16_4", "AA dk=0.2 optim.lr=0.1", "73.00 ± 2.65", "+1.62", "2.5", "a - b, c."):
        assert text.markdown(plain) == plain


def test_bytes_of_another_locale_are_read_as_utf_8():
    assert text.printable("Gr\udcc3\udcb6\udcc3\udc9fe \udcff\ud800") == r"Größe \xff\ud800"


def test_names_are_text_in_both_files(tmp_path, pictures):
    nasty_runs(tmp_path / "runs")
    console = render.report([tmp_path / "runs"], tmp_path / "out")
    assert "\x1b" not in console
    console.encode()
    written = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    found = Page(written)
    assert found.open == []
    allowed = "html head meta link title style body main h1 h2 h3 p section div article span ul li"
    allowed += " strong figure img figcaption table thead tbody tr th td caption details summary"
    assert {tag for tag, _ in found.tags} <= set(allowed.split())
    assert not any("onerror" in attributes for _, attributes in found.tags)
    assert "{{ title }}{% raw %}" in written
    markdown = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    own = {"<details>", "</details>", "<summary>", "</summary>"}
    assert set(re.findall(r"<[^>\n]*>", markdown)) == own
    width = None
    for line in markdown.splitlines():
        assert re.fullmatch(r"#{1,2} [A-Z].*", line) or not line.startswith("#")
        if not line.startswith("|"):
            width = None
            continue
        cells = line[2:-2].split(" | ") if not line.startswith("|--") else line[1:-1].split("|")
        width = width or len(cells)
        assert len(cells) == width, line
        if not line.startswith("|--"):
            for cell in cells:
                of_markdown(cell)


# ---- Where it is written ------------------------------------------------------------------------


def run_report(arguments, prefix="", **environment):
    """scripts/report.py in a shell of its own: exit code, standard output and error as bytes."""
    script = f'{prefix} exec "$0" "$@"'
    command = ["bash", "-c", script, sys.executable, str(ROOT / "scripts" / "report.py")]
    return subprocess.run(
        [*command, *map(os.fsencode, arguments)],
        capture_output=True,
        env=os.environ | environment,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
def test_utf_8_whatever_the_locale_says(tmp_path):
    """`LC_ALL=C` with what Python does about it switched off: its default is then ASCII."""
    names = ["Äpfel", "大きさ", "ñ"]
    root = tmp_path / "Läufe"
    for seed in (0, 1):
        make_run(root / f"p{seed}", 70.0, seed, classes=names, data__name="größe")
        make_run(root / f"ä{seed}", 71.0 + seed, seed, "aa", classes=names, data__name="größe")
    make_run(root / "unfertig ü", 1.0, 2, finished=False)
    make_run(Path(os.fsdecode(os.fsencode(root) + b"/\xff")) / "x", 1.0, 2, finished=False)
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run_report([root, "--data", "größe"], **locale)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    assert f"written: {root}/report.html" in done.stdout.decode()
    assert "on größe, evaluated" in done.stdout.decode()
    for name in ("report.md", "report.html"):
        written = (root / name).read_text(encoding="utf-8")
        assert all(word in written for word in [*names, f"{root}/unfertig ü", "±", MINUS])
        assert ("/\\xff/x" if name.endswith("html") else "/\\\\xff/x") in written


def test_a_full_disk_leaves_the_report_that_was_there(tmp_path, monkeypatch):
    make_run(tmp_path / "p", 70.0)
    render.report([tmp_path], tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    make_run(tmp_path / "a", 71.0, attention="aa")
    written = len(before) + 2  # with the pictures of a comparison
    for number in range(written):
        left = iter([True] * number + [False])

        def fsync(handle, left=left):
            if not next(left, True):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"cannot be written \(No space left on device\)"):
            render.report([tmp_path], tmp_path / "out")
        after = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert after == before
    monkeypatch.undo()


@pytest.mark.slow
def test_an_error_is_utf_8_too(tmp_path):
    done = run_report([tmp_path / "fehlt ß"], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.returncode == 1
    assert done.stderr.decode() == f"report.py: there is no {tmp_path}/fehlt ß\n"


@pytest.mark.slow
def test_the_command_on_a_full_disk(tmp_path):
    make_run(tmp_path / "p", 70.0)
    assert run_report([tmp_path]).returncode == 0
    before = {path.name: path.read_bytes() for path in tmp_path.glob("report*")}
    make_run(tmp_path / "a", 71.0, attention="aa")
    done = run_report([tmp_path], prefix="ulimit -f 60;")
    assert done.returncode == 1
    assert re.fullmatch(
        rf"report\.py: {tmp_path}/report\.html cannot be written \(File too large\)\n",
        done.stderr.decode(),
    )
    assert {path.name: path.read_bytes() for path in tmp_path.glob("report*")} == before
    assert not list(tmp_path.glob("*.partial"))
