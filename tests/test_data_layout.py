"""Which files of a folder are images of which class: layouts, links, names, ignored files."""

import os
import shutil
import unicodedata
from pathlib import Path

import pytest

from data.dataset import hold_out_by_class
from data.layout import find_evaluation_images

from image_folders import CLASSES, load, write


def move_up(root):
    """Move the classes of train/ to the top level, and remove the other folders."""
    (root / "val").rename(root.parent / "val")
    for path in (root / "train").iterdir():
        path.rename(root / path.name)
    (root / "train").rmdir()


# ---- Layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["valid", "validation", "Val", "VALID"])
def test_other_names_of_the_validation_folder(root, name):
    before = load(root)
    (root / "val").rename(root / name)
    dataset = load(root)
    assert (dataset.evaluated_on, dataset.digest) == ("val", before.digest)


@pytest.mark.parametrize(
    ("first", "second"), [("train", "Train"), ("train", "training"), ("val", "valid")]
)
def test_two_folders_of_one_split_are_refused(root, first, second):
    (root / second).symlink_to(root / first)  # the same folder twice is allowed
    assert load(root).train
    (root / second).unlink()
    (root / second).mkdir()
    both = f"{min(first, second)}/ and {max(first, second)}/"
    with pytest.raises(ValueError, match=rf": it has {both}; keep only one of them"):
        load(root)
    if first == "val":  # not read with val_size
        assert load(root, val_size=3).train


@pytest.mark.parametrize("name", ["test", "testing", "Testing"])
def test_a_test_folder_alone_is_evaluated_on_as_test(root, name):
    (root / "val").rename(root / name)
    (root / "train").rename(root / {"test": "train"}.get(name, "Training"))
    dataset = load(root)
    assert (dataset.evaluated_on, len(dataset.evaluation)) == ("test", 3)


def test_validation_images_come_before_test_images(root):
    for number in range(5):
        write(root / "test" / "ant" / f"{number}.png", seed=number)
    dataset = load(root)
    assert (dataset.evaluated_on, len(dataset.evaluation)) == ("val", 3)


def test_classes_without_a_training_folder_need_a_hold_out(root):
    held_out = load(root, val_size=4)
    move_up(root)
    line = "to take its 4 folders as the classes, data.val_size=N evaluates on N"
    with pytest.raises(FileNotFoundError, match=line):
        load(root)
    dataset = load(root, val_size=4)
    assert (dataset.class_names, dataset.digest) == (held_out.class_names, held_out.digest)
    assert (len(dataset.train), len(dataset.evaluation)) == (8, 4)


@pytest.mark.parametrize("other", ["val", "Testing"])
def test_an_evaluation_folder_without_a_training_folder_is_no_class(root, other):
    move_up(root)
    write(root / other / "x" / "0.png")
    with pytest.raises(FileNotFoundError, match="no folder train/"):
        load(root, val_size=4)


@pytest.mark.parametrize("place", [".", "Test", "valid"])
def test_a_test_set_needs_no_training_folder_and_may_lack_classes(root, place):
    """Labels are indices of the network's classes, in any order and Unicode form."""
    classes = [unicodedata.normalize("NFD", name) for name in reversed(CLASSES)]
    shutil.rmtree(root / "train")
    (root / "val").rename(root / "new")
    if place == ".":
        for path in (root / "new").iterdir():
            path.rename(root / path.name)
        (root / "new").rmdir()
    else:
        (root / "new").rename(root / place)
    found = find_evaluation_images(root, classes)
    labels = {image.name: image.label for image in found.evaluation}
    assert labels == {f"{name}/x.png": CLASSES[::-1].index(name) for name in CLASSES[:3]}
    assert found.evaluated_on == ("val" if place == "valid" else "test")
    assert not found.train


def test_a_class_may_be_called_as_a_split_is(tmp_path):
    """CIFAR-100 has a class "train", for example."""
    for name in ("train", "bus", "test"):
        write(tmp_path / name / "0.png")
    found = find_evaluation_images(tmp_path, ["bus", "test", "train", "tram"])
    assert [image.name for image in found.evaluation] == ["bus/0.png", "test/0.png", "train/0.png"]


def tiny(root):
    """Arrange val/ like Tiny ImageNet's: all images in one folder, classes in a text file."""
    rows = []
    for number, name in enumerate(["Bee", "ant", "Bee"]):
        write(root / "val" / "images" / f"val_{number}.JPEG", seed=200 + number)
        rows.append(f"val_{number}.JPEG\t{name}\t0\t32\t44\t62\n")
    for name in CLASSES[:3]:
        (root / "val" / name / "x.png").unlink()
        (root / "val" / name).rmdir()
    (root / "val" / "val_annotations.txt").write_text("".join(rows))


def test_tiny_imagenet_as_it_is_downloaded(root):
    tiny(root)
    for name in CLASSES:
        (root / "train" / name / "images").mkdir()
        for path in (root / "train" / name).glob("*.png"):
            path.rename(path.parent / "images" / path.name)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0.png\t0\t32\t44\t62\n")
    (root / "wnids.txt").write_text("\n".join(CLASSES))
    write(root / "test" / "images" / "test_0.JPEG")
    dataset = load(root)
    labelled = sorted(["Bee", "Bee", "ant"])
    assert [dataset.class_names[i] for i in dataset.evaluation.labels.tolist()] == labelled
    assert (len(dataset.train), dataset.evaluated_on) == (12, "val")
    assert dataset.notes[0].endswith("4 other files passed over (.txt 4)")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda val: write(val / "images" / "9.JPEG"), "does not say the class of 9.JPEG"),
        (lambda val: (val / "images" / "val_1.JPEG").unlink(), "that are not there: val_1.JPEG"),
        (
            lambda val: (val / "val_annotations.txt").write_text(
                "val_0.JPEG\tant\nval_1.JPEG\tant\nval_2.JPEG\tcow\n"
            ),
            "has the class 'cow', which train/ does not have",
        ),
        (
            lambda val: write(val / "ant" / "val_1.JPEG"),
            "gives no single class to val_1.JPEG: the name appears twice",
        ),
        (
            lambda val: (val / "val_annotations.txt").write_text(
                "val_0.JPEG\tant\nval_1.JPEG\tant\nval_2.JPEG\tBee\nval_0.JPEG\tBee\n"
            ),
            "gives no single class to val_0.JPEG: the name appears twice",
        ),
    ],
)
def test_annotations_that_do_not_fit_are_refused(root, change, line):
    tiny(root)
    change(root / "val")
    with pytest.raises(ValueError, match=line):
        load(root)


# ---- Links and files of other programs ----------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "target"),
    [
        ("train/ant/up", ".."),
        ("train/ant/self", "."),
        ("train/ant/bees", "../Bee"),
        ("train/ant/deep/far", "{elsewhere}"),
        ("val/Bee/slash", "/"),
        ("train/up", ".."),
        ("train/here", "."),
        ("train/more ants", "ant"),
        ("train/gone", "nowhere"),
        ("train/round", "round"),
    ],
)
def test_links_that_leave_a_class_or_loop_are_named_and_not_followed(root, place, target, caplog):
    before = load(root)
    write(root.parent / "elsewhere" / "0.png")
    link = root / place
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(target.format(elsewhere=root.parent / "elsewhere"))
    dataset = load(root)
    assert dataset.digest == before.digest
    assert dataset.notes[1] == f"mine: links to folders that are not followed: {link}"
    assert dataset.notes[1] in caplog.messages


def test_two_links_that_lead_to_each_other_are_named(root):
    (root / "train" / "ant" / "a").symlink_to("../Bee/b")
    (root / "train" / "Bee" / "b").symlink_to("..")
    dataset = load(root)
    assert len(dataset.train) == 12
    assert dataset.notes[1].endswith(f"{root}/train/Bee/b, {root}/train/ant/a")


@pytest.mark.parametrize("place", ["train", "val", "train/ant", "val/Bee"])
def test_the_folder_of_a_split_or_a_class_may_be_a_link(root, place):
    before = load(root)
    elsewhere = root.parent / "elsewhere"
    (root / place).rename(elsewhere)
    (root / place).symlink_to(elsewhere)
    dataset = load(root)
    assert dataset.digest == before.digest
    assert len(dataset.notes) == 1


def test_a_link_to_an_image_is_an_image(root):
    write(root.parent / "photo.png", seed=5)
    (root / "train" / "ant" / "photo.png").symlink_to(root.parent / "photo.png")
    assert len(load(root).train) == 13


@pytest.mark.parametrize("name", ["@eaDir", "__MACOSX", ".thumbs", "#recycle", "$RECYCLE.BIN"])
@pytest.mark.parametrize("place", ["train", "val", "train/ant", "val/ant/deep"])
def test_what_other_programs_leave_is_passed_over(root, name, place):
    before = load(root)
    write(root / place / name / "0.png")
    (root / place / "._0.png").write_bytes(b"of macOS, no image")
    assert (load(root).digest, load(root).notes) == (before.digest, before.notes)


def test_a_recovered_folder_is_no_class_of_a_root_without_train(root):
    move_up(root)
    (root / "lost+found").mkdir()
    (root / "notes.txt").write_text("")
    assert load(root, val_size=4).class_names == tuple(sorted(CLASSES))


# ---- Names --------------------------------------------------------------------------------------


def test_two_normal_forms_of_a_name_are_one_class(root):
    before = load(root)
    other = unicodedata.normalize("NFD", "Käfer")
    assert other != "Käfer"
    (root / "train" / other).mkdir()
    (root / "train" / "Käfer" / "1.png").rename(root / "train" / other / "1.png")
    dataset = load(root)
    assert dataset.class_names == before.class_names
    assert (dataset.digest, len(dataset.train)) == (before.digest, 12)


def test_a_class_to_evaluate_on_may_have_the_other_form(root):
    write(root / "val" / unicodedata.normalize("NFD", "Käfer") / "0.png")
    dataset = load(root)
    assert dataset.class_names.index("Käfer") in dataset.evaluation.labels.tolist()


@pytest.mark.parametrize("name", ["a\nb", "red\x1b[31m", "left\u202eright", "zero\x01", "\udcff"])
def test_class_names_that_no_line_can_show_are_refused(root, name):
    write(root / "train" / name / "0.png")
    with pytest.raises(ValueError, match="needs a name of printable characters") as caught:
        load(root)
    assert str(caught.value).isprintable()


# ---- Files that are read or ignored -------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "format"),
    [
        ("gif", None),
        ("GIF", "gif"),
        ("jfif", "jpeg"),
        ("jpe", "jpeg"),
        ("tga", None),
        ("ico", "png"),
        ("dds", None),
        ("pcx", None),
        ("jp2", None),
        ("webp", None),
    ],
)
def test_what_pillow_opens_is_taken(root, ending, format):
    from PIL import Image

    picture = Image.new("RGB", (8, 8), (250, 250, 250))
    picture.save(root / "train" / "ant" / f"z.{ending}", format=format)
    dataset = load(root)
    ants = dataset.train.pixels[dataset.train.labels == dataset.class_names.index("ant")]
    assert len(ants) == 4
    assert ants[-1].min() > 240


def test_one_line_says_what_was_found(root, caplog):
    caplog.set_level("INFO")
    for number in range(18):
        (root / "train" / "ant" / f"{number}.txt").write_text("a caption")
    for number in range(4):
        (root / "val" / "Bee" / f"{number}.MD").write_text("a note")
    dataset = load(root)
    line = "mine: 12 images to train on, 3 to evaluate on, 22 other files passed over"
    assert dataset.notes == (f"{line} (.txt 18, .md 4)",)
    assert dataset.notes[0] in caplog.messages
    for name in ("a.x", "b.x", "c.y", "d.y", "e"):
        (root / "train" / name).write_text("")
    assert (
        load(root).notes[0].endswith("27 other files passed over (.txt 18, .md 4, .x 2, others 3)")
    )


@pytest.mark.parametrize("name", ["a\nb.png", "\x1b[31m.png", "\udcff.png", "x.\udcff\n"])
def test_names_that_no_terminal_can_show_are_escaped(root, name, caplog):
    caplog.set_level("INFO")
    (root / "train" / "ant" / name).write_bytes(b"")
    (root / "train" / "ant" / f"{name[:-4]}link").symlink_to("..")
    lines = [*load(root, skip_damaged=True).notes]
    assert set(lines) <= set(caplog.messages)
    if name.endswith("png"):
        with pytest.raises(ValueError, match="1 of 13 images") as caught:
            load(root)
        lines.append(str(caught.value))
    assert len(lines) >= 2
    assert all(line.isprintable() for line in lines)


def test_files_that_run_a_program_are_not_taken(root):
    (root / "train" / "ant" / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n")
    (root / "train" / "ant" / "b.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
    )
    with pytest.raises(ValueError, match=r"1 of 13 images.*not an image that Pillow can read"):
        load(root)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_class_without_images_is_refused_by_name(root, split):
    for path in (root / split / "Bee").iterdir():
        path.rename(path.with_suffix(".heif2"))
    number = {"train": 3, "val": 1}[split]
    line = rf"{split}/Bee has no image, but other files \(\.heif2 {number}\); add images or delete"
    with pytest.raises(ValueError, match=line):
        load(root)


def test_the_same_image_in_both_parts_is_said(root, caplog):
    first, second = root / "train" / "ant" / "1.png", root / "val" / "Bee" / "copy.png"
    second.write_bytes(first.read_bytes())
    dataset = load(root)
    (line,) = dataset.notes[1:]
    assert line.startswith("mine: 1 of 4 images to evaluate on are among those to train on: ")
    assert line.endswith(f"{second} is identical to {first}")
    assert line in caplog.messages


# ---- Holding out --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counts", "size", "expected"),
    [
        ([40, 40, 2], 40, [20, 19, 1]),
        ([40, 40, 1], 40, [20, 20, 0]),
        ([10, 10], 5, [3, 2]),
        ([1, 1, 30], 29, [0, 0, 29]),
        ([5, 5, 5], 12, [4, 4, 4]),
        ([100, 1], 1, [1, 0]),
        ([3, 0, 3], 2, [1, 0, 1]),
    ],
)
def test_images_are_held_out_by_class(counts, size, expected):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    held_out = hold_out_by_class(labels, size)
    assert held_out == sorted(set(held_out))
    assert [sum(labels[i] == label for i in held_out) for label in range(len(counts))] == expected


@pytest.mark.parametrize("size", [-1, 0, 4, 10])
def test_no_class_is_held_out_whole(size):
    with pytest.raises(ValueError, match=f"val_size={size} cannot be held out of 6.*to 3$"):
        hold_out_by_class([0, 0, 1, 1, 2, 2], size)


def test_a_hold_out_is_random_and_always_the_same():
    labels = [0] * 50 + [1] * 50
    held_out = hold_out_by_class(labels, 20)
    assert held_out == hold_out_by_class(labels, 20)
    first = [i for i in held_out if i < 50]
    assert first != list(range(10))
    assert [i + 50 for i in first] != [i for i in held_out if i >= 50]


def test_a_folder_is_held_out_by_class(root):
    dataset = load(root, val_size=4)
    assert dataset.evaluation.labels.tolist() == [0, 1, 2, 3]
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


# ---- The digest ---------------------------------------------------------------------------------


def change_bytes(root):
    path = root / "val" / "Bee" / "x.png"
    path.write_bytes(path.read_bytes() + b"\0")  # the same pixels


def swap(first, second):
    contents = first.read_bytes(), second.read_bytes()
    second.write_bytes(contents[0])
    first.write_bytes(contents[1])


DIFFERENT = {
    "bytes": change_bytes,
    "pixels": lambda root: write(root / "train/ant/0.png", seed=500),
    "label": lambda root: (root / "train/ant/0.png").rename(root / "train/Bee/x.png"),
    "two labels": lambda root: swap(root / "train/ant/0.png", root / "train/Bee/0.png"),
    "two labels there": lambda root: swap(root / "val/ant/x.png", root / "val/Bee/x.png"),
    "name": lambda root: (root / "train/ant/0.png").rename(root / "train/ant/9.png"),
    "class": lambda root: [(root / s / "ant").rename(root / s / "Ant") for s in ("train", "val")],
    "one class more": lambda root: write(root / "train/zebra/0.png", seed=8),
    "one image less": lambda root: (root / "train/ant/0.png").unlink(),
    "one less": lambda root: (root / "val/ant/x.png").unlink() or (root / "val/ant").rmdir(),
    "one more": lambda root: write(root / "val" / "ant" / "y.png", seed=3),
    "from one split to the other": lambda root: swap(
        root / "train/ant/0.png", root / "val/ant/x.png"
    ),
}


@pytest.mark.parametrize("change", DIFFERENT)
def test_the_digest_tells_images_from_others(root, change):
    before = load(root).digest
    assert len(before) == 16
    int(before, 16)
    DIFFERENT[change](root)
    assert load(root).digest != before


def test_the_digest_is_of_the_files_and_of_nothing_else(root, monkeypatch, tmp_path):
    before = load(root).digest
    moved = root.rename(tmp_path / "elsewhere")
    for path in moved.rglob("*.png"):
        os.utime(path, ns=(7, 7))
    (moved / "train" / "ant" / "notes.txt").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other cache"))
    assert load(moved, size=[4, 5]).digest == before
    assert load(moved, val_size=4).digest not in (before, load(moved, val_size=5).digest)
    assert Path(tmp_path / "other cache").exists()
