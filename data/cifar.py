"""CIFAR-10 and CIFAR-100, read and if need be downloaded by torchvision."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import tempfile
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from data.dataset import Augmentation, Dataset, Images, check_val_size, hold_out

TRAIN_SIZE = 50_000
IMAGE_SIZE = 32
# Each network operation of a download must advance within this time; it bounds the wait for a
# connection too, so that a machine without network says so soon.
_NETWORK_TIMEOUT_S = 5.0
_DOWNLOAD_ERRORS = (OSError, RuntimeError, http.client.HTTPException)


@dataclass(frozen=True)
class Source:
    """Where torchvision keeps a set, and its training pixels' mean and standard deviation."""

    class_name: str
    folder: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


SOURCES = {
    "cifar10": Source(
        "CIFAR10",
        "cifar-10-batches-py",
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
    ),
    "cifar100": Source(
        "CIFAR100",
        "cifar-100-python",
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
    ),
}


def load_cifar(
    name: str,
    root: str,
    val_size: int = 0,
    crop_pad: int = 4,
    flip: bool = True,
    cutout: int = 0,
    download: bool = True,
) -> Dataset:
    """CIFAR-10 ("cifar10") or CIFAR-100 ("cifar100") in memory: 32x32 images.

    ``root`` holds torchvision's folder ("cifar-10-batches-py", "cifar-100-python"); with
    ``download`` a set that is not there, or is damaged, is fetched into it. ``val_size`` > 0
    evaluates on that many held-out training images and leaves the test images alone. The
    normalisation constants are those of all 50,000 training images in either case.

    Raises ValueError for an unknown name, a ``val_size`` or augmentation that does not fit, a
    ``root`` that cannot be read and damaged files, and FileNotFoundError for an absent set; a
    download that fails removes what it left.
    """
    if name not in SOURCES:
        raise ValueError(f"name={name!r} is unknown; choose one of {', '.join(SOURCES)}")
    check_val_size(val_size, TRAIN_SIZE)
    augmentation = Augmentation(crop_pad, flip, cutout)
    augmentation.check_fits(IMAGE_SIZE, IMAGE_SIZE)

    source, root = SOURCES[name], os.path.abspath(os.path.expanduser(root))
    whole = _open(source, root, download)
    train = _images(whole)
    if val_size:
        train, evaluation = hold_out(train, val_size)
    else:
        evaluation = _images(_read(source, root, train=False))
    return Dataset(
        name=name,
        train=train,
        evaluation=evaluation,
        evaluated_on="held-out" if val_size else "test",
        num_classes=len(whole.classes),
        class_names=tuple(whole.classes),
        mean=source.mean,
        std=source.std,
        augmentation=augmentation,
    )


def _images(part: Any) -> Images:
    # The files hold planes, (N, 3, H, W), which torchvision shows transposed.
    pixels = torch.from_numpy(part.data).contiguous()
    return Images(pixels, torch.tensor(part.targets))


def _torchvision_class(source: Source) -> Any:
    # Here and not above: importing torchvision takes seconds, and the lookup set needs none of it.
    from data.vision import datasets

    return getattr(datasets, source.class_name)


def _read(source: Source, root: str, train: bool, download: bool = False) -> Any:
    return _torchvision_class(source)(root, train=train, download=download)


def _open(source: Source, root: str, download: bool) -> Any:
    """The training part, downloaded if it is not in ``root`` as it should be."""
    try:
        return _read(source, root, train=True)
    except RuntimeError:
        # torchvision's word for files that are absent or fail their checksum.
        pass
    except OSError as error:
        raise ValueError(
            f"data.root={root} cannot be read ({_short(error)}); set data.root=... to another copy"
        ) from error
    if not download:
        raise _unusable(source, root, "data.download is off")
    if list(_damaged(source, root)) == [_names(source)]:
        # torchvision takes a set to be complete without looking at this file.
        raise _unusable(source, root, "torchvision does not download that file alone")
    with _removing_leftovers(source, root):
        return _download(source, root)


def _download(source: Source, root: str) -> Any:
    try:
        os.makedirs(root, exist_ok=True)
        tempfile.TemporaryFile(dir=root).close()
    except OSError as error:
        failure = f"data.root={root} cannot be written ({_short(error)})"
        raise _unusable(source, root, failure) from error
    try:
        with _network_timeout(_NETWORK_TIMEOUT_S):
            return _read(source, root, train=True, download=True)
    except _DOWNLOAD_ERRORS as error:
        failure = f"the download failed ({_short(error)})"
        raise _unusable(source, root, failure) from error


def _unusable(source: Source, root: str, failure: str) -> Exception:
    folder = os.path.join(root, source.folder)
    if not os.path.isdir(folder):
        return FileNotFoundError(
            f"no {source.class_name} in {folder}, and {failure}; "
            f"set data.root=... to the folder that holds {source.folder}, or put it there"
        )
    damaged = ", ".join(_damaged(source, root))
    return ValueError(
        f"{source.class_name} in {folder} has missing or damaged files ({damaged}), and {failure}; "
        f"delete that folder and load it anew, or set data.root=... to another copy"
    )


def _names(source: Source) -> str:
    """The file that holds the names of the classes."""
    return str(_torchvision_class(source).meta["filename"])


def _damaged(source: Source, root: str) -> Iterator[str]:
    """The set's files that are missing or do not have their checksum."""
    from data.vision import datasets

    kind = _torchvision_class(source)
    checksums = dict([*kind.train_list, *kind.test_list])
    for file, md5 in [*checksums.items(), (_names(source), kind.meta["md5"])]:
        if not datasets.utils.check_integrity(os.path.join(root, source.folder, file), md5):
            yield file


@contextmanager
def _removing_leftovers(source: Source, root: str) -> Iterator[None]:
    """On any failure, an interrupt included, removes what was not there before."""
    archive = os.path.join(root, _torchvision_class(source).filename)
    new = [p for p in (os.path.join(root, source.folder), archive) if not os.path.lexists(p)]
    new_parents = list(_absent_folders(root))
    try:
        yield
    except BaseException:
        for path in new:
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.remove(path)
        for folder in new_parents:
            if os.path.isdir(folder) and not os.listdir(folder):
                os.rmdir(folder)
        raise


def _absent_folders(path: str) -> Iterator[str]:
    """``path`` and those above it that do not exist, the deepest first."""
    while not os.path.lexists(path):
        yield path
        path = os.path.dirname(path)


@contextmanager
def _network_timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _short(error: BaseException) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        error = error.reason if isinstance(error.reason, BaseException) else error
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__
