"""Image files found in practice: more than 8 bits, large photographs, damage, memory."""

import json
import math
import os
import re
import struct
import subprocess
import sys
import textwrap
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from test_saved import describe, save

from data import pictures
from data.pictures import decode, read_picture, reading
from scripts import predict

from helpers import exit_code
from image_folders import load, write

SIZE = (6, 8)


def ramp(largest, dtype):
    """Return a (6, 8) array of values from 0 to ``largest``."""
    return np.linspace(0, largest, 48).reshape(SIZE).astype(dtype)


def gray_set(root, numbers):
    """Replace every image by the image ``numbers``."""
    for path in root.rglob("*.png"):
        Image.fromarray(numbers).save(path.with_suffix(".tif"))
        path.unlink()


# ---- Values that are not 8 bits -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "dtype", "white"),
    [
        (65535, np.uint16, None),
        (65535, np.uint16, 65535),
        (65535, np.int32, None),
        (4095, np.uint16, 4095),
        (1023, np.int32, 1023),
        (1, np.float32, 1),
        (1, np.float32, 1.0),
        (65535, np.float32, 65535),
        (255, np.float32, 255),
    ],
)
def test_numbers_of_more_bits_are_scaled_to_white(root, largest, dtype, white):
    numbers = ramp(largest, dtype)
    gray_set(root, numbers)
    expected = np.round(numbers.astype(np.float64) / largest * 255)
    pixels = load(root, size=SIZE, white=white).train.pixels[0].numpy()
    assert np.abs(pixels - expected[:, :, None]).max() <= 1
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize(
    ("numbers", "white", "line"),
    [
        (ramp(1, np.float32), None, r"floating-point numbers from 0 to 1; data.white=N says"),
        (ramp(65535, np.float32), None, r"floating-point numbers from 0 to 65535; data.white=N"),
        (ramp(2, np.float32) - 1, 1, r"numbers from -1 to 1; 0 must be black"),
        (ramp(9, np.int32) - 3, None, r"numbers from -3 to 6; 0 must be black"),
        (ramp(1, np.float32) * np.nan, 1, r"numbers that are not finite"),
        (ramp(1, np.float32) + np.inf, 1, "not finite"),
        (
            ramp(70000, np.int32),
            None,
            r"its largest value, 70000, is above white, 65535 \(data.white\)",
        ),
        (
            ramp(4095, np.uint16),
            1023,
            r"its largest value, 4095, is above white, 1023 \(data.white\)",
        ),
        (ramp(4095, np.uint16), None, r"the largest value .* is 4095; give data.white=4095, the"),
        (ramp(1023, np.uint16), None, r"give data.white=1023, the value of white \(65535"),
        (ramp(255, np.int32), None, r"give data.white=255"),
        (ramp(0, np.uint16), None, r"the largest value .* is 0; give"),
    ],
)
def test_numbers_of_which_none_is_known_to_be_white_are_refused(root, numbers, white, line):
    gray_set(root, numbers)
    with pytest.raises(ValueError, match=line) as caught:
        load(root, white=white)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "white", [0, -1, -4095, math.nan, math.inf, 1e-300, 1e300, "4095", True, [1]]
)
def test_a_white_that_is_none_is_refused(root, white):
    line = rf"data.white={re.escape(str(white))} must be a number from 1e-30 to 1e"
    with pytest.raises(ValueError, match=line):
        load(root, white=white)
    with pytest.raises(ValueError, match=line):
        pictures.reading_of({"data": {"white": white}})
    with pytest.raises(ValueError, match=r"data.max_pixels=.* must be a whole number, at least 1"):
        pictures.reading_of({"data": {"max_pixels": str(white)}})


def test_a_dark_set_of_16_bits_is_taken_where_that_is_meant(root):
    gray_set(root, ramp(4095, np.uint16))
    assert load(root, white=65535).train.pixels.max() == 16


def test_one_bright_image_says_that_a_set_has_all_16_bits(root):
    gray_set(root, ramp(4095, np.uint16))
    Image.fromarray(ramp(60000, np.uint16)).save(root / "train" / "ant" / "bright.tif")
    assert load(root).train.pixels.max() > 200


def test_what_is_refused_is_refused_again_when_it_comes_from_the_cache(root):
    gray_set(root, ramp(4095, np.uint16))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the largest value .* is 4095; give"):
            load(root)


def deep_color_png(*numbers):
    """Return a (6, 8) PNG of one color with 16 bits per channel, which Pillow cannot write.

    It has 2 (gray) to 4 channels; an even number of channels includes opacity.
    """

    def chunk(name, content):
        crc = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + crc

    row = b"\0" + struct.pack(f">{len(numbers)}H", *numbers) * SIZE[1]
    kind = {2: 4, 3: 2, 4: 6}[len(numbers)]
    head = struct.pack(">IIBBBBB", SIZE[1], SIZE[0], 16, kind, 0, 0, 0)
    body = [chunk(b"IHDR", head), chunk(b"IDAT", zlib.compress(row * SIZE[0])), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


@pytest.mark.parametrize("largest", [4095, 65000])
@pytest.mark.parametrize(("colors", "opacity"), [(3, []), (3, [65535]), (1, [65535])])
def test_colors_of_16_bits_keep_their_upper_eight_or_are_refused(root, largest, opacity, colors):
    for path in root.rglob("*.png"):
        path.write_bytes(deep_color_png(*[largest] * colors, *opacity))
    if largest == 4095:
        with pytest.raises(ValueError, match=r"no value in its color .* above 4095, and only"):
            load(root)
        assert load(root, white=65535).train.pixels.unique().tolist() == [largest >> 8]
    else:
        assert load(root).train.pixels.unique().tolist() == [largest >> 8]
    with pytest.raises(ValueError, match="has 16 bits for each color, of which only the upper 8"):
        load(root, white=4095)


@pytest.mark.parametrize("largest", [4095, 65535])
def test_a_ppm_of_16_bits_is_such_an_image_unless_it_says_what_is_white(root, largest):
    for path in root.rglob("*.png"):
        numbers = np.full((*SIZE, 3), 897, dtype=">u2")
        head = f"P6 {SIZE[1]} {SIZE[0]} {largest}\n".encode()
        path.with_suffix(".ppm").write_bytes(head + numbers.tobytes())
        path.unlink()
    if largest == 65535:
        with pytest.raises(ValueError, match=r"no value in its color images of 16 bits is above"):
            load(root)
        with pytest.raises(ValueError, match="has 16 bits for each color, of which only the upper"):
            load(root, white=1023)
    else:
        assert load(root).train.pixels.unique().tolist() == [round(255 * 897 / 4095)]


@pytest.mark.parametrize("white", [None, 1.0, 4095])
def test_a_prediction_divides_by_the_white_of_the_training(tmp_path, capsys, white):
    settings = {"data": {"white": white}} if white else {"data": {}}
    network = save(tmp_path / "network", describe(settings=settings))
    numbers = ramp(white or 65535, np.float32 if white == 1 else np.uint16)
    eight = np.round(numbers / (white or 65535) * 255).astype(np.uint8)
    lines = []
    for name, image in (("deep", numbers), ("eight", eight)):
        Image.fromarray(image).save(tmp_path / f"{name}.tif")
        words = [network, tmp_path / f"{name}.tif", "--json", "--device", "cpu"]
        assert exit_code(predict.main, *words) == 0
        (row,) = json.loads(capsys.readouterr().out)
        lines.append({one["class"]: one["probability"] for one in row["predictions"]})
    assert lines[0] == pytest.approx(lines[1], abs=1e-2)


@pytest.mark.parametrize("settings", [{}, {"data": None}, {"data": 3}, {"data": {"white": None}}])
def test_settings_without_a_white(settings):
    assert pictures.reading_of(settings) == {"white": None, "max_pixels": pictures.MAX_PIXELS}


# ---- Photographs --------------------------------------------------------------------------------


def test_a_large_jpeg_is_reduced_while_it_is_decoded(tmp_path, monkeypatch):
    picture = Image.linear_gradient("L").resize((2000, 1600)).convert("RGB")
    picture.save(tmp_path / "a.jpg", quality=95)
    sizes = []
    as_rgb = pictures._as_rgb
    monkeypatch.setattr(pictures, "_as_rgb", lambda p: sizes.append(p.size) or as_rgb(p))
    read = read_picture(tmp_path / "a.jpg", (16, 20))
    assert sizes == [(250, 200)]
    whole = np.array(picture.resize((20, 16), Image.Resampling.BICUBIC))
    assert np.abs(read.numpy().astype(int) - whole).max() <= 2


@pytest.mark.thorough
@pytest.mark.parametrize(("ending", "mode"), [("jpg", "RGB"), ("png", "L")])
def test_a_photograph_of_108_megapixels_is_taken(tmp_path, ending, mode):
    path = tmp_path / f"a.{ending}"
    Image.new(mode, (12000, 9000), "white").save(path)
    assert (read_picture(path, SIZE) == 255).all()


@pytest.mark.parametrize("size", [[6, 8], (8, 6), (1, 9), [1024, 1]])
def test_a_size_may_have_two_numbers(root, size):
    dataset = load(root, size=size)
    assert dataset.image_size == tuple(size)


@pytest.mark.parametrize(
    "size",
    [
        *(0, -3, 1025, [], [8], [8, 8, 8], [8, 0], [8, 1025]),
        *("8", "[8,8]", 8.0, [8, 8.0], True, None, [True, 8]),
    ],
)
def test_other_sizes_are_refused(root, size):
    line = f"data.size={size} must be whole numbers from 1 to 1024, one or"
    with pytest.raises(ValueError, match=re.escape(line)):
        load(root, size=size)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_constant_channel_is_no_error(root, channels):
    for path in root.rglob("*.png"):
        pixels = write(path, size=(8, 8), seed=len(str(path)))
        pixels[..., :channels] = 200
        Image.fromarray(pixels).save(path)
    dataset = load(root)
    assert dataset.std[:channels] == (1.0,) * channels
    assert dataset.mean[0] == pytest.approx(200 / 255)


# ---- Damage -------------------------------------------------------------------------------------


def cut_file(format, share):
    def make(path):
        Image.effect_noise((64, 64), 90).convert("RGB").save(path, format)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return make


def bad_dds(path):
    Image.new("RGB", (8, 8)).save(path, "dds")
    content = path.read_bytes()
    path.write_bytes(content[:80] + b"\x04\0\0\0DX99" + content[88:])


DAMAGED = {
    "half.jpg": cut_file("jpeg", 0.5),
    "half.png": cut_file("png", 0.5),
    "half.webp": cut_file("webp", 0.5),
    "half.gif": cut_file("gif", 0.3),
    "half.jp2": cut_file("jpeg2000", 0.02),
    "half.tif": cut_file("tiff", 0.5),
    "other.dds": bad_dds,
    "empty.bmp": lambda path: path.write_bytes(b""),
    "text.jpg": lambda path: path.write_text("<html>"),
    "pipe.png": os.mkfifo,
    "device.png": lambda path: path.symlink_to("/dev/zero"),
    "gone.png": lambda path: path.symlink_to("nowhere"),
    "folder.png": lambda path: path.symlink_to("nowhere/.."),
}
if "AVIF" in pictures.formats():
    DAMAGED["half.avif"] = cut_file("avif", 0.5)


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_refused_by_name_or_left_out(root, name):
    before = load(root)
    DAMAGED[name](root / "train" / "ant" / name)
    with pytest.raises(ValueError, match="1 of 13 images cannot be read; repair or") as caught:
        load(root)
    line = str(caught.value)
    assert f"ant/{name}: " in line
    assert line.endswith("data.skip_damaged=true leaves them out")
    for _ in range(2):  # from the files, then from the cache
        dataset = load(root, skip_damaged=True)
        assert torch.equal(dataset.train.pixels, before.train.pixels)
        assert dataset.train.labels.tolist() == before.train.labels.tolist()
        assert (dataset.mean, dataset.digest) == (before.mean, before.digest)
        assert f"mine: 1 files left out: {root / 'train' / 'ant' / name}: " in dataset.notes[1]
    with pytest.raises(ValueError, match="1 of 13 images cannot be read"):
        load(root)


def test_damaged_exif_data_turn_the_image_where_they_still_say_how(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010F] = "maker"
    Image.fromarray(ramp(255, np.uint8)).save(tmp_path / "a.png", "png", exif=exif)
    whole = (tmp_path / "a.png").read_bytes()
    damaged = whole.replace(b"\x01\x0f\x00\x02", b"\x01\x11\x00\x02")
    assert damaged != whole
    at = damaged.index(b"eXIf") - 4
    length = int.from_bytes(damaged[at : at + 4], "big")
    crc = zlib.crc32(damaged[at + 4 : at + 8 + length]).to_bytes(4, "big")
    damaged = damaged[: at + 8 + length] + crc + damaged[at + 12 + length :]
    with reading():
        assert np.array_equal(decode(damaged, SIZE[::-1]).pixels, decode(whole, SIZE[::-1]).pixels)


@pytest.mark.parametrize(
    "error",
    [KeyError("a tag"), struct.error("a tag"), ZeroDivisionError("a tag"), SyntaxError("a tag")],
)
def test_whatever_pillow_raises_names_the_file(root, monkeypatch, error):
    def broken(_):
        raise error

    monkeypatch.setattr(Image.Image, "getexif", broken)
    with pytest.raises(ValueError, match=r"12 of 12 .*Bee/0.png: it is damaged: '?a tag"):
        load(root)


def test_a_class_of_damaged_images_alone_is_refused(root):
    for path in (root / "train" / "Bee").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="no image of the class Bee is left to train on"):
        load(root, skip_damaged=True)
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of 3 images can be read"):
        load(root, skip_damaged=True)


# ---- Memory -------------------------------------------------------------------------------------


def script(text):
    words = [sys.executable, "-c", textwrap.dedent(text)]
    # One malloc arena per thread would only take up unused address space.
    env = os.environ | {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def large(root):
    """400 images (300 MiB at 512x512), three of them for evaluation."""
    for number in range(385):
        Image.new("L", (2, 2), number % 256).save(root / "train" / "ant" / f"_{number}.png")
    return root


@pytest.mark.thorough
def test_a_set_is_read_in_the_memory_of_its_images_and_300_mib(large):
    for _ in range(2):  # from the files, then from the cache
        script(f"""
            import resource, torch
            from data import load_folder
            import PIL.Image, numpy, concurrent.futures, tqdm
            torch.zeros(9).sum()
            used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
            limit = used + 400 * 512 * 512 * 3 + 300 * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            load_folder({str(large)!r}, "large", 512)
        """)


@pytest.mark.thorough
def test_images_that_are_mapped_take_no_memory_of_their_own(large):
    """Measure memory that the system cannot drop and read again; the images take 300 MiB."""
    out = script(f"""
        from data import Augmentation, Batches, load_folder
        def anonymous():
            (line,) = [l for l in open("/proc/self/status") if l.startswith("RssAnon")]
            return int(line.split()[1]) / 1024
        import torch, PIL.Image, numpy
        before = anonymous()
        dataset = load_folder({str(large)!r}, "large", 512)
        batches = Batches(dataset.train, 2, Augmentation(), dataset.mean, dataset.std, seed=0)
        total = sum(float(x.mean()) for x, _ in batches.epoch(0))
        print(anonymous() - before)
    """)
    assert float(out) < 200
