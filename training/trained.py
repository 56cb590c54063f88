"""Recover the settings and the images of a run from its trained network."""

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
    """Return the settings of the run that trained the network at ``path``, with ``overrides``.

    The overrides may be ``data``, its settings, and those in ``allowed``. A data set given here
    starts from its own defaults; a folder, from the size and the white level of the network's
    training images. ``data.val_size`` must be the run's own or 0: with another, images that the
    network was trained on could count as held out.

    Raises:
        ValueError: if an override is not allowed or invalid, or changes ``data.val_size``.
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
    elif "data=folder" in overrides:  # images of a folder are resized as needed
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
    """Return the overrides for the run's own data set, without its location and name."""
    own = _own_data(trained)
    folder = own.get("_target_") == FolderConfig._target_
    # Other data sets have an option of their own name, such as data=cifar10.
    option = f"data={'folder' if folder else trained.description.data}"
    named = (key for key in own if key not in ("_target_", "name"))
    return [option, *(override(f"data.{key}", own[key]) for key in named)]


def load_data(cfg: DictConfig, trained: models.Trained, path: str) -> EvaluationSet:
    """Load the images to evaluate the network at ``path`` on; of a folder, only these are read.

    Raises:
        ValueError: if their classes are not the network's, they cannot be loaded, or the network
            may have been trained on them.
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
    """Raise ValueError unless ``dataset`` holds out the same images as the run did."""
    remedy = (
        "held-out images are known only for the run's own data; data.val_size=0 uses the images "
        "that are for evaluation"
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
    # Only a folder's images may have changed; other data sets are determined by their settings.
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

    Images are compared by their pixels, wherever their files are and whatever their names. One that
    the run was evaluated on is allowed: if it was also in the training set, the run has warned of
    that. If the training images cannot be found, log a warning.

    Args:
        images: the result of `load_data` for ``cfg``, which already excludes training images for
            any data set other than a folder.
    """
    if not images.files:  # only images of a folder have files
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
    """Return digests of the images that the run was trained on, without those for evaluation.

    Images of a folder are resized to ``size``; those of other data sets keep their size.

    They are searched for where the settings next to ``path`` say, else in ``given_root``.

    Raises:
        ValueError, OSError, HydraException, OmegaConfBaseException: if they cannot be found.
    """
    described, words = trained.description, _own_data_words(trained)
    recorded = root = _recorded_root(path)
    if _own_data(trained).get("_target_") == FolderConfig._target_:
        words.append(override("data.size", size))
        if root is None or not Path(os.path.expanduser(root)).exists():
            root = given_root  # it may have the training images, too, not only test images
    else:  # some other data sets have no download or root setting
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
        raise ValueError(f"the images in {root or described.data} differ")
    if own_size != size:
        raise ValueError(f"those are {own_size[0]}x{own_size[1]}")
    return own


def _recorded_root(path: str) -> str | None:
    """Return the ``data.root`` of the run whose network is at ``path``; None if it is unknown."""
    place = Path(os.path.expanduser(path))
    settings = run_folder.read_settings(place if place.is_dir() else place.parent) or {}
    data = settings.get("data")
    root = data.get("root") if isinstance(data, dict) else None
    return root if isinstance(root, str) else None


@lru_cache(maxsize=1)  # the networks of a comparison share a data set
def _own_images(words: tuple[str, ...]) -> tuple[str, tuple[int, int], frozenset[bytes]]:
    """Return a data set's digest, image size, and digests of images that are only trained on."""
    dataset: Dataset = make(compose_config(words).data)
    trained_on, evaluated_on = map(_pixel_digests, (dataset.train, dataset.evaluation))
    return dataset.digest, dataset.image_size, frozenset(trained_on) - frozenset(evaluated_on)


def _pixel_digests(images: Images) -> list[bytes]:
    return [hashlib.blake2b(one.numpy(), digest_size=16).digest() for one in images.pixels]
