"""Your own images, in one folder per class.

`data.layout` finds the image files and their classes, `data.pictures` decodes a file, and
`data.image_cache` keeps decoded images between runs. This module builds a data set from them: it
hashes the files, which gives the name of the cache file and `Dataset.digest`, holds out images for
evaluation by class, computes mean and standard deviation, and logs what it found.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import PIL
import torch
from torch import Tensor
from tqdm import tqdm

from aaconv.text import one_line
from data import image_cache
from data.dataset import Dataset, EvaluationSet, Images, digest_of, hold_out_by_class
from data.layout import (
    ImageFile,
    Layout,
    find_evaluation_images,
    find_images,
    in_words,
    some,
)
from data.pictures import (
    MAX_PIXELS,
    WHITE_OF_16_BITS,
    Decoded,
    check_white,
    decode,
    formats,
    read_file,
    reading,
)

log = logging.getLogger(__name__)

LARGEST = 1024
# From this many images on, a progress bar is shown.
MANY = 500
# Version of the cached content; raise it when reading or scaling changes.
FORMAT = 4
# Bytes of decoded images that are written to the cache at a time.
BLOCK = 2**24
# If no 16-bit image of a data set is this bright, its values probably have fewer bits.
DARK = (WHITE_OF_16_BITS + 1) // 4

Item = TypeVar("Item")
Result = TypeVar("Result")


class DecodeSettings(NamedTuple):
    """What determines the pixels of an image besides its file; see `load_folder`."""

    size: tuple[int, int]
    white: float | None
    max_pixels: int


@dataclass
class Facts:
    """What is found out when images are decoded; cached with them.

    Attributes:
        images: number of decoded images.
        total, squares: sums of all pixels and of their squares, for each channel.
        faults: the index of each file that is left out, and why.
        largest_gray, largest_color: maxima over all images; see `data.pictures.Decoded`.
    """

    images: int = 0
    total: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    faults: list[tuple[int, str]] = field(default_factory=list)
    largest_gray: float = -1
    largest_color: float = -1


@dataclass
class Split:
    """The images of a list of files.

    Attributes:
        taken: each file that is used, with the digest of its bytes.
        left_out: a line for each file that is not.
    """

    pixels: Tensor
    taken: list[tuple[ImageFile, bytes]]
    facts: Facts
    left_out: list[str]


def load_folder(
    root: str,
    name: str,
    size: int | Sequence[int],
    val_size: int = 0,
    white: float | None = None,
    skip_damaged: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> Dataset:
    """Load the images of a folder, in one of the layouts of `data.layout.find_images`.

    `data.pictures.decode` fits each image to ``size``, one number or (height, width). Evaluation
    uses the folder's own evaluation images or, with ``val_size`` > 0, that many training images,
    held out from each class in proportion. Mean and standard deviation are those of all training
    images, held-out ones included, exact except for the final rounding; a constant channel gets a
    deviation of 1.

    `data.image_cache` keeps the decoded images under a digest of all files, and they are mapped
    into memory from there: the next run starts at once, and they need not fit into memory.

    Args:
        white: the value of white in gray images of more than 8 bits; by default 65,535 for
            integers, while floating-point images are rejected.
        skip_damaged: whether to leave out files that cannot be read instead of raising an error.
        max_pixels: maximum number of pixels of an image.

    Raises:
        FileNotFoundError: if there is no folder to train on, or none to evaluate on.
        ValueError: for an invalid argument, fewer than two classes, a class without images, an
            evaluation class that is not trained on, files that cannot be read, or 16-bit images
            that are all dark; the message names them.
        OSError: if a folder cannot be read.
    """
    if not name:
        raise ValueError("data.name= must not be empty: runs are grouped by it")
    settings = _decode_settings(size, white, max_pixels)
    folder = Path(os.path.expanduser(root)).absolute()
    found = _find(folder, val_size)
    train = _read(found.train, settings, skip_damaged)
    evaluation = _read(found.evaluation, settings, skip_damaged)
    _check_brightness(folder, white, [train.facts, evaluation.facts])
    _check_classes(train, found)
    of_training = [train.facts, evaluation.facts] if val_size else [train.facts]
    mean, std = _mean_and_std(of_training, settings.size[0] * settings.size[1])
    what_was_found = _what_was_found(name, found, train, evaluation)
    log.info("%s", what_was_found)
    warnings = _faults_and_links(name, found, train, evaluation)
    warnings += _taken_twice(name, train, evaluation)
    for note in warnings:
        log.warning("%s", note)
    return Dataset(
        name=name,
        train=_labelled(train),
        evaluation=_labelled(evaluation),
        evaluated_on=found.evaluated_on,
        num_classes=len(found.classes),
        class_names=tuple(found.classes),
        mean=mean,
        std=std,
        digest=digest_of(_parts(found, train, evaluation)),
        notes=(what_was_found, *warnings),
    )


def folder_digest(
    root: str,
    size: int | Sequence[int],
    val_size: int = 0,
    white: float | None = None,
    skip_damaged: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> str:
    """Return `Dataset.digest` as `load_folder` would give it, from the bytes of the files.

    With ``skip_damaged``, images that are not in the cache are decoded, to know which of them can
    be read; otherwise no image is decoded.

    Raises:
        FileNotFoundError, ValueError, OSError: see `load_folder`.
    """
    found = _find(Path(os.path.expanduser(root)).absolute(), val_size)
    settings = _decode_settings(size, white, max_pixels)
    splits = [
        _read(files, settings, skip_damaged, decoded=False)
        for files in (found.train, found.evaluation)
    ]
    return digest_of(_parts(found, *splits))


def _find(folder: Path, val_size: int) -> Layout:
    """Find the images of a folder; held-out images are among those to evaluate on."""
    found = find_images(folder, hold_out=bool(val_size))
    if not val_size:
        return found
    held_out = set(hold_out_by_class([file.label for file in found.train], val_size))
    return replace(
        found,
        train=[f for i, f in enumerate(found.train) if i not in held_out],
        evaluation=[f for i, f in enumerate(found.train) if i in held_out],
    )


def load_evaluation_folder(
    root: str,
    name: str,
    size: int | Sequence[int],
    class_names: Sequence[str],
    trained_on: tuple[Sequence[float], Sequence[float]],
    white: float | None = None,
    skip_damaged: bool = False,
    max_pixels: int = MAX_PIXELS,
) -> EvaluationSet:
    """Load only those images of a folder that a network with ``class_names`` is evaluated on.

    `data.layout.find_evaluation_images` finds them. The other arguments are those of
    `load_folder`.

    Args:
        trained_on: mean and standard deviation of the images that the network was trained on.

    Raises:
        FileNotFoundError, ValueError, OSError: see `load_folder`; ValueError also if mean and
            deviation of the images equal ``trained_on``, so that they are the training images.
    """
    settings = _decode_settings(size, white, max_pixels)
    folder = Path(os.path.expanduser(root)).absolute()
    found = find_evaluation_images(folder, class_names)
    evaluation = _read(found.evaluation, settings, skip_damaged)
    _check_brightness(folder, white, [evaluation.facts])
    mean_and_std = _mean_and_std([evaluation.facts], math.prod(settings.size))
    if np.allclose(mean_and_std, trained_on, rtol=0, atol=1e-9):  # equal up to rounding
        raise ValueError(f"data.root={root} has the images that the network was trained on")
    if found.passed_over:
        log.warning("%s: %s", name, _passed_over(found))
    for note in _faults_and_links(name, found, evaluation):
        log.warning("%s", note)
    return EvaluationSet(
        name,
        _labelled(evaluation),
        found.evaluated_on,
        tuple(class_names),
        tuple(str(file.path) for file, _ in evaluation.taken),
    )


def _decode_settings(size: Any, white: float | None, max_pixels: int) -> DecodeSettings:
    check_white(white)
    return DecodeSettings(height_and_width(size), white, max_pixels)


def height_and_width(size: Any) -> tuple[int, int]:
    sides = [size, size] if isinstance(size, int) else size
    if not (
        isinstance(sides, Sequence)
        and len(sides) == 2
        and all(type(side) is int and 1 <= side <= LARGEST for side in sides)
    ):
        raise ValueError(
            f"data.size={size} must be whole numbers from 1 to {LARGEST}, one or [height, width]"
        )
    return sides[0], sides[1]


def _labelled(split: Split) -> Images:
    return Images(split.pixels, torch.tensor([file.label for file, _ in split.taken]))


def _parts(found: Layout, *splits: Split) -> Iterator[str | bytes]:
    yield from found.classes
    for split in splits:
        yield f"{len(split.taken)}"
        for file, digest in split.taken:
            yield from (file.name, f"{file.label}", digest)


# ---- Checks and messages ------------------------------------------------------------------------


def _check_brightness(folder: Path, white: float | None, facts: list[Facts]) -> None:
    gray, color = (max(getattr(f, n) for f in facts) for n in ("largest_gray", "largest_color"))
    if white is None and 0 <= gray < DARK:
        guess = 2 ** int(gray).bit_length() - 1
        raise ValueError(
            f"{folder}: the largest value in its gray images of 16 bits or more is {gray:g}; give "
            f"data.white={max(guess, 1)}, the value of white ({WHITE_OF_16_BITS} if they really "
            "are this dark)"
        )
    if white is None and 0 <= color < DARK:
        raise ValueError(
            f"{folder}: no value in its color images of 16 bits is above {color:g}, and only the "
            "upper 8 bits of each are read; save them with 8 bits (or give "
            f"data.white={WHITE_OF_16_BITS} if they really are this dark)"
        )


def _check_classes(train: Split, found: Layout) -> None:
    empty = set(range(len(found.classes))) - {file.label for file, _ in train.taken}
    if empty:
        raise ValueError(f"no image of the class {found.classes[min(empty)]} is left to train on")


def _what_was_found(name: str, found: Layout, train: Split, evaluation: Split) -> str:
    line = f"{name}: {len(train.taken)} images to train on, {len(evaluation.taken)} to evaluate on"
    return f"{line}, {_passed_over(found)}" if found.passed_over else line


def _taken_twice(name: str, train: Split, evaluation: Split) -> list[str]:
    trained_on = {digest: file for file, digest in train.taken}
    twice = [
        f"{file.path} is identical to {trained_on[digest].path}"
        for file, digest in evaluation.taken
        if digest in trained_on
    ]
    if not twice:
        return []
    return [
        f"{name}: {len(twice)} of {len(evaluation.taken)} images to evaluate on are among those to "
        f"train on: {some(twice, '; ')}"
    ]


def _passed_over(found: Layout) -> str:
    return f"{found.passed_over.total()} other files passed over ({in_words(found.passed_over)})"


def _faults_and_links(name: str, found: Layout, *splits: Split) -> list[str]:
    notes = []
    left_out = [line for split in splits for line in split.left_out]
    if left_out:
        notes.append(f"{name}: {len(left_out)} files left out: {some(left_out, '; ')}")
    if found.links:
        links = some(sorted(map(str, found.links)))
        notes.append(f"{name}: links to folders that are not followed: {links}")
    return notes


def _mean_and_std(facts: list[Facts], area: int) -> tuple[Any, Any]:
    """Mean and deviation per channel, where white is 1, from exact integer sums."""
    number = area * sum(f.images for f in facts)
    mean, std = [], []
    for channel in range(3):
        total = sum(f.total[channel] for f in facts)
        squares = sum(f.squares[channel] for f in facts)
        mean.append(total / number / 255)
        std.append((number * squares - total * total) ** 0.5 / number / 255 or 1.0)
    return tuple(mean), tuple(std)


# ---- Reading ------------------------------------------------------------------------------------


def _read(
    files: list[ImageFile], settings: DecodeSettings, skip_damaged: bool, decoded: bool = True
) -> Split:
    """Read the images of ``files``; unless ``decoded``, their pixels may be left out."""
    digests = list(_in_threads(_digest_or_fault, files, "files", 1000))
    if decoded or skip_damaged:  # only decoding shows which files to leave out
        pixels, facts = _pixels_and_facts(files, digests, settings, skip_damaged)
    else:
        faults = [(index, one) for index, one in enumerate(digests) if isinstance(one, str)]
        pixels, facts = torch.empty(0), Facts(len(files), faults=faults)
    left_out = _check_faults(facts, files, skip_damaged)
    bad = {index for index, _ in facts.faults}
    taken = [
        (file, digest)
        for index, (file, digest) in enumerate(zip(files, digests, strict=True))
        if isinstance(digest, bytes) and index not in bad
    ]
    return Split(pixels, taken, facts, left_out)


def _digest_or_fault(file: ImageFile) -> bytes | str:
    """Return the digest of a file's bytes, or why it cannot be read."""
    try:
        return _hash(read_file(file.path))
    except (ValueError, OSError) as error:
        return getattr(error, "strerror", None) or one_line(error)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _key(digests: list[bytes | str], settings: DecodeSettings) -> str:
    """Return the cache key: a digest of everything that determines the pixels."""
    digest = hashlib.blake2b(f"{FORMAT} {PIL.__version__} {settings}".encode(), digest_size=16)
    for one in digests:
        digest.update(one if isinstance(one, bytes) else b"unreadable")
    return digest.hexdigest()


def _pixels_and_facts(
    files: list[ImageFile],
    digests: list[bytes | str],
    settings: DecodeSettings,
    skip_damaged: bool,
) -> tuple[Tensor, Facts]:
    """Return images from the cache, which is filled first, or in memory if it has no room."""
    key, shape, facts = _key(digests, settings), (len(files), *settings.size, 3), Facts()

    def checked() -> dict[str, Any]:
        _check_faults(facts, files, skip_damaged)
        return asdict(facts)

    kept = image_cache.load(key, settings.size)
    if kept is not None and kept[1].keys() == asdict(facts).keys():
        return kept[0], Facts(**kept[1])
    formats()  # loads Pillow's plugins, before several threads need them
    with reading(settings.max_pixels):
        blocks = _blocks(files, digests, settings, facts)
        if image_cache.store(key, blocks, checked, math.prod(shape)):
            kept = image_cache.load(key, settings.size)
            if kept is not None:
                return kept[0], facts
        facts = Facts()
        pixels = np.empty(shape, np.uint8)
        for block in _blocks(files, digests, settings, facts):
            pixels[facts.images - len(block) : facts.images] = block
    return torch.from_numpy(pixels[: facts.images]), facts


def _blocks(
    files: list[ImageFile], digests: list[bytes | str], settings: DecodeSettings, facts: Facts
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the readable images in order, in blocks (n, H, W, 3), and update ``facts``."""

    def read(index: int) -> Decoded | str:
        digest = digests[index]
        if isinstance(digest, str):
            return digest
        content = read_file(files[index].path)
        if _hash(content) != digest:
            raise ValueError(f"{files[index].path} was changed while it was read")
        try:
            return decode(content, settings.size, settings.white)
        except ValueError as error:
            return one_line(error)

    at_once = max(16, BLOCK // (settings.size[0] * settings.size[1] * 3))
    block = []
    for index, result in enumerate(_in_threads(read, range(len(files)), "images", at_once)):
        if isinstance(result, str):
            facts.faults.append((index, result))
        else:
            _count(facts, result)
            block.append(result.pixels)
        if block and (len(block) == at_once or index == len(files) - 1):
            yield np.stack(block)
            block = []


def _count(facts: Facts, image: Decoded) -> None:
    values = torch.from_numpy(image.pixels).reshape(-1, 3)
    # The square of a byte fits into 32 bits; the sum of many squares does not.
    squares = values.to(torch.int32).square_().sum(0, dtype=torch.int64)
    facts.images += 1
    for channel in range(3):
        facts.total[channel] += int(values[:, channel].sum())
        facts.squares[channel] += int(squares[channel])
    facts.largest_gray = max(facts.largest_gray, image.largest_gray)
    facts.largest_color = max(facts.largest_color, image.largest_color)


def _in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], what: str, at_once: int
) -> Iterator[Result]:
    """Yield the results in order; at most ``at_once`` items are processed ahead of time."""
    # hashlib and Pillow release the GIL while they compute.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    hidden = None if len(items) >= MANY else True  # None: if stderr is not a terminal
    try:
        with tqdm(desc=what, total=len(items), leave=False, disable=hidden) as bar:
            for start in range(0, len(items), at_once):
                for result in pool.map(function, items[start : start + at_once]):
                    bar.update()
                    yield result
    finally:  # Ctrl-C does not wait for the rest
        pool.shutdown(cancel_futures=True)


def _check_faults(facts: Facts, files: list[ImageFile], skip_damaged: bool) -> list[str]:
    """Return a line per file left out. Raises ValueError if that is forbidden or none is left."""
    faults = [f"{files[index].path}: {fault}" for index, fault in facts.faults]
    if faults and not skip_damaged:
        raise ValueError(
            f"{len(faults)} of {len(files)} images cannot be read; repair or delete "
            f"{some(faults, '; ')}; data.skip_damaged=true leaves them out"
        )
    if not facts.images:
        raise ValueError(f"none of {len(files)} images can be read: {some(faults, '; ')}")
    return faults
