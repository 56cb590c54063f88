"""Images of one's own, in a folder for each class, as torchvision's ImageFolder has them."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from aaconv.text import one_line
from data.dataset import Dataset, Images, check_val_size, hold_out
from data.pictures import read_by_several, reading

log = logging.getLogger(__name__)

# The endings that torchvision's ImageFolder reads; other files are passed over, as there.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
TRAIN, VAL = "train", "val"
LARGEST = 1024
# More are a slip: a folder of the computer's, not of a data set.
MOST_CLASSES = 100_000
# From this many images on there is a progress bar.
MANY = 500
# Damaged images that an error names.
NAMED = 3
# Of what is kept in the cache; another way to read or to scale raises it.
FORMAT = 1


def load_folder(
    root: str,
    name: str,
    size: int,
    val_size: int = 0,
) -> Dataset:
    """The images of ``root/train/CLASS/`` and ``root/val/CLASS/`` in memory, ``size`` x ``size``.

    Classes are the folders in ``train/`` in the order of their names, and every image below one of
    them, at any level, is of that class. How an image is brought to its size:
    `data.pictures.read_picture`. It is evaluated on ``val/``, or with ``val_size`` > 0 on that
    many images held out of the training set, and ``val/`` is not read. Mean and standard deviation
    are those of all images in ``train/``, exact but for the last rounding.

    What has been read is kept in `cache_folder`, by the names, sizes and times of the files, and
    the next run begins at once.

    Raises:
        FileNotFoundError: no ``train/``, or neither ``val/`` nor ``val_size``.
        ValueError: a value that does not fit, fewer than two classes, a class without an image or
            one of ``val/`` that ``train/`` lacks, or damaged images; the message names them.
        OSError: a folder cannot be read.
    """
    if not name:
        raise ValueError("data.name= must not be empty: runs are grouped by it")
    if not 1 <= size <= LARGEST:
        raise ValueError(f"data.size={size} must be at least 1 and at most {LARGEST} pixels")
    folder = Path(root).expanduser().absolute()
    if not (folder / TRAIN).is_dir():
        raise FileNotFoundError(
            f"data.root={root}: there is no folder {TRAIN}/ in it; the images of each class belong "
            f"in {TRAIN}/CLASS/"
        )
    if not val_size and not (folder / VAL).is_dir():
        raise FileNotFoundError(
            f"data.root={root}: there is no folder {VAL}/ in it; data.val_size=N evaluates on N "
            f"images held out of {TRAIN}/"
        )
    classes = _classes(folder / TRAIN)
    train_files = _files(folder / TRAIN, classes)
    for index, label in enumerate(classes):
        if not any(i == index for _, i in train_files):
            raise ValueError(f"{folder / TRAIN / label} has no image ({', '.join(ENDINGS)})")
    check_val_size(val_size, len(train_files))
    val_files = [] if val_size else _val_files(folder, classes)

    train = _images(train_files, size)
    mean, std = _mean_and_std(train.pixels, folder / TRAIN)
    if val_size:
        train, evaluation = hold_out(train, val_size)
    else:
        evaluation = _images(val_files, size)
    return Dataset(
        name=name,
        train=train,
        evaluation=evaluation,
        evaluated_on="val",
        num_classes=len(classes),
        class_names=tuple(classes),
        mean=mean,
        std=std,
    )


def _classes(folder: Path) -> list[str]:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    for name in names:
        if not name.isprintable():  # of bytes that are no text, or with line breaks
            raise ValueError(f"{folder}: the class {name!r} needs a name of printable characters")
    if not 2 <= len(names) <= MOST_CLASSES:
        raise ValueError(
            f"{folder} has {len(names)} folders; expected one for each class, 2 to {MOST_CLASSES:,}"
        )
    return names


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    """All images with the index of their class, in the order of class and name."""
    found = []
    for index, name in enumerate(classes):
        inside = []
        # ImageFolder follows links, too.
        for where, folders, files in os.walk(folder / name, followlinks=True, onerror=_raise):
            folders[:] = [one for one in folders if one[0] != "."]
            inside += [
                Path(where, file)
                for file in files
                if file.lower().endswith(ENDINGS) and file[0] != "."
            ]
        found += [(path, index) for path in sorted(inside)]
    return found


def _raise(error: OSError) -> None:
    raise error


def _val_files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    strange = sorted(
        path.name
        for path in (folder / VAL).iterdir()
        if path.is_dir() and path.name[0] != "." and path.name not in classes
    )
    if strange:
        raise ValueError(
            f"{folder / VAL} has the class {strange[0]!r}, which {TRAIN}/ has not; "
            f"{TRAIN}/ has {len(classes)} classes"
        )
    there = _files(folder / VAL, [name for name in classes if (folder / VAL / name).is_dir()])
    if not there:
        raise ValueError(f"{folder / VAL} has no image ({', '.join(ENDINGS)})")
    # A class of train/ may be absent from val/.
    present = [index for index, name in enumerate(classes) if (folder / VAL / name).is_dir()]
    return [(path, present[index]) for path, index in there]


# ---- Reading ------------------------------------------------------------------------------------


def _images(files: list[tuple[Path, int]], size: int) -> Images:
    labels = torch.tensor([index for _, index in files])
    kept = _cache_file(files, size)
    pixels = _from_cache(kept, (len(files), size, size, 3))
    if pixels is None:
        pixels = _read_all([path for path, _ in files], size)
        _to_cache(kept, pixels)
    return Images(pixels, labels)


def _read_all(paths: list[Path], size: int) -> Tensor:
    pixels = torch.empty(len(paths), size, size, 3, dtype=torch.uint8)
    faults = []

    def read(index: int) -> str | None:
        try:
            pixels[index] = read_by_several(paths[index], (size, size))
        except (ValueError, OSError) as error:
            return f"{paths[index]}: {one_line(error)}"
        return None

    # Pillow lets go of the interpreter while it decodes and scales.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    with reading():
        try:
            results = pool.map(read, range(len(paths)))
            hidden = None if len(paths) >= MANY else True  # None: where stderr is no terminal
            bar = tqdm(results, "images", total=len(paths), leave=False, disable=hidden)
            faults = [fault for fault in bar if fault is not None]
        finally:  # Ctrl-C does not wait for the rest
            pool.shutdown(cancel_futures=True)
    if faults:
        more = f", and {len(faults) - NAMED} more" if len(faults) > NAMED else ""
        raise ValueError(
            f"{len(faults)} of {len(paths)} images cannot be read; repair or delete "
            f"{'; '.join(faults[:NAMED])}{more}"
        )
    return pixels


def _mean_and_std(pixels: Tensor, folder: Path) -> tuple[Any, Any]:
    """Per channel, where white is 1, from whole numbers that are added without rounding."""
    number = pixels.numel() // 3
    total, squares = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for part in pixels.split(1000):
        values = part.reshape(-1, 3).long()
        total += values.sum(0)
        squares += values.square().sum(0)
    mean, std = [], []
    for one, square in zip(total.tolist(), squares.tolist(), strict=True):
        mean.append(one / number / 255)
        std.append((number * square - one * one) ** 0.5 / number / 255)
    if min(std) == 0:
        raise ValueError(f"{folder}: a color channel is constant over all images")
    return tuple(mean), tuple(std)


# ---- What is kept -------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Where images are kept as they have been read; a file there may be removed at any time."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "aaconv"


def _cache_file(files: list[tuple[Path, int]], size: int) -> Path | None:
    """By all that tells these files from others; None where there is no home for it."""
    digest = hashlib.blake2b(f"{FORMAT} {size}".encode(), digest_size=16)
    for path, _ in files:
        status = path.stat()
        digest.update(os.fsencode(path) + f"\0{status.st_size} {status.st_mtime_ns}\0".encode())
    try:
        return cache_folder() / f"images-{digest.hexdigest()}.npy"
    except RuntimeError:  # no home folder
        return None


def _from_cache(file: Path | None, shape: tuple[int, ...]) -> Tensor | None:
    if file is None:
        return None
    try:
        kept = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):  # absent, or cut short
        return None
    if not isinstance(kept, np.ndarray) or kept.shape != shape or kept.dtype != np.uint8:
        return None
    return torch.from_numpy(kept)


def _to_cache(file: Path | None, pixels: Tensor) -> None:
    """Whole or not at all; a disk that is full costs the next run time, and this one nothing."""
    if file is None:
        return
    made = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix="part-", delete=False) as part:
            made = Path(part.name)
            np.save(part, pixels.numpy())
        os.replace(made, file)
        made = None
    except OSError as error:
        log.info("the images are not kept for the next run: %s", error.strerror or error)
    finally:
        if made is not None:
            with suppress(OSError):
                made.unlink()
