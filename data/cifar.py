"""CIFAR-10 and CIFAR-100, read by torchvision and downloaded if they are missing."""

from __future__ import annotations

import http.client
import os
import pickle
import socket
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from aaconv.text import one_line
from data.dataset import Dataset, Images, check_val_size, digest_of, hold_out

TRAIN_SIZE = 50_000
# Timeout of each network operation of a download, connecting included, so that a machine without
# a network fails fast.
_NETWORK_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Source:
    """A data set: torchvision's class for it, and mean and std of all its training pixels.

    ``coarse``: whether the labels are CIFAR-100's superclasses, which torchvision does not read.
    """

    class_name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    coarse: bool = False


SOURCES = {
    "cifar10": Source("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Source("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
SOURCES["cifar100_coarse"] = replace(SOURCES["cifar100"], coarse=True)


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is one of `SOURCES`."""
    if name not in SOURCES:
        raise ValueError(f"data.name={name} is unknown; choose one of {', '.join(SOURCES)}")


def load_cifar(
    name: str,
    root: str,
    val_size: int = 0,
    download: bool = True,
) -> Dataset:
    """Load CIFAR-10 ("cifar10") or CIFAR-100 ("cifar100") into memory: 32x32 images.

    "cifar100_coarse" is CIFAR-100 with its 20 superclasses as labels, such as fish for shark.

    ``root`` holds torchvision's folder ("cifar-10-batches-py" or "cifar-100-python"). With
    ``download``, a missing data set or its damaged files are downloaded. ``val_size`` > 0 holds out
    that many training images and evaluates on them; the test images are then not read. Mean and
    standard deviation are always those of all 50,000 training images.

    Raises ValueError for an unknown name, a ``val_size`` that does not fit, a ``root`` that cannot
    be read, and damaged files; FileNotFoundError for a missing data set. A download that fails or
    is interrupted removes everything it created, and nothing else.
    """
    # Not imported at the top: torchvision takes seconds to import, and the lookup data set does
    # not need it.
    from data.vision import datasets

    check_name(name)
    check_val_size(val_size, TRAIN_SIZE)
    source, root = SOURCES[name], os.path.abspath(os.path.expanduser(root))
    kind = getattr(datasets, source.class_name)
    whole = _open(kind, root, download)
    train, class_names = _images(whole, source.coarse), whole.classes
    if source.coarse:
        class_names = _unpickle(whole, kind.meta["filename"])["coarse_label_names"]
    if val_size:
        train, evaluation = hold_out(train, val_size)
    else:
        evaluation = _images(kind(root, train=False), source.coarse)
    # Checksums of the files, which torchvision verified when it read them.
    checksums = [md5 for _, md5 in (*kind.train_list, *kind.test_list)]
    return Dataset(
        name=name,
        train=train,
        evaluation=evaluation,
        evaluated_on="val" if val_size else "test",
        num_classes=len(class_names),
        class_names=tuple(class_names),
        mean=source.mean,
        std=source.std,
        digest=digest_of([name, *checksums, str(val_size)]),
    )


def _images(split: Any, coarse: bool) -> Images:
    # The files hold planes, (N, 3, H, W); torchvision returns a transposed view of them.
    pixels, labels = torch.from_numpy(split.data).contiguous(), split.targets
    if coarse:
        files = split.train_list if split.train else split.test_list
        labels = [label for file, _ in files for label in _unpickle(split, file)["coarse_labels"]]
    return Images(pixels, torch.tensor(labels))


def _unpickle(split: Any, file: str) -> dict[str, Any]:
    """Load a file of ``split``, whose checksum torchvision has already verified."""
    with open(os.path.join(split.root, split.base_folder, file), "rb") as opened:
        content: dict[str, Any] = pickle.load(opened, encoding="latin1")
    return content


def _open(kind: Any, root: str, download: bool) -> Any:
    """Return the training split; missing or damaged files of the data set are downloaded first."""
    try:
        return kind(root, train=True)
    except RuntimeError:
        # What torchvision raises for files that are missing or fail their checksum.
        pass
    except OSError as error:
        raise ValueError(
            f"data.root={root} cannot be read ({_short(error)}); set data.root=... to another copy"
        ) from error
    if not download:
        raise _unusable(kind, root, "data.download is off")
    _download(kind, root)
    return kind(root, train=True)


def _download(kind: Any, root: str) -> None:
    """Download to a temporary folder, then move what ``root`` lacks to ``root``.

    The temporary folder is in ``root`` or, if that does not exist, in its nearest existing parent.
    """
    places = [Path(root), *Path(root).parents]
    place = next((path for path in places if os.path.lexists(path)), root)
    what = f"data.root={root} cannot be written"
    try:
        with tempfile.TemporaryDirectory(
            dir=place, prefix="download-", ignore_cleanup_errors=True
        ) as staging:
            what = "the download failed"
            _fetch(kind, root, staging)
            _move(kind, staging, root)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise _unusable(kind, root, f"{what} ({_short(error)})") from error


def _fetch(kind: Any, root: str, staging: str) -> None:
    """Put the whole data set into ``staging``, from the archive in ``root`` if that is intact."""
    from data.vision import datasets

    archive = os.path.join(root, kind.filename)
    if datasets.utils.check_integrity(archive, kind.tgz_md5):
        datasets.utils.extract_archive(archive, staging)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT_S)
    try:
        kind(staging, train=True, download=True)  # only checks what was extracted
    finally:
        socket.setdefaulttimeout(before)


def _move(kind: Any, staging: str, root: str) -> None:
    """Move the data set's whole folder, or only the files that ``root`` lacks; then the archive."""
    new, target = (os.path.join(folder, kind.base_folder) for folder in (staging, root))
    os.makedirs(root, exist_ok=True)
    with suppress(OSError):  # the folder exists: only damaged files are replaced
        os.rename(new, target)
    for file in _damaged(kind, root):
        os.replace(os.path.join(new, file), os.path.join(target, file))
    with suppress(OSError):  # there may be none, and the data set is complete without it
        os.replace(os.path.join(staging, kind.filename), os.path.join(root, kind.filename))


def _unusable(kind: Any, root: str, failure: str) -> Exception:
    folder = os.path.join(root, kind.base_folder)
    if not os.path.isdir(folder):
        return FileNotFoundError(
            f"no {kind.__name__} in {folder}, and {failure}; "
            f"set data.root=... to the folder that holds {kind.base_folder}, or put it there"
        )
    damaged = ", ".join(_damaged(kind, root))
    return ValueError(
        f"{kind.__name__} in {folder} has missing or damaged files ({damaged}), and {failure}; "
        f"delete that folder to download it again, or set data.root=... to another copy"
    )


def _damaged(kind: Any, root: str) -> Iterator[str]:
    """Yield the files of the data set that are missing or fail their checksum."""
    from data.vision import datasets

    class_names = (kind.meta["filename"], kind.meta["md5"])
    for file, md5 in [*kind.train_list, *kind.test_list, class_names]:
        if not datasets.utils.check_integrity(os.path.join(root, kind.base_folder, file), md5):
            yield file


def _short(error: BaseException) -> str:
    cause = getattr(error, "reason", None)  # of a URLError
    error = cause if isinstance(cause, OSError) else error
    return getattr(error, "strerror", None) or one_line(error)
