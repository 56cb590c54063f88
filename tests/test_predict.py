"""scripts/predict.py: all kinds of pictures, the output, and files that are not pictures."""

import csv
import io
import json
import os
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_saved import describe, save, trained, write

import models
from data import pictures as picture_files
from data.pictures import read_picture
from scripts import predict

from helpers import exit_code

SIZE = (16, 20)


@pytest.fixture
def network(tmp_path):
    return save(tmp_path / "network", describe())


def pixels(height=16, width=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


# ---- Reading ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.tiff", "a.ppm", "a.gif", "no_ending"])
def test_a_picture_of_the_networks_size_stays_as_it_is(tmp_path, name):
    picture = Image.fromarray(pixels())
    if name == "a.gif":  # has at most 256 colors
        picture = picture.quantize(64).convert("RGB")
    path = tmp_path / name
    picture.save(path, format="png" if name == "no_ending" else None)
    assert np.array_equal(read_picture(path, SIZE).numpy(), np.array(picture))


@pytest.mark.parametrize(
    "mode", ["L", "1", "P", "LA", "RGBA", "PA", "CMYK", "YCbCr", "I;16", "I", "F"]
)
def test_all_modes_are_read(tmp_path, mode):
    """A uniformly gray picture is read as that gray in every mode."""
    path = tmp_path / "gray.tiff"
    value = 255 if mode == "1" else 128
    if mode in ("I;16", "I"):
        picture = Image.fromarray(np.full(SIZE, value << 8, np.uint16))
        picture = picture.convert("I") if mode == "I" else picture
    elif mode == "PA":
        picture = Image.new("LA", SIZE[::-1], (value, 255)).convert("PA")
        path = tmp_path / "gray.png"
        picture = picture.convert("RGBA")
    else:
        picture = Image.new("RGB", SIZE[::-1], (value,) * 3)
        picture = picture.quantize() if mode == "P" else picture.convert(mode)
    picture.save(path)
    read = read_picture(path, SIZE, white=255 if mode == "F" else None)
    assert read.shape == (*SIZE, 3)
    assert read.dtype == torch.uint8
    assert (read.int() - value).abs().max() <= 1


@pytest.mark.parametrize("how", ["RGBA", "LA", "P", "RGB", "I;16"])
def test_what_is_transparent_is_white(tmp_path, how):
    picture = Image.new("RGBA", SIZE[::-1], (200, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 10, 16))
    path = tmp_path / "half.png"
    if how == "RGB":  # one color means transparent
        flat = Image.new("RGB", SIZE[::-1], (200, 0, 0))
        flat.paste((1, 2, 3), (0, 0, 10, 16))
        flat.save(path, transparency=(1, 2, 3))
    elif how == "I;16":
        deep = np.full(SIZE, 51400, dtype=np.uint16)
        deep[:, :10] = 3000
        Image.fromarray(deep).save(path, transparency=3000)
    elif how == "P":
        flat = Image.new("P", SIZE[::-1], 1)
        flat.putpalette([0, 0, 0, 200, 0, 0])
        flat.paste(0, (0, 0, 10, 16))
        flat.save(path, transparency=0)
    else:
        picture.convert(how).save(path)
    read = read_picture(path, SIZE)
    assert (read[:, :10] == 255).all()
    assert not (read[:, 10:] == 255).all()


@pytest.mark.parametrize("ending", ["png", "tiff", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_it_is_turned_as_its_exif_data_say(tmp_path, orientation, ending):
    upright = Image.fromarray(pixels())
    back = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    kept = upright
    for step in back.get(orientation, []):
        kept = kept.transpose(step)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{ending}"
    kept.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    read = read_picture(path, SIZE)
    assert np.array_equal(read.numpy(), np.array(upright))


@pytest.mark.parametrize(
    ("height", "width", "rows", "columns"),
    [(32, 40, (0, 32), (0, 40)), (32, 60, (0, 32), (10, 50)), (64, 40, (16, 48), (0, 40))],
)
def test_it_covers_the_networks_size_and_is_cut_evenly(tmp_path, height, width, rows, columns):
    picture = Image.fromarray(pixels(height, width))
    picture.save(tmp_path / "a.png")
    box = (columns[0], rows[0], columns[1], rows[1])
    expected = picture.resize((20, 16), Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(read_picture(tmp_path / "a.png", SIZE).numpy(), np.array(expected))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_any_size_is_read(tmp_path, height, width):
    Image.fromarray(pixels(height, width)).save(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png", SIZE).shape == (*SIZE, 3)


# ---- The command --------------------------------------------------------------------------------


def test_probabilities_are_the_networks(network, tmp_path, monkeypatch, capsys):
    for number in range(3):
        Image.fromarray(pixels(seed=number)).save(tmp_path / f"{number}.png")
    files = [tmp_path / f"{number}.png" for number in (2, 0, 1)]
    monkeypatch.setattr(predict, "BATCH_SIZE", 2)
    assert exit_code(predict.main, network, *files, "--json", "--top", "3", "--device", "cpu") == 0
    rows = json.loads(capsys.readouterr().out)
    loaded = models.load(network)
    mean, std = (np.array(getattr(loaded.description, name)) for name in ("mean", "std"))
    assert [row["file"] for row in rows] == [str(file) for file in files]
    for row, number in zip(rows, (2, 0, 1), strict=True):
        x = (pixels(seed=number) / 255 - mean) / std
        x = torch.tensor(x.transpose(2, 0, 1)[None], dtype=torch.float32)
        expected = loaded.network(x).softmax(1)[0].tolist()
        got = {one["class"]: one["probability"] for one in row["predictions"]}
        assert got == pytest.approx(dict(zip(loaded.class_names, expected, strict=True)), abs=1e-5)
        values = [one["probability"] for one in row["predictions"]]
        assert values == sorted(values, reverse=True)


def test_table_and_csv_say_the_same(network, tmp_path, capsys):
    folder = tmp_path / "Bilder für später" / "inner"
    folder.mkdir(parents=True)
    Image.fromarray(pixels()).save(folder / "ä.png")
    (folder / ".hidden").write_text("no picture")
    (folder / "@eaDir").mkdir()  # a NAS stores thumbnails there
    (folder / "@eaDir" / "ä.png").write_text("no picture")
    assert exit_code(predict.main, network, tmp_path / "Bilder für später", "--top", "2") == 0
    printed = capsys.readouterr()
    (line,) = printed.out.splitlines()
    assert printed.err == ""  # no progress bar, because it is not a terminal
    words = [network, tmp_path / "Bilder für später", "--csv", "--top", "9"]
    assert exit_code(predict.main, *words) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 3  # not nine, because there are only three classes
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    words = ", ".join(f"{r['class']} {100 * float(r['probability']):.1f} %" for r in rows[:2])
    assert line == f"{folder / 'ä.png'}  {words}"


def png_that_claims(width, height):
    """Return a PNG that claims to have this size."""
    file = io.BytesIO()
    Image.fromarray(pixels()).save(file, "png")
    content = file.getvalue()
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + content[24:29]
    return content[:12] + head + zlib.crc32(head).to_bytes(4, "big") + content[33:]


# More damage is tested in tests/test_data_pictures.py.
DAMAGED = {
    "text.jpg": b"<html></html>",
    "empty.png": b"",
    "header.png": png_that_claims(16, 20)[:20],
    "bomb.png": png_that_claims(20_000, 20_000),
    "zeros.webp": bytes(1000),
}


def test_files_that_are_no_pictures_are_named_and_the_others_go_on(network, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, content in DAMAGED.items():
        (folder / name).write_bytes(content)
    Image.fromarray(pixels()).save(folder / "m.png")
    (folder / "z\x1b[31m.png").write_text("")
    (folder / "link.png").symlink_to(tmp_path / "gone")  # a broken link is ignored
    assert exit_code(predict.main, network, folder, "--json") == 1
    said = capsys.readouterr()
    assert [row["file"] for row in json.loads(said.out)] == [str(folder / "m.png")]
    lines = said.err.splitlines()
    assert len(lines) == len(DAMAGED) + 1
    for name in DAMAGED:
        assert sum(f"predict.py: {folder / name}: it " in line for line in lines) == 1, name
    assert "\x1b" not in said.err
    assert "more than 268,435,456 pixels (data.max_pixels)" in said.err


def test_a_file_that_cannot_be_read_is_named(network, tmp_path, monkeypatch, capsys):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(picture_files, "read_file", denied)
    assert exit_code(predict.main, network, tmp_path / "a.png") == 1
    assert capsys.readouterr().err.startswith(f"predict.py: {tmp_path / 'a.png'}: [Errno 13] Perm")


def test_pictures_may_be_as_large_as_those_of_the_training(tmp_path, capsys):
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    for most, code in ((320, 0), (319, 1)):
        about = describe(settings={"data": {"max_pixels": most}})
        network = save(tmp_path / f"{most}", about)
        assert exit_code(predict.main, network, tmp_path / "a.png") == code
    assert "it has more than 319 pixels (data.max_pixels)" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["--json", "--csv", "--top=3"])
def test_names_of_classes_hold_no_control_characters_and_no_formula(
    tmp_path, monkeypatch, capsys, form
):
    names = ["=1+1", "a\x1b[31m\x00", "b\u202e\udcff"]
    network = save(tmp_path / "network", describe(class_names=names))
    Image.fromarray(pixels()).save(tmp_path / "@a.png")
    monkeypatch.chdir(tmp_path)
    assert exit_code(predict.main, network, "@a.png", form) == 0
    out = capsys.readouterr().out
    out.encode()  # fails if there is a lone surrogate
    assert not {"\x1b", "\x00", "\u202e"} & set(out)
    shown = {"=1+1", "a\\x1b[31m\\x00", "b\\u202e\\xff"}
    if form == "--json":
        (row,) = json.loads(out)
        assert {p["class"] for p in row["predictions"]} == shown
    elif form == "--csv":
        rows = list(csv.DictReader(io.StringIO(out)))
        assert {row["class"] for row in rows} == {"'=1+1"} | shown - {"=1+1"}
        assert {row["file"] for row in rows} == {"'@a.png"}
    else:
        assert all(name in out for name in shown)


def test_outputs_that_are_not_finite_are_no_prediction(tmp_path, capsys):
    description = describe(std=[1e-11, 1e-11, 1e-11])
    large = trained(description)
    for tensor in large.parameters():
        tensor.data.fill_(3e38)
    folder = tmp_path / "network"
    folder.mkdir()
    write(folder, description, large)
    Image.fromarray(pixels()).save(tmp_path / "a.png")
    assert exit_code(predict.main, folder, tmp_path / "a.png", "--csv") == 2
    said = capsys.readouterr()
    assert "the network's outputs are not finite" in said.err
    assert said.out == ""


WRONG = [
    (["nowhere", "{picture}"], "there is no nowhere"),
    (["{network}", "nowhere.png"], "there is no nowhere.png"),
    (["{network}", "{picture}", "nowhere"], "there is no nowhere"),
    (["{network}", "{empty}"], "there is no file in {empty}"),
    (["{network}", ""], "there is no file without a name"),
    (["{network}", "{pipe}"], "{pipe} is neither a file nor a folder"),
    (["{network}", "{picture}", "--top", "0"], "--top: 0 must be a whole number, at least 1"),
    (["{network}", "{picture}", "--device", "toaster"], "device=toaster"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_mistakes_are_one_line_before_anything_is_printed(
    network, tmp_path, monkeypatch, capsys, words, line
):
    names = {"network": network, "picture": tmp_path / "a.png", "empty": tmp_path / "empty"}
    names["pipe"] = tmp_path / "pipe"
    Image.fromarray(pixels()).save(names["picture"])
    names["empty"].mkdir()
    os.mkfifo(names["pipe"])
    monkeypatch.chdir(tmp_path)
    assert exit_code(predict.main, *[word.format(**names) for word in words]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert line.format(**names) in said.err
