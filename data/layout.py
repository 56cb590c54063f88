"""Find the image files of a folder and their classes: layouts, links, names, skipped files."""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data.pictures import endings

# Folder names of each split, which are looked for in this order; case does not matter.
TRAIN = ("train", "training")
VALIDATION = ("val", "valid", "validation")
TEST = ("test", "testing")
# Tiny ImageNet: each line names an image in val/images/ and, after a tab, its class.
ANNOTATIONS = "val_annotations.txt"
# Names, in lower case, that other programs leave next to images, besides those with a dot first.
_STRAY = {"@eadir", "__macosx", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
_STRAY |= {"system volume information"}
# More indicate a mistake: a folder of the system, not of a data set.
MAX_CLASSES = 100_000
# Number of links or kinds of files that a message names.
NAMED = 3


@dataclass(frozen=True)
class ImageFile:
    """An image: its path, its name relative to the split's folder, in NFC, and its class index."""

    path: Path
    name: str
    label: int


@dataclass
class Layout:
    """What was found in a folder.

    Attributes:
        classes: their names, in NFC; sorted, or in the order of the network that is evaluated.
        train, evaluation: the images, sorted by class and name; ``evaluation`` is empty if it is
            held out of the training images.
        evaluated_on: "val", or "test" if there is only a test folder.
        passed_over: number of other files by file extension.
        links: links that are not followed.
    """

    classes: list[str] = field(default_factory=list)
    train: list[ImageFile] = field(default_factory=list)
    evaluation: list[ImageFile] = field(default_factory=list)
    evaluated_on: str = "val"
    passed_over: Counter[str] = field(default_factory=Counter)
    links: list[Path] = field(default_factory=list)


def find_images(root: Path, hold_out: bool) -> Layout:
    """Find the images of a folder in one of these layouts:

    - ``train/CLASS/`` with ``val/CLASS/``, ``valid/CLASS/`` or else ``test/CLASS/``;
    - the same as in Tiny ImageNet, ``val/images/`` with the classes in a text file;
    - ``CLASS/`` alone, with ``hold_out``: evaluation is on images held out of the training ones,
      and no other folder is read.

    All images below the folder of a class, at any depth, belong to that class. Two folders whose
    names differ only in Unicode normalization are one class. The folders named above may be links;
    links to folders below them are not followed.

    Raises:
        FileNotFoundError: if there is no folder to train on, or none to evaluate on.
        ValueError: for fewer than two classes, a class without images, or an evaluation class that
            is not trained on.
        OSError: if a folder cannot be read.
    """
    found = Layout()
    training = _split(root, TRAIN)
    evaluation = None
    if training is None or not hold_out:
        evaluation = _split(root, VALIDATION) or _split(root, TEST)
    if training is None:
        number = len(_subfolders(root))
        if evaluation is not None or number < 2:
            raise FileNotFoundError(
                f"data.root={root}: it has no folder train/; the images of each class "
                "belong in train/CLASS/"
            )
        if not hold_out:
            raise FileNotFoundError(
                f"data.root={root}: it has no folder train/; to take its {number} folders "
                "as the classes, data.val_size=N evaluates on N images held out of them"
            )
        training = root
    elif evaluation is None and not hold_out:
        raise FileNotFoundError(
            f"data.root={root}: it has no folder val/, valid/ or test/; data.val_size=N "
            f"evaluates on N images held out of {training.name}/"
        )
    folders = _class_folders(training, found)
    found.classes = sorted(folders)
    if not 2 <= len(folders) <= MAX_CLASSES:
        raise ValueError(
            f"{training} has {len(folders)} folders; expected one for each class, 2 to "
            f"{MAX_CLASSES:,}"
        )
    found.train = _images_of(training, folders, found)
    if not hold_out:
        assert evaluation is not None
        found.evaluated_on = "test" if evaluation.name.lower() in TEST else "val"
        found.evaluation = _evaluation_images(evaluation, f"{training.name}/", found)
    return found


def find_evaluation_images(root: Path, classes: Sequence[str]) -> Layout:
    """Find the images to evaluate a network with ``classes`` on; ``train`` stays empty.

    They are in ``val/``, ``valid/`` or else ``test/``, as for `find_images`. In a folder that has
    none of these and no ``train/``, they are in the class folders themselves and count as a test
    set. Classes may be missing.

    Raises:
        FileNotFoundError: if there are none.
        ValueError: for a class that the network does not have, or one without images.
        OSError: if a folder cannot be read.
    """
    found = Layout(classes=[_normal(name) for name in classes])
    split = _split(root, VALIDATION)
    found.evaluated_on = "val" if split else "test"
    split = split or _split(root, TEST)
    # A class can have the name of a split: CIFAR-100 has a class named train.
    names = {_normal(path.name) for path in _subfolders(root)}
    if names and names <= set(found.classes):
        split, found.evaluated_on = root, "test"
    elif split is None and _split(root, TRAIN) is not None:
        raise FileNotFoundError(
            f"data.root={root}: it has no folder val/, valid/ or test/ to evaluate on"
        )
    found.evaluation = _evaluation_images(split or root, "the network", found)
    return found


def _split(root: Path, names: tuple[str, ...]) -> Path | None:
    """Return the folder in ``root`` that has one of these ``names``; None if there is none."""
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root}: there is no such folder")
    folders = [path for path in sorted(_subfolders(root)) if path.name.lower() in names]
    there = {path.resolve(): path for path in folders if not _holds(path, root)}
    if len(there) > 1:
        both = " and ".join(f"{path.name}/" for path in there.values())
        raise ValueError(f"data.root={root}: it has {both}; keep only one of them")
    return next(iter(there.values()), None)


def _holds(path: Path, other: Path) -> bool:
    """Whether ``path`` is a link to ``other`` or to a folder that contains it."""
    return path.is_symlink() and other.resolve().is_relative_to(path.resolve())


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if not is_stray(path.name) and path.is_dir()]


def is_stray(name: str) -> bool:
    """Whether a file or folder of this name is hidden or was left there by another program."""
    return name[0] == "." or name.lower() in _STRAY


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _class_folders(split: Path, found: Layout) -> dict[str, list[Path]]:
    """Return the folders of each class, by class name."""
    _count(found, (path.name for path in split.iterdir() if path.is_file()))
    folders: dict[str, list[Path]] = {}
    for path in _without_loops(split, found):
        name = _normal(path.name)
        if not name.isprintable():  # bytes that are not text, or line breaks
            raise ValueError(f"{split}: the class {name!r} needs a name of printable characters")
        folders.setdefault(name, []).append(path)
    return folders


def _without_loops(split: Path, found: Layout) -> list[Path]:
    """Return the folders in ``split``, except links into one another or to a parent folder."""
    folders = sorted(_subfolders(split), key=lambda path: (path.is_symlink(), path))
    taken = [split.resolve()]
    fine = []
    for path in folders:
        real = path.resolve()
        if path.is_symlink() and any(
            one.is_relative_to(real) or (one != taken[0] and real.is_relative_to(one))
            for one in taken
        ):
            found.links.append(path)
            continue
        taken.append(real)
        fine.append(path)
    found.links += [
        path
        for path in split.iterdir()
        if path.is_symlink() and not path.exists() and not is_stray(path.name)
    ]
    return sorted(fine)


def _images_of(split: Path, folders: dict[str, list[Path]], found: Layout) -> list[ImageFile]:
    labels = {name: label for label, name in enumerate(found.classes)}
    images = []
    for name, places in sorted(folders.items()):
        before = found.passed_over.copy()
        paths = [path for place in places for path in _walk(place, found)]
        if not paths:
            others = in_words(found.passed_over - before)
            raise ValueError(
                f"{places[0]} has no image{others and f', but other files ({others})'}; add images "
                "or delete it"
            )
        inside = [_image(path, split, labels[name]) for path in paths]
        images += sorted(inside, key=lambda image: image.name.split("/"))
    return images


def _image(path: Path, split: Path, label: int) -> ImageFile:
    return ImageFile(path, _normal(path.relative_to(split).as_posix()), label)


def _walk(folder: Path, found: Layout) -> list[Path]:
    """Return the image files below ``folder``; note other files and links in ``found``."""
    images = []
    for where, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not is_stray(name)]
        found.links += [Path(where, name) for name in folders if Path(where, name).is_symlink()]
        names = [name for name in files if not is_stray(name)]
        images += [Path(where, name) for name in names if _ending(name) in endings()]
        _count(found, (name for name in names if _ending(name) not in endings()))
    return images


def _raise(error: OSError) -> None:
    raise error


def _ending(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _count(found: Layout, names: Iterable[str]) -> None:
    found.passed_over.update(
        _ending(name) or "no ending" for name in names if not is_stray(name) and name != ANNOTATIONS
    )


def _evaluation_images(split: Path, owner: str, found: Layout) -> list[ImageFile]:
    if (split / ANNOTATIONS).is_file():
        images = _annotated(split, owner, found)
    else:
        folders = _class_folders(split, found)
        _check_known(folders, split, owner, found)
        images = _images_of(split, folders, found)
    if not images:
        raise ValueError(f"{split} has no folder of a class with images in it")
    return images


def _check_known(names: Iterable[str], split: Path, owner: str, found: Layout) -> None:
    strange = sorted(set(names) - set(found.classes))
    if strange:
        raise ValueError(
            f"{split} has the class {strange[0]!r}, which {owner} does not have; {owner} has "
            f"{len(found.classes)} classes"
        )


def _annotated(split: Path, owner: str, found: Layout) -> list[ImageFile]:
    """Return the images of Tiny ImageNet's val/, whose classes are in a text file."""
    file = split / ANNOTATIONS
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    rows = [line.split("\t") for line in text.splitlines() if line]
    pairs = {(row[0], _normal(row[1])) for row in rows if len(row) > 1}
    paths = _walk(split, found)
    named = (Counter(name for name, _ in pairs), Counter(path.name for path in paths))
    twice = sorted({name for counts in named for name in counts if counts[name] > 1})
    if twice:
        raise ValueError(f"{file} gives no single class to {some(twice)}: the name appears twice")
    classes, images = dict(pairs), {path.name: path for path in paths}
    for text, names in (
        (f"{file} does not say the class of", images.keys() - classes.keys()),
        (f"{file} names images that are not there:", classes.keys() - images.keys()),
    ):
        if names:
            raise ValueError(f"{text} {some(sorted(names))}")
    _check_known(classes.values(), split, owner, found)
    labels = {name: label for label, name in enumerate(found.classes)}
    found_images = [_image(path, split, labels[classes[name]]) for name, path in images.items()]
    return sorted(found_images, key=lambda image: (image.label, image.name))


def in_words(counts: Counter[str]) -> str:
    """Format counts as ``.txt 18, .md 4``, the most frequent first."""
    most = counts.most_common(NAMED)
    words = [f"{shown(name)} {count}" for name, count in most]
    rest = counts.total() - sum(count for _, count in most)
    return ", ".join([*words, f"others {rest}"] if rest else words)


def some(lines: list[str], separator: str = ", ") -> str:
    """Join the first `NAMED` lines into one that any terminal can show; count the others."""
    more = f"{separator}and {len(lines) - NAMED} more" if len(lines) > NAMED else ""
    return shown(separator.join(lines[:NAMED])) + more


def shown(text: str) -> str:
    """Escape what cannot be printed in ``text``, such as line breaks in a file name."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
