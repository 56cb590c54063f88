"""data=folder: images, classes, mean and standard deviation, the cache, and rejected folders."""

import os
import random
import shutil
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from data import folder, image_cache, layout, load_folder
from data.vision import datasets
from scripts import compare
from training import cli
from training.settings import check
from training.trained import compose_settings, load_data

from helpers import call, refused
from image_folders import CLASSES, RUN, load, write


def test_classes_images_and_labels_are_those_of_torchvisions_image_folder(root):
    write(root / "train" / "ant" / "deep" / "er" / "0.JPG")
    write(root / "train" / "ant" / "gray.bmp", mode="L")
    (root / "train" / "ant" / "Thumbs.db").write_bytes(b"no image")
    (root / "train" / "notes.txt").write_text("not a class")
    found = [(image.path, image.label) for image in layout.find_images(root, True).train]
    theirs = datasets.ImageFolder(str(root / "train"))
    assert [(str(path), label) for path, label in found] == sorted(
        theirs.samples, key=lambda sample: (sample[1], Path(sample[0]))
    )
    dataset = load(root)
    assert list(dataset.class_names) == theirs.classes == sorted(CLASSES)
    assert dataset.train.labels.tolist() == [label for _, label in found]
    assert dataset.evaluation.labels.tolist() == [
        sorted(CLASSES).index(n) for n in sorted(CLASSES[:3])
    ]
    assert (dataset.name, dataset.evaluated_on, dataset.image_size) == ("mine", "val", (8, 8))


def test_an_image_of_the_size_stays_as_it_is_and_others_cover_it(root):
    pixels = write(root / "train" / "Bee" / "0.png", size=(8, 8))
    flat = Image.new("RGB", (40, 10), "black")  # its middle quarter fills the square
    flat.paste("white", (15, 0, 25, 10))
    flat.save(root / "train" / "Bee" / "1.png")
    train_images = load(root).train
    assert np.array_equal(train_images.pixels[0].numpy(), pixels)
    assert train_images.pixels[1].min() > 200


def test_mean_and_deviation_are_those_of_all_training_images(root):
    whole = load(root)
    (root / "val").rename(root / "elsewhere")  # not needed with val_size
    held_out = load(root, val_size=5)
    values = whole.train.pixels.numpy().reshape(-1, 3).astype(np.float64) / 255
    assert whole.mean == pytest.approx(values.mean(axis=0), rel=1e-12)
    assert whole.std == pytest.approx(values.std(axis=0), rel=1e-12)
    assert (held_out.mean, held_out.std) == (whole.mean, whole.std)
    assert (len(held_out.train), len(held_out.evaluation)) == (7, 5)


def test_warnings_are_afterwards_as_they_were(root):
    """If each thread set and reset the filters, some would restore those of another thread."""
    before = list(warnings.filters)
    for seed in range(300):
        write(root / "train" / "ant" / f"more{seed}.png", seed=seed)
    load(root)
    assert list(warnings.filters) == before


def test_a_picture_that_may_be_an_attack_is_refused(root):
    write(root / "train" / "ant" / "large.png", size=(50, 50))
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(ValueError, match=r"1 of 13 images .*more than 2,499 pixels"):
        load(root, max_pixels=2499)
    assert len(load(root, max_pixels=2500).train) == 13
    assert before == Image.MAX_IMAGE_PIXELS


# ---- The cache ----------------------------------------------------------------------------------


def unreadable(*_):
    raise AssertionError("an image was read again")


def test_images_are_read_once(root, monkeypatch):
    first = load(root)
    monkeypatch.setattr(folder, "decode", unreadable)
    again = load(root)
    assert torch.equal(first.train.pixels, again.train.pixels)
    assert torch.equal(first.evaluation.pixels, again.evaluation.pixels)
    assert (first.mean, first.std) == (again.mean, again.std)


@pytest.mark.parametrize("change", ["content", "size", "name", "one more"])
def test_what_has_changed_is_read_again(root, change):
    before = load(root).train.pixels
    size = 8
    first = root / "train" / "Bee" / "0.png"
    if change == "content":
        os.utime(first, ns=(1, 1))
        write(first, seed=77)
    elif change == "size":
        size = 9
    elif change == "name":
        first.rename(first.with_name("9.png"))
    else:
        write(root / "train" / "Bee" / "00.png", seed=78)
    after = load(root, size=size).train.pixels
    assert before.shape != after.shape or not torch.equal(before, after)


def swap_by_mv(first, second):
    first.rename(first.with_suffix(".tmp"))
    second.rename(first)
    first.with_suffix(".tmp").rename(second)


def swap_by_cp(first, second):
    times = [(path.stat().st_atime_ns, path.stat().st_mtime_ns) for path in (first, second)]
    contents = first.read_bytes(), second.read_bytes()
    for path, content, ns in zip((second, first), contents, times, strict=True):
        path.write_bytes(content)
        os.utime(path, ns=ns)


@pytest.mark.parametrize("swap", [swap_by_mv, swap_by_cp])
@pytest.mark.parametrize("val_size", [0, 4])
def test_files_of_one_size_and_time_that_are_swapped_are_read_again(root, swap, val_size):
    first, second = root / "train" / "ant" / "a.bmp", root / "train" / "Bee" / "a.bmp"
    for seed, path in enumerate((first, second)):
        write(path, size=(8, 8), seed=50 + seed)
        os.utime(path, ns=(10**18, 10**18))
    load(root, val_size=val_size)
    swap(first, second)
    assert first.stat().st_mtime_ns == second.stat().st_mtime_ns
    after = load(root, val_size=val_size)
    for file in image_cache.cache_folder().iterdir():
        file.unlink()
    fresh = load(root, val_size=val_size)
    assert torch.equal(after.train.pixels, fresh.train.pixels)
    assert torch.equal(after.evaluation.pixels, fresh.evaluation.pixels)
    assert after.digest == fresh.digest


def test_a_set_that_was_moved_or_renamed_is_not_read_again(root, monkeypatch):
    first = load(root)
    moved = root.rename(root.with_name("other place"))
    (moved / "train" / "ant" / "0.png").rename(moved / "train" / "ant" / "00.png")
    monkeypatch.setattr(folder, "decode", unreadable)
    assert torch.equal(load(moved).train.pixels, first.train.pixels)


def test_a_file_that_changes_while_it_is_read_is_not_kept_as_what_it_was(root, monkeypatch):
    def changing(*_):
        write(root / "train" / "Käfer" / "2.png", seed=99)
        return key(*_)

    key = folder._key
    monkeypatch.setattr(folder, "_key", changing)
    with pytest.raises(ValueError, match=r"2\.png was changed while it was read"):
        load(root)
    assert not list(image_cache.cache_folder().iterdir())


def long_facts(content):
    """Make the file claim that its JSON facts have 10^13 bytes."""
    return content[:-12] + (10**13).to_bytes(8, "little") + content[-4:]


def one_bit(content):
    return content[:100] + bytes([content[100] ^ 1]) + content[101:]


def whole_with(facts):
    """Replace the facts and keep the checksum valid, as another program might."""

    def damage(content):
        start = content[:300] + facts + len(facts).to_bytes(8, "little")
        return start + zlib.crc32(start).to_bytes(4, "little")

    return damage


DAMAGES = {
    "no facts": whole_with(b"none"),
    "a list of facts": whole_with(b"[1, 2]"),
    "more images": whole_with(b'{"images": 1000000000}'),
    "other facts": whole_with(b'{"images": 1, "more": 1}'),
    "cut": lambda content: content[:200],
    "one short": lambda content: content[:-1],
    "empty": lambda content: b"",
    "short": lambda content: b"1234",
    "long facts": long_facts,
    "one bit": one_bit,
    "zeros": lambda content: bytes(len(content)),
    "longer": lambda content: content + b"\0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_cache_is_made_anew(root, damage):
    first = load(root).train.pixels.clone()
    kept = {path: path.read_bytes() for path in image_cache.cache_folder().iterdir()}
    for path, content in kept.items():
        path.write_bytes(DAMAGES[damage](content))
    assert torch.equal(load(root).train.pixels, first)
    assert {path: path.read_bytes() for path in image_cache.cache_folder().iterdir()} == kept


def test_a_pipe_in_the_cache_is_not_waited_for(root):
    first = load(root).train.pixels.clone()
    for path in image_cache.cache_folder().iterdir():
        path.unlink()
        os.mkfifo(path)
    assert torch.equal(load(root).train.pixels, first)


def test_images_may_be_written_to_and_the_cache_stays_as_it_was(root):
    first = load(root).train.pixels
    before = first.clone()
    first.zero_()
    assert torch.equal(load(root).train.pixels, before)


@pytest.mark.parametrize("fault", ["full", "no room", "no folder", "no home"])
def test_a_cache_that_cannot_be_written_costs_nothing_else(root, monkeypatch, tmp_path, fault):
    whole = load(root, size=8).train.pixels.clone()
    shutil.rmtree(tmp_path / "cache")
    left = iter([1])

    def full(*_):
        if next(left, 0):  # there is room for the first block
            return 0
        raise OSError(28, "No space left on device")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    if fault == "full":
        monkeypatch.setattr(image_cache, "_write", full)
    elif fault == "no room":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 8, 1))
    elif fault == "no folder":
        (tmp_path / "cache").write_text("a file")
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", homeless)
    assert torch.equal(load(root).train.pixels, whole)
    if fault in ("full", "no room"):
        assert not list((tmp_path / "cache" / "aaconv").iterdir())


def test_the_folder_of_the_cache_is_nobody_elses(root):
    """Compiled kernels are stored there, and loaded only if nobody else could have changed them."""
    before = os.umask(0o002)
    try:
        load(root)
    finally:
        os.umask(before)
    for path in (image_cache.cache_folder(), *image_cache.cache_folder().iterdir()):
        assert not path.stat().st_mode & 0o077


def test_ctrl_c_leaves_nothing_in_the_cache(root, monkeypatch, tmp_path):
    def pressed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(image_cache, "_write", pressed)
    with pytest.raises(KeyboardInterrupt):
        load(root)
    assert not list((tmp_path / "cache" / "aaconv").iterdir())


# ---- What is rejected ---------------------------------------------------------------------------


def remove(*parts):
    def change(root):
        place = root.joinpath(*parts)
        place.rename(root.parent / "removed")

    return change


def damage(*files):
    def change(root):
        for file in files:
            path = root / "train" / file
            content = path.read_bytes()
            path.write_bytes(content[: random.Random(file).randrange(len(content) // 2)])

    return change


def only_one_class(root):
    for name in CLASSES[1:]:
        (root / "train" / name).rename(root.parent / name)


REFUSED = {
    "no root": (remove(), {}, FileNotFoundError, "there is no such folder"),
    "no train": (remove("train"), {}, FileNotFoundError, "the images of each class belong in"),
    "no val": (remove("val"), {}, FileNotFoundError, "data.val_size=N evaluates on N"),
    "one class": (only_one_class, {}, ValueError, "has 1 folders; expected one for each class"),
    "strange class in val": (
        lambda root: (root / "val" / "Bee").rename(root / "val" / "bee"),
        {},
        ValueError,
        "the class 'bee', which train/ does not have",
    ),
    "empty val": (
        lambda root: [p.unlink() for p in (root / "val").glob("*/*")],
        {},
        ValueError,
        "val/Bee has no image; add images or delete it",
    ),
    "one damaged": (
        damage("Bee/1.png"),
        {},
        ValueError,
        "1 of 12 images cannot be read; repair or delete",
    ),
    "many damaged": (
        damage("Bee/1.png", "ant/0.png", "ant/1.png", "c d/2.png", "Käfer/0.png"),
        {},
        ValueError,
        "; and 2 more",
    ),
    "all held out": (None, {"val_size": 12}, ValueError, "val_size=12 cannot be held out of 12"),
    "less than none": (None, {"val_size": -1}, ValueError, "val_size=-1 cannot be held out"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_named_in_one_line(root, case):
    change, settings, kind, words = REFUSED[case]
    if change is not None:
        change(root)
    with pytest.raises(kind) as caught:
        load(root, **settings)
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
    if "damaged" in case:
        assert str(root / "train" / "Bee" / "1.png") in line
        assert not list(image_cache.cache_folder().iterdir())


def test_an_empty_name_is_refused(root):
    with pytest.raises(ValueError, match=r"data\.name= must not be empty"):
        load_folder(str(root), "", 8)


# ---- A run --------------------------------------------------------------------------------------


@pytest.fixture
def words(root):
    return ["data=folder", f"data.root='{root}'", *RUN]


def test_a_size_with_names_is_refused(words, settings):
    with pytest.raises(ValueError, match=r"^data\.size=.* must be at least 1"):
        check(settings("data.size={height:8}", base=[w for w in words if "size=8" not in w]))


def test_a_run_is_called_after_its_folder_and_evaluated_on_one_that_is_named(
    words, run, root, tmp_path
):
    summary = run(base=words)
    assert (summary["data"], summary["class_names"]) == ("my images", sorted(CLASSES))
    assert "val/top1" in summary
    trained = models.load(tmp_path / "run")
    with pytest.raises(ValueError, match=r"folder my images; give its location with data\.root="):
        compose_settings(trained, "RUN", [], ())
    cfg = compose_settings(trained, "RUN", [f"data.root='{root}'"], ())
    assert cfg.data.size == 8
    dataset = load_data(cfg, trained, "RUN")
    assert (dataset.name, dataset.class_names) == ("my images", tuple(trained.class_names))
    assert summary["evaluated_on"] == dataset.evaluated_on


def test_runs_on_two_folders_have_two_folders(untrained, tmp_path):
    for words in ("data.root=a", "data.root=x/b", "data.root=a data.name=c", "data.root=a seed=1"):
        call(cli.run, "data=folder", f"out_dir='{tmp_path}'", *words.split())
    names = [str(place.relative_to(tmp_path / "train")) for place in untrained]
    assert names == [
        "data=folder,data.name=a/seed=0",
        "data=folder,data.name=b/seed=0",
        "data.name=c,data=folder/seed=0",
        "data=folder,data.name=a/seed=1",
    ]


def test_comparisons_on_two_folders_have_two_folders(tmp_path):
    vary = [["attention=none,aa"]]
    (first, runs), (second, _), (same, _) = (
        compare.plan(vary, [0], ["data=folder", f"data.root={root}", *more], tmp_path)
        for root, more in (("a", []), ("b", []), ("c/b", ["data.name=a"]))
    )
    assert first.name == "data=folder,data.name=a"
    assert second.name == "data=folder,data.name=b"
    assert same == first
    assert len(runs) == 2


@pytest.mark.parametrize(
    ("main", "words"), [(cli.run, ["out_dir=."]), (compare.main, ["--"])], ids=["train", "compare"]
)
def test_a_missing_root_is_asked_for(monkeypatch, capsys, tmp_path, main, words):
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, main, *words, "data=folder")
    assert line.endswith(".py: data.root has no value; give data.root=...\n")
    assert not list(tmp_path.iterdir())
