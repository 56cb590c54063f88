"""scripts/distance.py: accuracy over the distance, as a table and a picture."""

import itertools

import pytest

from benchmarks.lookup_bound import ceiling
from reporting import distance as reported
from reporting import figures
from scripts import distance
from scripts.distance import draw

from folders import failed, make_run
from helpers import call, refused

LIMIT = 100 * float(ceiling())
DEPTHS = {"resnet8": [1, 1, 1], "resnet14": [2, 2, 2]}


def run(folder, model, attention, pixels, seed, top1, **change):
    """Make a run of the built-in task in its own folder."""
    settings = {
        "model__name": model,
        "model__depths": DEPTHS[model],
        "model__block": "basic",
        "model__widths": [16, 32, 64],
        "model__stem": 16,
        "model__shortcut": "subsample",
        "data": {"_target_": "data.make_lookup", "distance": pixels, "name": "lookup"},
    }
    place = folder / f"{model}-{attention}-{pixels}-{seed}"
    return make_run(place, top1, seed, attention, **(settings | change))


@pytest.fixture
def folder(tmp_path):
    """Two networks at two distances, plain and augmented; one of these has two seeds."""
    for model, attention, pixels in itertools.product(DEPTHS, ("none", "aa"), (20, 5)):
        run(tmp_path / "runs", model, attention, pixels, 0, 90.0 - pixels - len(attention))
    run(tmp_path / "runs", "resnet8", "none", 5, 1, 77.5)
    return tmp_path / "runs"


@pytest.fixture
def panels(monkeypatch):
    """A list of the panels that get drawn."""
    seen = []
    monkeypatch.setattr(figures, "as_svg", lambda figure: seen.append(figure.axes[0]) or "")
    return seen


def test_the_table_has_every_network_and_distance_in_order(folder, tmp_path, capsys):
    call(distance.main, folder, "--out", tmp_path / "out" / "x.svg")
    said = capsys.readouterr().out.splitlines()
    assert said[0].split("  ")[0] == "network"
    rows = [line.split() for line in said[1:-1]]
    # ResNet-8 has a receptive field of 25, ResNet-14 of 53.
    assert rows == [
        ["resnet8", "plain", "5", "5/25", "=", "0.20", "2", "79.25", "0:", "81.00,", "1:", "77.50"],
        ["resnet8", "plain", "20", "20/25", "=", "0.80", "1", "66.00", "0:", "66.00"],
        ["resnet8", "AA", "5", "5/25", "=", "0.20", "1", "83.00", "0:", "83.00"],
        ["resnet8", "AA", "20", "20/25", "=", "0.80", "1", "68.00", "0:", "68.00"],
        ["resnet14", "plain", "5", "5/53", "=", "0.09", "1", "81.00", "0:", "81.00"],
        ["resnet14", "plain", "20", "20/53", "=", "0.38", "1", "66.00", "0:", "66.00"],
        ["resnet14", "AA", "5", "5/53", "=", "0.09", "1", "83.00", "0:", "83.00"],
        ["resnet14", "AA", "20", "20/53", "=", "0.38", "1", "68.00", "0:", "68.00"],
    ]
    assert said[-1] == f"written: {tmp_path / 'out' / 'x.svg'}"


def test_the_picture_has_a_line_for_each_network_and_a_dot_for_each_seed(folder, tmp_path, panels):
    draw([folder], tmp_path / "x.svg")
    (panel,) = panels
    lines = [line for line in panel.lines if not line.get_label().startswith("_")]
    shown = [
        (line.get_label(), line.get_linestyle(), *map(list, line.get_data())) for line in lines
    ]
    assert shown == [
        ("resnet8 plain", "--", [5 / 25, 20 / 25], [79.25, 66.0]),
        ("resnet8 AA (n=1)", "-", [5 / 25, 20 / 25], [83.0, 68.0]),
        ("resnet14 plain (n=1)", "--", [5 / 53, 20 / 53], [81.0, 66.0]),
        ("resnet14 AA (n=1)", "-", [5 / 53, 20 / 53], [83.0, 68.0]),
    ]
    colors = [line.get_color() for line in lines]
    assert colors[0] == colors[1] != colors[2] == colors[3]
    dots = [list(zip(*d.get_data(), strict=True)) for d in panel.lines if d.get_marker() == "."]
    assert len(dots) == 8
    assert dots[0] == [(0.2, 81.0), (0.2, 77.5)]


def test_kinds_of_attention_may_be_more_than_dashes(folder, tmp_path, panels, monkeypatch):
    monkeypatch.setattr(reported, "DASHES", ["-", ":"])
    draw([folder], tmp_path / "x.svg")
    (panel,) = panels
    lines = [line for line in panel.lines if not line.get_label().startswith("_")]
    assert [line.get_linestyle() for line in lines] == ["-", ":", "-", ":"]


def test_chance_and_the_limit_are_drawn_the_limit_heavily_where_it_is_proven(
    folder, tmp_path, panels
):
    draw([folder], tmp_path / "x.svg")
    (panel,) = panels
    level = [list(line.get_data()[1]) for line in panel.lines if line.get_linestyle() == ":"]
    assert level == [[20, 20], [LIMIT, LIMIT]]
    (proven,) = [line for line in panel.lines if line.get_linewidth() == 2.5]
    assert proven.get_xdata()[0] == 24 / 25
    assert list(proven.get_ydata()) == [LIMIT, LIMIT]
    assert [text.get_text().split(":")[0] for text in panel.texts] == ["20 %", f"{LIMIT:.1f} %"]


def test_the_same_runs_give_the_same_picture(folder, tmp_path):
    draw([folder], tmp_path / "x.svg")
    draw([folder, folder / "resnet8-none-5-1"], tmp_path / "y.svg")
    assert (tmp_path / "x.svg").read_bytes() == (tmp_path / "y.svg").read_bytes()
    assert b"<svg" in (tmp_path / "x.svg").read_bytes()


def test_what_is_left_out_is_named(folder, tmp_path):
    failed(folder / "bad")
    make_run(folder / "cifar")
    run(folder / "corner", "resnet8", "none", None, 0, 50.0)
    second = run(folder / "second", "resnet8", "none", 5, 1, 1.0)
    said = draw([folder], tmp_path / "x.svg")
    assert f"left out, diverged: {folder / 'bad'} (" in said
    assert f"left out, of another data set: {folder / 'cifar'} (cifar100 test, no distance)" in said
    assert f"{folder / 'corner' / 'resnet8-none-None-0'} (lookup test, no distance)" in said
    assert f"left out, duplicate: {second} (seed 1 of the same settings is in " in said
    assert "0: 81.00, 1: 77.50\n" in said


@pytest.mark.parametrize(
    ("attention", "change", "message"),
    [
        ("none", {"epochs": 5}, "runs of resnet8 differ in epochs, which no curve may mix"),
        ("aa", {"attention__dk": 7}, "runs of resnet8 AA differ in attention.dk, which"),
    ],
)
def test_runs_that_differ_in_more_are_refused(folder, tmp_path, attention, change, message):
    run(folder / "more", "resnet8", attention, 12, 0, 50.0, **change)
    with pytest.raises(ValueError, match=message):
        draw([folder], tmp_path / "x.svg")
    assert not (tmp_path / "x.svg").exists()


def test_a_network_that_cannot_be_rebuilt_is_named(tmp_path):
    data = {"_target_": "data.make_lookup", "distance": 4, "name": "lookup"}
    make_run(tmp_path / "old", data=data)
    with pytest.raises(ValueError, match=r"old: its settings lack model\.block$"):
        draw([tmp_path], tmp_path / "x.svg")


@pytest.mark.parametrize(
    ("runs", "out", "message"),
    [
        ("nowhere", "x.svg", "there is no nowhere"),
        ("runs", "x.png", "--out x.png: the picture is an SVG file"),
        ("runs", "x.svg", "none of 1 finished run is of data=lookup with a data.distance"),
    ],
)
def test_mistakes_are_one_line_and_code_2(tmp_path, monkeypatch, capsys, runs, out, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "runs")
    line = refused(capsys, distance.main, runs, "--out", out)
    assert line.startswith(f"distance.py: {message}")
    assert not (tmp_path / out).exists()
