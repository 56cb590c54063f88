"""Pictures of attention: models/views.py, scripts/visualize.py, the report's section."""

import json
import re

import pytest
import torch
from PIL import Image
from test_data_folder import write
from test_evaluate import LOOKUP, described
from test_saved import describe, save

import models
from aaconv import attention_maps
from models.views import attention_views
from reporting import attention
from reporting.analysis import analyze
from reporting.sections import attention_section
from scripts import visualize
from training import attention_picture

from helpers import call, refused

AA = models.AA(dk=0.5, dv=0.25, Nh=2, min_dkh=2, position="relative", stages=[2, 3])
BLOCKS = ["stages.1.0.conv1", "stages.2.0.conv1"]


@pytest.fixture
def folder(tmp_path):
    """Untrained networks: two with attention for different images, and a plain one."""
    (tmp_path / "runs").mkdir()
    save(tmp_path / "runs" / "aa=1", described(AA))
    save(tmp_path / "runs" / "plain=1", described(models.NoAttention()))
    save(tmp_path / "runs" / "own", describe(AA))  # for 16x20 images
    write(tmp_path / "photo.jpg", size=(50, 31))
    (tmp_path / "broken.png").write_bytes((tmp_path / "photo.jpg").read_bytes()[:300])
    return tmp_path / "runs"


# ---- Weights ------------------------------------------------------------------------------------


def test_a_view_has_the_layers_weights_at_the_place_of_the_pixel():
    network = models.build(describe(AA).network).train()
    torch.manual_seed(1)
    batch = torch.randn(2, 3, 16, 20)
    views = attention_views(network, batch, [(0, 0), (15, 19), (7, 12)])
    assert network.training
    assert list(views) == BLOCKS
    network.eval()
    for image in range(2):
        x = torch.relu(network.bn_in(network.conv(batch[image : image + 1])))
        x = network.stages[0](x)
        for name, stage, size in zip(BLOCKS, network.stages[1:], [(8, 10), (4, 5)], strict=True):
            view = views[name][image]
            assert view.layer is stage[0].conv1
            assert view.size == size
            assert view.mean is None
            expected = attention_maps(stage[0].conv1, x)[0].unflatten(-1, size)
            places = [(0, 0), (size[0] - 1, size[1] - 1), (7 * size[0] // 16, 12 * size[1] // 20)]
            assert view.queries == places
            for number, (row, column) in enumerate(places):
                torch.testing.assert_close(
                    view.weights[:, number], expected[:, row * size[1] + column]
                )
            x = stage(x)


def test_by_default_the_view_is_from_the_sharpest_position():
    network = models.build(describe(AA).network)
    batch = torch.randn(1, 3, 16, 20)
    (first,) = attention_views(network, batch)[BLOCKS[0]]
    every = [(2 * row, 2 * column) for row in range(8) for column in range(10)]
    (whole,) = attention_views(network, batch, every)[BLOCKS[0]]
    assert whole.queries == [(row, column) for row in range(8) for column in range(10)]
    entropies = [
        -sum(float((w * w.log()).sum()) for w in whole.weights[:, query]) for query in range(80)
    ]
    best = min(range(80), key=lambda query: entropies[query])
    assert first.queries == [divmod(best, 10)]
    torch.testing.assert_close(first.weights[:, 0], whole.weights[:, best])
    torch.testing.assert_close(first.mean, whole.weights.mean(dim=1))


def test_a_tile_has_most_color_where_the_weight_is_largest():
    pixels = torch.full((6, 9, 3), 90, dtype=torch.uint8)
    image = attention_picture.enlarged(pixels)
    assert image.size == (9 * 14, 6 * 14)
    weights = torch.tensor([[0.1, 0.2, 0.0], [0.4, 0.3, 0.0]])
    drawn = attention_picture.tile(image, weights)
    gray = 64 + 90 * 5 // 8
    largest, half = drawn.getpixel((5, 80)), drawn.getpixel((50, 5))
    for share, pixel in ((0.8, largest), (0.4, half)):  # for the weights 0.4 and 0.2
        blend = [share * w + (1 - share) * gray for w in attention_picture.WARM]
        assert pixel == pytest.approx(blend, abs=2)
    assert drawn.getpixel((120, 5)) == (gray, gray, gray)
    dark, light = (
        attention_picture.tile(Image.new("RGB", (4, 4), (v,) * 3), torch.ones(2, 2)).getpixel(
            (0, 0)
        )
        for v in (0, 255)
    )
    assert min(b - a for a, b in zip(dark, light, strict=True)) > 20  # the image shows through
    black, white = attention_picture.EDGE, attention_picture.MARK
    for color in ((90, 90, 90), black, white):  # on any background
        plain = Image.new("RGB", image.size, color)
        marked = attention_picture.marked(plain, (1, 2), (2, 3))
        assert [marked.getpixel((84 + n, 60)) for n in range(5)] == [
            black, white, white, black, color,
        ]  # fmt: skip
        assert marked.getpixel((125, 83)) == black
        assert marked.getpixel((83, 42)) == color
    fine = attention_picture.marked(image, (999, 999), (1000, 1000))  # a map finer than the picture
    assert fine.getpixel((125, 83)) == black


def test_a_name_on_the_dashboard_has_escapes_for_letters_that_the_font_lacks():
    tiles, drawn = Image.new("RGB", (60, 60)), []
    for name in ("猫x", r"\u732bx", "狗x"):
        rows = ["a\nfrom 0,0", f"{name}\nfrom 2,3"]
        picture = attention_picture.AttentionPicture("", tiles, rows, ["image", "head 1"])
        drawn.append(attention_picture.labeled(picture))
    assert drawn[0].tobytes() == drawn[1].tobytes()
    assert drawn[0].tobytes() != drawn[2].tobytes()


# ---- The command --------------------------------------------------------------------------------


def test_each_block_becomes_a_png_and_an_svg(folder, capsys):
    call(visualize.main, folder / "aa=1")
    out = folder / "aa=1" / "attention"
    names = {f"attention-{block}.{kind}" for block in BLOCKS for kind in ("png", "svg")}
    assert {path.name for path in out.iterdir()} == names
    assert capsys.readouterr().out.count("written: ") == 4
    with Image.open(out / f"attention-{BLOCKS[0]}.png") as picture:
        assert picture.width > 300
        # Rows: three images, each with one position and the mean over all; columns: two heads.
        assert picture.width / picture.height < 1.2
    assert "<image" in (out / f"attention-{BLOCKS[0]}.svg").read_text()


def drawn(folder, monkeypatch, out, *words):
    """Return the SVG of the first block and its number of rows of tiles."""
    pictures = []
    draw = attention_picture.draw_layer
    monkeypatch.setattr(
        attention_picture,
        "draw_layer",
        lambda *given: pictures.append(draw(*given)) or pictures[-1],
    )
    call(visualize.main, folder / "aa=1", *words, "--out", out)
    monkeypatch.undo()
    assert len(pictures[0].columns) == 3
    return (out / f"attention-{BLOCKS[0]}.svg").read_text(), len(pictures[0].rows)


def test_images_queries_and_settings_are_used(folder, monkeypatch, tmp_path):
    cases = [
        [],
        ["--images", "0", "5"],
        ["--images", "0", "5", "--queries", "0,0", "31,31", "9,20"],
        ["--images", tmp_path / "photo.jpg", "3"],
        ["--images", "3", "data.noise=0.2"],
        ["data.data_seed=4", "--images", "3"],
    ]
    pictures = [
        drawn(folder, monkeypatch, tmp_path / str(number), *words)
        for number, words in enumerate(cases)
    ]
    assert [rows for _, rows in pictures] == [6, 4, 6, 4, 2, 2]
    assert len({svg for svg, _ in pictures}) == len(cases)


def test_the_images_are_those_of_their_numbers(folder):
    trained = models.load(folder / "aa=1")
    found, titles = visualize.gather(trained, "RUN", ["7", "2"], [])
    assert torch.equal(found.pixels, LOOKUP.evaluation.pixels[[7, 2]])
    names = [LOOKUP.class_names[label] for label in LOOKUP.evaluation.labels[[7, 2]].tolist()]
    assert titles == [f"7: {names[0]}", f"2: {names[1]}"]


def test_files_need_no_data(folder, tmp_path):
    """Nor do they need square images: the network is for 16x20."""
    out = tmp_path / "out"
    call(visualize.main, folder / "own", "--images", tmp_path / "photo.jpg", "--out", out)
    assert len(list(out.iterdir())) == 4


WRONG = [
    (["nowhere"], "there is no nowhere"),
    (["{runs}/plain=1"], "has no attention to look at \\(attention=none\\)"),
    (["{run}", "--images", "16"], "there is no image 16; lookup test has the images 0 to 15"),
    (["{run}", "--images", "-1"], "there is no -1; an image is a number from 0 on, or a file"),
    (["{run}", "--images", "nowhere.png"], "there is no nowhere.png; an image is"),
    (["{run}", "--images", "outputs/a=b/c.jpg"], "there is no outputs/a=b/c.jpg; an image is"),
    (["{run}", "--images", "{broken}"], "broken.png: it is damaged"),
    (["{run}", "--images", "{runs}"], "{runs}: .*"),
    (["{run}", "--images", "²"], "there is no ²"),
    (["{run}", "--images", *map(str, range(101))], "101 rows"),
    (["{run}", "--queries", *["1,1"] * 34], "102 rows, one for each image and query, are more"),
    (["{run}", "--queries", "5"], "--queries 5: a query is ROW,COLUMN"),
    (["{run}", "--queries", "-1,2"], "--queries -1,2: a query is ROW,COLUMN"),
    (["{run}", "--queries", "a,b"], "--queries a,b: a query is ROW,COLUMN"),
    (["{run}", "--queries", "1,2,3"], "a query is ROW,COLUMN"),
    (["{run}", "--queries", "1.5,2"], "a query is ROW,COLUMN"),
    (["{run}", "--queries", "32,0"], "pixel 32,0 is outside the 32x32 image; rows go from"),
    (["{run}", "--queries", "0,99"], "pixel 0,99 is outside"),
    (["{run}", "--queries", "data.noise=0.1"], "--queries needs at least one value"),
    (["{run}", "epochs=3"], "epochs: not a setting here; choose from data\n"),
    (["{run}", "data.val_size=5"], "data.val_size=5: .*aa=1 was trained with data.val_size=0"),
    (["{run}", "--images", "{photo}", "data.noise=0.1"], "none of the --images is from the data"),
    (["{run}", "--device", "toaster"], "device=toaster"),
    (["{run}", "--out", "{photo}"], "photo.jpg"),
    (["{run}", "word"], "word: not a setting here"),
    (["{runs}/own"], "Could not find 'data/own'"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(w[:4]) for w, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line(folder, monkeypatch, tmp_path, capsys, words, line):
    places = {"runs": folder, "run": folder / "aa=1"}
    places |= {"photo": tmp_path / "photo.jpg", "broken": tmp_path / "broken.png"}
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, visualize.main, *[word.format(**places) for word in words])
    assert re.search(line.replace("{runs}", re.escape(str(folder))), said), said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_nothing(folder, monkeypatch, tmp_path, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("training.files.os.fsync", full)
    line = refused(capsys, visualize.main, folder / "aa=1", "--out", tmp_path / "deep" / "er")
    assert "cannot be written (No space left on device)" in line
    assert sorted(tmp_path.rglob("*")) == before


# ---- The report ---------------------------------------------------------------------------------


def section(folder):
    return attention_section(analyze([folder]))


def test_the_report_shows_the_last_block_of_each_stage(run, tmp_path):
    run("attention=none", folder="runs/plain")
    run(folder="runs/aa")
    made = section(tmp_path / "runs")
    assert [picture.title for picture in made.pictures] == [f"Block {name}" for name in BLOCKS]
    assert "AA, seed 0" in made.text[0]
    assert made.notes == []
    for picture in made.pictures:
        assert "<image" in picture.svg
    again = section(tmp_path / "runs")
    assert [p.svg for p in again.pictures] == [p.svg for p in made.pictures]
    (tmp_path / "runs" / "aa" / "weights.safetensors").write_bytes(b"cut")
    damaged = section(tmp_path / "runs")
    assert damaged.pictures == []
    assert "The attention of aa is not shown: " in damaged.notes[0]
    (tmp_path / "runs" / "aa" / "weights.safetensors").unlink()
    assert section(tmp_path / "runs") is None  # plain networks have no attention to show


def test_images_that_are_gone_or_others_by_now_are_a_line_in_the_report(run, tmp_path, monkeypatch):
    run(folder="runs/aa")

    def gone(*_, **__):
        raise FileNotFoundError("no images there")

    monkeypatch.setattr(attention, "make", gone)
    (line,) = section(tmp_path / "runs").notes
    assert line == "The attention of aa is not shown: no images there."
    monkeypatch.undo()
    config = tmp_path / "runs" / "aa" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"data_digest": "another"}))
    (line,) = section(tmp_path / "runs").notes
    assert line == "The attention of aa is not shown: the images of lookup have changed since."


def test_nothing_that_a_summary_names_is_called(run, tmp_path):
    run(folder="runs/aa")
    file = tmp_path / "runs" / "aa" / "summary.json"
    summary = json.loads(file.read_text())
    target = {"_target_": "os.mkdir", "_args_": [str(tmp_path / "called")]}
    for data in (target, {**summary["config"]["data"], "_target_": None}, {}):
        summary["config"]["data"] = data
        file.write_text(json.dumps(summary))
        (line,) = section(tmp_path / "runs").notes
        assert "is not one of this project's" in line
    summary["config"]["data"] = {"_target_": "data.make_lookup", "noise": target}
    file.write_text(json.dumps(summary))
    assert section(tmp_path / "runs").pictures == []
    assert not (tmp_path / "called").exists()
