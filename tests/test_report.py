"""The report: which runs are counted, how they are grouped, and what is concluded."""

import math

import pytest
import torch

from models import augmented_layers, count_flops, count_parameters
from reporting import page, paired, paper, runs, text
from reporting.text import MINUS
from scripts import report as report_command
from training.compose import compose_config
from training.settings import build_model

from folders import analysis_of, failed, make_run, report, segment, variants_of
from helpers import call, refused

pytestmark = pytest.mark.usefixtures("sketches")


# ---- What is counted ----------------------------------------------------------------------------


def test_a_setting_that_came_later_keeps_older_runs_together_with_new_ones(tmp_path):
    make_run(tmp_path / "old", 70.0, 0)
    for name, strided in (("new", False), ("other", True)):
        make_run(tmp_path / name, 71.0, 1, model__strided_stem=strided)
    assert sorted(len(variant.runs) for variant in variants_of(tmp_path)) == [1, 2]


def test_mean_and_deviation_over_the_seeds(tmp_path):
    for seed, top1 in enumerate((70.0, 74.0, 75.0)):
        make_run(tmp_path / f"aa/seed={seed}", top1, seed, "aa")
    make_run(tmp_path / "none/seed=0", 20.0)
    written = report([tmp_path], tmp_path / "out")
    # mean 73; deviations -3, 1, 2; variance 14 / 2
    row = (
        "| AA | 3 | 73.00 ± 2.65 | 93.00 ± 2.65 | 2,700,000 | 1.11 | 0: 70.00, 1: 74.00, 2: 75.00 |"
    )
    assert row in written
    assert "| plain | 1 | 20.00 | 40.00 | 2,750,000 | 0.776 | 0: 20.00 |" in written
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
    (make_run(tmp_path / "l", 1.0, 10) / "summary.json").write_text("{}")
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
    # f has the same settings and seed as none/seed=1, and comes before it.
    assert [(r.folder.name, r.seed) for r in variants[0].runs] == [("seed=0", 0), ("f", 1)]
    excluded += others + duplicates
    assert {one.folder.name: (one.kind, one.why) for one in excluded} == {
        "a": ("unfinished", "3 epochs"),
        "b": ("diverged", "the loss is not finite at epoch 2"),
        "c": ("diverged", "test/loss is nan in summary.json"),
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
        "l": ("unreadable", "summary.json: format is 1; this version reads format 3"),
        "seed=1": ("duplicate", f"seed 1 of the same settings is in {tmp_path / 'f'}"),
    }
    report([tmp_path], tmp_path / "out")
    for name in ("report.md", "report.html"):
        written = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert all(str(tmp_path / folder) in written for folder in "abcdeghijkl")
        assert (
            "4 diverged, 2 unfinished, 2 of another data set, 1 duplicate, 3 unreadable" in written
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
    assert "| plain | 2 |" in report([tmp_path], tmp_path / "o")
    assert "90.00" in report([tmp_path], tmp_path / "o", "cifar10")
    with pytest.raises(ValueError, match="--data svhn: no finished run uses it; there are cifar1"):
        report([tmp_path], tmp_path / "o", "svhn")


def test_validation_scores_are_reported_as_such(tmp_path):
    make_run(tmp_path / "a", 70.0, evaluated_on="val", data__val_size=9)
    make_run(tmp_path / "b", 72.0, attention="aa", evaluated_on="val", data__val_size=9)
    head = report([tmp_path], tmp_path / "out")
    words = "evaluated on the validation set, held out from the training images. Network"
    assert f"2 finished runs of 2 variants on CIFAR-100, {words}" in head
    assert "AA vs. plain: +2.00" in head


def test_without_runs_it_says_so_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"^there is no .*nowhere$"):
        report([tmp_path / "nowhere"], tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file is not a folder"):
        report([tmp_path / "file"], tmp_path)
    with pytest.raises(ValueError, match=r"no folder there has a metrics\.csv"):
        report([tmp_path], tmp_path)
    make_run(tmp_path / "a", 1.0, finished=False)
    with pytest.raises(ValueError, match=r"no finished run in .*a unfinished \(3 epochs\)"):
        report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_both_files_and_says_where(tmp_path, capsys):
    make_run(tmp_path / "a")
    call(report_command.main, tmp_path)
    assert f"written: {tmp_path / 'report.html'}" in capsys.readouterr().out
    line = refused(capsys, report_command.main, tmp_path / "x")
    assert line == f"report.py: there is no {tmp_path / 'x'}\n"


# ---- Grouping -----------------------------------------------------------------------------------


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
    make_run(tmp_path / "d", seed=3, model__aa={"dk": 0.3})  # only the default of attention.dk
    assert [len(variant.runs) for variant in variants_of(tmp_path)] == [3]
    make_run(tmp_path / "c", seed=2, label_smoothing=0.1)
    assert sorted(len(variant.runs) for variant in variants_of(tmp_path)) == [1, 3]


def test_a_setting_that_is_missing_or_of_another_type_parts_runs(tmp_path):
    make_run(tmp_path / "a", attention="aa", attention__dk=1)
    make_run(tmp_path / "b", attention="aa", attention__dk=1.0)
    make_run(tmp_path / "c", attention="aa", attention__dk=1, grad_clip=None)
    assert {variant.label for variant in variants_of(tmp_path)} == {
        "AA dk=1 grad_clip=not set",
        "AA dk=1.0 grad_clip=not set",
        "AA dk=1 grad_clip=null",
    }


def test_values_that_are_written_alike_are_one_variant(tmp_path):
    """No label could distinguish them."""
    for seed, dk in enumerate((None, "null", "null")):
        make_run(tmp_path / f"{seed}", 70.0, seed, "aa", attention__dk=dk)
    (variant,) = variants_of(tmp_path)
    assert len(variant.runs) == 3


def test_runs_behind_links_are_found_and_none_is_counted_twice(tmp_path):
    make_run(tmp_path / "elsewhere" / "a", seed=0)
    make_run(tmp_path / "here" / "b", seed=1)
    (tmp_path / "here" / "a").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "here" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "here" / "up").symlink_to(tmp_path / "here")
    assert [len(variant.runs) for variant in variants_of(tmp_path / "here")] == [2]


# ---- Provenance ---------------------------------------------------------------------------------


def test_mixed_commits_and_hardware_are_noted(tmp_path):
    make_run(tmp_path / "a", seed=0)
    make_run(tmp_path / "b", seed=1, facts={"commit": "f" * 40 + "-dirty", "hardware": "A CPU"})
    head = report([tmp_path], tmp_path / "out")
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
    head = report([tmp_path], tmp_path / "out")
    assert "The variants were trained at different commits (0123456789, ffffffffff)" in head
    assert "The runs of" not in head


def test_a_continued_run_names_all_that_it_was_trained_on(tmp_path):
    other = segment(2, commit="f" * 40, hardware="A CPU", torch="2.14.1", precision="float32")
    make_run(tmp_path / "p")
    make_run(tmp_path / "a", attention="aa", facts={"segments": [segment(), other]})
    make_run(tmp_path / "b", seed=1, facts={"segments": [segment(), segment(3)]})
    head = report([tmp_path], tmp_path / "out")
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
    segments = whole[whole.index("Runs that were continued under different conditions") :]
    assert (
        "| AA | 0 | 1 | 0123456789 | Some GPU | bfloat16 | 2.13.0 | 1 |\n"
        "| AA | 0 | 2 | ffffffffff | A CPU | float32 | 2.14.1 | 1 |\n\n" in segments
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
    # From a table: 4.302653 is the 97.5 % quantile of Student's t with two degrees of freedom.
    assert found.low == pytest.approx(3 - 4.302653 * error, rel=1e-6)
    assert found.high == pytest.approx(3 + 4.302653 * error, rel=1e-6)
    # With two degrees of freedom the distribution is t / sqrt(2 + t^2), in closed form.
    t = 3 / error
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t * t))
    assert found.sign == 0


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
    written = report([tmp_path], tmp_path / "out")
    assert (
        "Caveat: AA and plain were not trained with the same settings: batch_size 256 vs. 1024."
        in written
    )
    assert "other settings differ: batch_size" in written


def test_the_twin_is_the_plain_network_of_the_nearest_recipe(tmp_path):
    """It is not simply the first by label."""
    make_run(tmp_path / "far", 60.0, batch_size=64, optim__lr=0.05)
    make_run(tmp_path / "near", 70.0)
    make_run(tmp_path / "other", 50.0, model__depths=[4, 4, 4])
    make_run(tmp_path / "aa", 71.0, attention="aa")
    analysis = analysis_of(tmp_path)
    comparisons = analysis.comparisons
    assert [c.baseline.runs[0].folder.name for c in comparisons] == ["near", "far"]
    assert [c.top1.mean for c in comparisons] == [pytest.approx(1), pytest.approx(11)]
    assert comparisons[0].differing == {}
    assert comparisons[1].differing == {
        "batch_size": ("256", "64"),
        "optim.lr": ("0.2", "0.05"),
    }
    assert [c.baseline.runs[0].folder.name for c in analysis.nearest] == ["near"]


def test_the_page_says_better_only_where_the_interval_does(tmp_path):
    for seed, (plain, aa, se) in enumerate([(70, 72, 71), (71, 73.1, 69), (70.5, 72.4, 73)]):
        make_run(tmp_path / f"p{seed}", float(plain), seed)
        make_run(tmp_path / f"a{seed}", float(aa), seed, "aa")
        make_run(tmp_path / f"s{seed}", float(se), seed, "se")
    cards = page.cards(analysis_of(tmp_path).comparisons)
    assert [(c.title, c.number, c.tone) for c in cards] == [
        ("AA vs. plain", "+2.00", "better"),
        ("SE vs. plain", "+0.50", "open"),
    ]
    assert cards[0].verdict == "AA is better than plain."
    assert cards[1].verdict == "No significant difference."
    assert "n = 3 pairs of seeds, p < 0.001" in cards[0].details[1]


# ---- Comparison with the paper ------------------------------------------------------------------


def test_the_papers_rows_are_shown_with_ours(tmp_path):
    ours = {"model": "wrn28_10", "parameters": 36_278_324, "flops": 10_430_000_000}
    make_run(tmp_path / "p", 81.0, facts=ours, model__name="wrn28_10")
    make_run(tmp_path / "a", 80.0, attention="aa", facts=ours, model__name="wrn28_10")
    written = report([tmp_path], tmp_path / "out")
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
    assert "attention.dk" not in recipe  # it is the paper's value
    assert "| batch_size | AA" not in recipe


def test_other_networks_are_not_held_against_the_papers_scores(tmp_path):
    make_run(tmp_path / "p", 81.0)
    report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "None of these runs is a Wide-ResNet-28-10 evaluated" in whole
    assert "81.00 / 80.3" not in whole


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention__init": "kaiming", "attention__qk_norm": False}, True),
        ({"attention__init": "kaiming", "attention__qk_norm": True}, False),
        ({"attention__init": "glorot", "attention__qk_norm": False}, False),
        ({"model__block": "preact"}, False),
    ],
)
def test_attention_that_began_nearly_one_hot_is_told(tmp_path, settings, told):
    make_run(tmp_path / "p", 60.0, attention="none")
    make_run(tmp_path / "a", 59.0, attention="aa", **settings)
    report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert ("The attention of AA began nearly one-hot" in whole) is told


def test_the_papers_table_is_of_options_that_there_are():
    assert set(paper.TABLE1) < set(runs.ATTENTIONS)


def test_a_control_of_the_papers_network_has_no_row_in_its_table(tmp_path):
    ours = {"facts": {"model": "wrn28_10"}, "model__name": "wrn28_10"}
    for kind in ("none", "removed"):
        make_run(tmp_path / kind, 81.0, attention=kind, **ours)
    report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    row, *_ = [line for line in whole.splitlines() if line.startswith("| removed | 1 | ")]
    assert row.endswith(4 * f"| {text.DASH} " + "|")


@pytest.mark.slow
def test_our_numbers_in_the_notes_on_the_paper():
    cfg = compose_config(["experiment=table1", "attention=aa"])
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
