"""The report's pictures and tables: their contents, read back from the figures."""

import csv

import matplotlib
import pytest
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.text import Text

from reporting import figures, page

from folders import NASTY, analysis_of, make_run, report

pytestmark = pytest.mark.usefixtures("sketches")


def contents(figure):
    """Return what a figure's panel shows, as plain values."""
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
    """A function that returns the contents of the pictures in a report on a folder."""
    panels = []
    monkeypatch.setattr(figures, "as_svg", lambda figure: panels.append(contents(figure)) or "")

    def draw(folder):
        panels.clear()
        report([folder], folder / "out")
        return panels

    return draw


def column(folder, name):
    """Return a column of a metrics.csv, read independently of the report's readers."""
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file)]


def labeled(panels, *labels):
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
        ("train/top1", "training top-1 accuracy (%)"),
        ("train/other", "training other"),
    ):
        panel = labeled(panels, "epoch", label)
        assert panel["legend"] == ["plain (n=2)", "AA (n=2)"]
        for (line, x, y), letter, band in zip(panel["lines"], "pa", panel["bands"], strict=True):
            assert line == {"p": "plain (n=2)", "a": "AA (n=2)"}[letter]
            seeds = [column(tmp_path / f"{letter}{seed}", name) for seed in (0, 1)]
            assert x == [1, 2, 3, 4]
            assert y == pytest.approx([(a + b) / 2 for a, b in zip(*seeds, strict=True)])
            edges = {(i + 1, round(value, 9)) for s in seeds for i, value in enumerate(s)}
            assert {(int(a), round(b, 9)) for a, b in band} == edges
    panel = labeled(panels, "epoch", "entropy of attention")
    ((line, _, y),) = panel["lines"]
    assert (line, y) == ("AA (n=2)", pytest.approx([0.5 + 0.05 / epoch for epoch in (1, 2, 3, 4)]))
    panel = labeled(panels, "training time (minutes)", "top-1 accuracy (%)")
    for (_, x, y), letter, minutes in zip(panel["lines"], "pa", (0.2, 0.25), strict=True):
        assert x == pytest.approx([minutes * epoch for epoch in (1, 2, 3, 4)])
        seeds = [column(tmp_path / f"{letter}{seed}", "test/top1") for seed in (0, 1)]
        assert y == pytest.approx([(a + b) / 2 for a, b in zip(*seeds, strict=True)])
    panel = labeled(panels, "epoch", "top-1 minus plain (points)")
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
    panel = labeled(panels, "top-1 minus plain (points)", "")
    # Rows from bottom to top, each with its pairs, interval and mean.
    assert panel["rows"] == ["SE (n=2)", "AA (n=2)"]
    _zero, *marks = panel["unnamed"]
    for y, pairs in enumerate([(-1.0, -0.5), (2.0, 3.0)]):
        shown, bar, diamond = marks[3 * y : 3 * y + 3]
        mean, half = sum(pairs) / 2, 12.7062047 * abs(pairs[1] - pairs[0]) / 2
        assert shown == (pytest.approx(list(pairs)), [y, y])
        assert bar == (pytest.approx([mean - half, mean + half]), [y, y])
        assert diamond == (pytest.approx([mean]), [y])
    panel = labeled(panels, "GFLOPs of the forward pass, one image", "top-1 accuracy (%)")
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
    panel = labeled(drawn(tmp_path), "dv", "dk")
    (image,) = panel["images"]
    assert (panel["rows"], panel["columns"]) == (["8", "16"], ["4", "12"])
    for (dk, dv), top1 in scores.items():
        row, place = panel["rows"].index(str(dk)), panel["columns"].index(str(dv))
        assert image[row][place] == top1
        assert ((place, row), f"{top1:.2f}\nn=1") in panel["texts"]
    assert image.mask.tolist() == [[False, False], [False, True]]


def test_a_heatmap_of_values_of_any_kind_is_drawn():
    cells = {(0, column): (70.0 + column, 1) for column in range(2)}
    figure = figures.heatmaps({"": cells}, ("dk", [" ".join(NASTY)]), ("dv", ["\x00", "\ud800"]))
    assert b"<svg" in figures._save(figure, format="svg")


def test_classes_are_drawn_in_order_with_their_pairs(tmp_path, drawn):
    def by_class(*values):
        return {"per_class_top1": [*values], "class_names": ["x", "up_high", "down"]}

    make_run(tmp_path / "p", 70.0, facts=by_class(50, 50, 50))
    make_run(tmp_path / "a", 71.0, attention="aa", facts=by_class(51, 60, 47))
    panel = labeled(drawn(tmp_path), "AA minus plain, top-1 (percentage points)", "")
    assert panel["rows"] == ["down", "x", "up high"]
    assert panel["bars"] == [(0, -3), (1, 1), (2, 10)]


def test_the_card_shows_the_scores_that_it_compares(tmp_path):
    """They are means over common seeds, so that their difference is the number above them."""
    for seed, top1 in enumerate((70.0, 71.0, 40.0)):
        make_run(tmp_path / f"p{seed}", top1, seed)
    for seed, top1 in enumerate((72.0, 73.5)):
        make_run(tmp_path / f"a{seed}", top1, seed, "aa")
    (card,) = page.cards(analysis_of(tmp_path).comparisons)
    assert card.number == "+2.25"
    assert "72.75 % vs. 70.50 %" in card.details


def test_costs_and_shared_settings_in_the_tables(tmp_path):
    make_run(tmp_path / "p", 70.0)
    make_run(tmp_path / "a", 71.0, attention="aa", batch_size=128)
    report([tmp_path], tmp_path / "out")
    whole = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "| plain | 1 | 0.60 | 0.776 | 70.00 |" in whole  # 3 epochs of 12 seconds
    assert "| AA | 1 | 0.75 | 1.11 | 71.00 |" in whole
    shared = whole[whole.index("settings that all variants share") :]
    assert "| epochs | 3 |" in shared
    assert "| batch_size |" not in shared
    assert "model.aa" not in shared


# ---- Names in any script ------------------------------------------------------------------------


def words_of(figure):
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def test_letters_that_no_font_has_are_said_in_the_picture(monkeypatch):
    names = ["猫", "कुत्ता", "قطة", "plain"]
    figure = figures.confusion([[1] * 4] * 4, names)
    fonts = [font for font in font_manager.fontManager.ttflist if font.name == "DejaVu Sans"]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    assert b"<svg" in figures._save(figure, format="svg")
    assert "boxes: no font here has CJK, DEVANAGARI" in words_of(figure)
    figure = figures.confusion([[1] * 2] * 2, ["Café", "собака"])
    figures._save(figure, format="svg")
    assert not any("boxes" in words for words in words_of(figure))


def test_another_font_that_is_installed_draws_what_the_first_one_lacks():
    # cmr10 has no Cyrillic letters, and matplotlib warns when it draws minus signs with it.
    with matplotlib.rc_context({"font.family": "cmr10", "axes.formatter.use_mathtext": True}):
        figure = figures.confusion([[1] * 2] * 2, ["собака", "кошка"])
        lone = figures._drawn(figure, {"format": "svg"})
        assert lone[1] == set("собаккошка")
        drawn = figures._save(figure, format="svg")
    assert drawn != lone[0]
    assert figures._drawn(figure, {"format": "svg"})[1] == set()
    assert not any("boxes" in words for words in words_of(figure))


@pytest.mark.parametrize("names", [1, 2, 5, 9])
@pytest.mark.parametrize("letters", ["W" * 17, "i" * 37, "W" * 31, "aa dk=16 dv=8 Nh=2"])
def test_a_legend_is_as_wide_as_its_picture(names, letters, recwarn):
    with figures.style():
        figure, panel = figures.one_panel()
        for number in range(names):
            panel.plot([1, 2], [number, 3], label=f"{number} {letters}")
        figures.add_legend(figure, panel, {})
        (legend,) = figure.legends
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        box = legend.get_window_extent(canvas.get_renderer())
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert box.y1 <= figure.bbox.height
    assert len(legend.get_texts()) == names
    assert not recwarn.list
