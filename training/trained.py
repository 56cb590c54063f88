"""The settings and the images of a run, found again by its trained network alone."""

import hashlib
import logging
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import models
from configs.schema import FolderConfig
from data import Dataset, EvaluationSet, Images, load_evaluation_folder
from data.folder import height_and_width
from data.layout import some
from data.pictures import reading_of
from training import run_folder
from training.compose import compose_config, make
from training.device import precision_name
from training.errors import explain
from training.launch import override
from training.settings import resolve

log = logging.getLogger(__name__)


def compose_settings(
    trained: models.Trained, path: str, overrides: list[str], allowed: tuple[str, ...]
) -> DictConfig:
    """The settings of the run that has trained the network of ``path``, and over them others.

    ``data`` and its settings may be among them, and those of ``allowed``. A data set that is given
    begins with its own defaults, a folder with the size of the network's images and the number that
    was white in them. What was held out of the training images is the run's own: no other
    ``data.val_size`` is taken, but for 0.

    Raises:
        ValueError: an override is of none of these, or cannot be read; another ``data.val_size``.
    """
    keys = [word.partition("=")[0] for word in overrides]
    for key in keys:
        if key not in ("data", *allowed) and not key.startswith("data."):
            there = ", ".join(("data", *allowed))
            raise ValueError(f"{key}: not a setting here; choose from {there}")
    settings = trained.description.settings
    words = [f"precision={precision_name(trained.description.precision)}"]
    own = _own_data(trained)
    if "data" not in keys:
        if own.get("_target_") == FolderConfig._target_ and "data.root" not in keys:
            raise ValueError(
                f"{path} was trained on the folder {trained.description.data}; give its location "
                "with data.root=..."
            )
        words += _own_data_words(trained)
    elif "data=folder" in overrides:  # whose images are brought to any size
        words.append(override("data.size", trained.image_size))
        words.append(override("data.white", reading_of(settings)["white"]))
    if "channels_last" in settings:
        words.append(override("channels_last", settings["channels_last"]))
    try:
        cfg = compose_config([*words, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    held_out, given = own.get("val_size", 0), cfg.data.get("val_size", 0)
    if given not in (0, held_out):
        raise ValueError(
            f"data.val_size={given}: {path} was trained with data.val_size={held_out}, so others "
            "may be images that it was trained on; leave it out"
            f"{', or give 0' if held_out else ''}"
        )
    return cfg


def _own_data(trained: models.Trained) -> dict[str, Any]:
    return trained.description.settings.get("data") or {}


def _own_data_words(trained: models.Trained) -> list[str]:
    """The overrides of the run's own data, but for where they are."""
    own = _own_data(trained)
    folder = own.get("_target_") == FolderConfig._target_
    # What is called cifar10 is chosen by this option; a folder is called as it is now.
    option = f"data={'folder' if folder else trained.description.data}"
    named = (key for key in own if key not in ("_target_", "name"))
    return [option, *(override(f"data.{key}", own[key]) for key in named)]


def load_data(cfg: DictConfig, trained: models.Trained, path: str) -> EvaluationSet:
    """The images of ``cfg.data`` to evaluate the network of ``path`` on; of a folder's no others.

    Raises:
        ValueError: their classes are not the network's, they cannot be had, or they may be among
            those that the network was trained on.
    """
    class_names = tuple(trained.class_names)
    settings = resolve(cfg.data)
    if settings["_target_"] == FolderConfig._target_ and not settings["val_size"]:
        arguments = {k: v for k, v in settings.items() if k not in ("_target_", "val_size")}
        trained_on = trained.description.mean, trained.description.std
        try:
            return load_evaluation_folder(
                class_names=class_names, trained_on=trained_on, **arguments
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    dataset: Dataset = make(cfg.data)
    if dataset.class_names != class_names:
        raise ValueError(
            f"{path} was trained on the {len(class_names)} classes of "
            f"{trained.description.data}; {dataset.name} has {dataset.num_classes} others"
        )
    if dataset.evaluated_on == "val":
        _check_held_out(settings, dataset, trained, path)
    return EvaluationSet(dataset.name, dataset.evaluation, dataset.evaluated_on, class_names)


def _check_held_out(
    settings: dict[str, Any], dataset: Dataset, trained: models.Trained, path: str
) -> None:
    """Raise ValueError unless the run has held out the same images as ``dataset``."""
    remedy = (
        "only of its own data it is known what was held out; data.val_size=0 takes the images that "
        "are for evaluation"
    )
    for key, own in _own_data(trained).items():
        same = settings.get(key) == own
        if key == "size":  # 8 is [8, 8]
            same = height_and_width(settings.get(key)) == height_and_width(own)
        if key != "name" and not same:
            raise ValueError(
                f"data.{key}={settings.get(key)}: {path} was trained with data.{key}={own}; "
                f"{remedy}"
            )
    # Of a folder, whose images may have changed; others are made of their settings.
    is_same = dataset.digest == trained.description.data_digest
    if settings["_target_"] == FolderConfig._target_ and not is_same:
        raise ValueError(
            f"data.root={settings['root']} has other images than those of {path}; {remedy}"
        )


# ---- Training images under another name ---------------------------------------------------------


def check_not_trained_on(
    images: EvaluationSet, cfg: DictConfig, trained: models.Trained, path: str
) -> None:
    """Raise ValueError if images of a folder are among those that the network was trained on.

    They are told by their pixels, wherever their files are and whatever these are called. One that
    the run itself was evaluated on is taken: if it was trained on as well, the run has said so.
    Where the training images cannot be had, a line says so.

    Args:
        images: what `load_data` has made of ``cfg``; of other data sets than a folder it takes none
            that were trained on.
    """
    if not images.files:  # which those of a folder alone have
        return
    try:
        own = _find_own_images(trained, path, cfg.data.root, images.image_size)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        log.warning(
            "%s: not compared with the images that it was trained on: %s", path, explain(error)
        )
        return
    digests = zip(images.files, _pixel_digests(images.evaluation), strict=True)
    seen = [file for file, one in digests if one in own]
    if seen:
        raise ValueError(
            f"{path}: {len(seen)} of {len(images.files)} images of data.root={cfg.data.root} are "
            f"among those that the network was trained on: {some(seen)}"
        )


def _find_own_images(
    trained: models.Trained, path: str, given_root: str, size: tuple[int, int]
) -> frozenset[bytes]:
    """Digests of the images that the run was trained on and not evaluated on.

    Those of a folder are brought to ``size``; those of other data sets are as they are.

    They are looked for where the settings beside ``path`` say, and in the folder ``given_root``.

    Raises:
        ValueError, OSError, HydraException, OmegaConfBaseException: they cannot be had.
    """
    described, words = trained.description, _own_data_words(trained)
    recorded = root = _recorded_root(path)
    if _own_data(trained).get("_target_") == FolderConfig._target_:
        words.append(override("data.size", size))
        if root is None or not Path(os.path.expanduser(root)).exists():
            root = given_root  # where they may be, unless it has test images alone
    else:  # of which not all are downloaded, or have a root
        there = compose_config(words).data
        words += ["data.download=false"] if "download" in there else []
        recorded = root = root if "root" in there else None
    try:
        where = [] if root is None else [override("data.root", root)]
        digest, own_size, own = _own_images((*words, *where))
    except (ValueError, OSError, HydraException) as error:
        if root == recorded:
            raise
        raise ValueError(f"the location of {described.data} is unknown") from error
    if digest != described.data_digest:
        raise ValueError(f"{root or described.data} has others")
    if own_size != size:
        raise ValueError(f"those are {own_size[0]}x{own_size[1]}")
    return own


def _recorded_root(path: str) -> str | None:
    """Where the run whose network is at ``path`` had its images; None if that is not known."""
    place = Path(os.path.expanduser(path))
    settings = run_folder.read_settings(place if place.is_dir() else place.parent) or {}
    data = settings.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return root if isinstance(root, str) else None


@lru_cache(maxsize=1)  # the networks of a comparison are of one set
def _own_images(words: tuple[str, ...]) -> tuple[str, tuple[int, int], frozenset[bytes]]:
    """A data set's digest, its images' size, and digests of those that are trained on alone."""
    dataset: Dataset = make(compose_config(words).data)
    trained_on, evaluated_on = map(_pixel_digests, (dataset.train, dataset.evaluation))
    return dataset.digest, dataset.image_size, frozenset(trained_on) - frozenset(evaluated_on)


def _pixel_digests(images: Images) -> list[bytes]:
    return [hashlib.blake2b(one.numpy(), digest_size=16).digest() for one in images.pixels]
