"""The settings and the images of a run, found again by its trained network alone."""

import json
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import models
from configs.schema import FolderConfig
from data import Dataset, EvaluationSet, load_evaluation_folder
from data.folder import is_same_color
from training.compose import compose_config
from training.device import precision_name
from training.errors import explain
from training.launch import hydra_quote


def compose_settings(
    trained: models.Trained, path: str, overrides: list[str], allowed: tuple[str, ...]
) -> DictConfig:
    """The settings of the run that has trained the network of ``path``, and over them others.

    ``data`` and its settings may be among them, and those of ``allowed``. A data set that is given
    begins with its own defaults, a folder with the size of the network's images. What was held out
    of the training images is the run's own: no other ``data.val_size`` is taken, but for 0.

    Raises:
        ValueError: an override is of none of these, or cannot be read; another ``data.val_size``.
    """
    keys = [word.partition("=")[0] for word in overrides]
    for key in keys:
        if key not in ("data", *allowed) and not key.startswith("data."):
            there = ", ".join(("data", *allowed))
            raise ValueError(f"{key}: not a setting here; there are {there}")
    settings = trained.description.settings
    words = [f"precision={precision_name(trained.description.precision)}"]
    if "data" not in keys:
        words += _own_data_words(trained, path, keys)
    elif "data=folder" in overrides:  # whose images are brought to any size
        words.append(f"data.size={list(trained.image_size)}")
    words += [f"{key}={json.dumps(settings[key])}" for key in ("channels_last",) if key in settings]
    try:
        cfg = compose_config([*words, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    own, given = _own_data(trained).get("val_size", 0), cfg.data.get("val_size", 0)
    if given not in (0, own):
        raise ValueError(
            f"data.val_size={given}: {path} was trained with data.val_size={own}, so others may be "
            f"images that it was trained on; leave it out{', or give 0' if own else ''}"
        )
    return cfg


def _own_data(trained: models.Trained) -> dict[str, Any]:
    return trained.description.settings.get("data") or {}


def _own_data_words(trained: models.Trained, path: str, keys: list[str]) -> list[str]:
    own = _own_data(trained)
    folder = own.get("_target_") == FolderConfig._target_
    if folder and "data.root" not in keys:
        raise ValueError(
            f"{path} was trained on the folder {trained.description.data}; give its place, "
            "data.root=..."
        )
    words = [f"data={'folder' if folder else trained.description.data}"]
    # What is called cifar10 is chosen by the option above; a folder is called as it is now.
    return words + [
        f"data.{key}={_as_word(value)}"
        for key, value in own.items()
        if key not in ("_target_", "name")
    ]


def _as_word(value: Any) -> str:
    return hydra_quote(value) if isinstance(value, str) else json.dumps(value)


def load_data(cfg: DictConfig, trained: models.Trained, path: str) -> EvaluationSet:
    """The images of ``cfg.data`` to evaluate the network of ``path`` on; of a folder's no others.

    Raises:
        ValueError: their classes are not the network's, they cannot be had, or they may be among
            those that the network was trained on.
    """
    class_names = tuple(trained.class_names)
    settings = OmegaConf.to_container(cfg.data, resolve=True, throw_on_missing=True)
    assert isinstance(settings, dict)
    if settings["_target_"] == FolderConfig._target_ and not settings["val_size"]:
        arguments = {str(k): v for k, v in settings.items() if k not in ("_target_", "val_size")}
        try:
            return load_evaluation_folder(
                class_names=class_names, trained_on=_color(trained.description), **arguments
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    dataset: Dataset = instantiate(cfg.data, _convert_="all")
    if dataset.class_names != class_names:
        raise ValueError(
            f"{path} was trained on the {len(class_names)} classes of "
            f"{trained.description.data}; {dataset.name} has {dataset.num_classes} others"
        )
    if dataset.evaluated_on == "val":
        _check_held_out(settings, dataset, trained, path)
    return EvaluationSet(dataset.name, dataset.evaluation, dataset.evaluated_on, class_names)


def _check_held_out(
    settings: dict[Any, Any], dataset: Dataset, trained: models.Trained, path: str
) -> None:
    """Raise ValueError unless the run has held out the same images as ``dataset``."""
    remedy = (
        "only of its own data it is known what was held out; data.val_size=0 takes the images that "
        "are for evaluation"
    )
    for key, own in _own_data(trained).items():
        if key != "name" and settings.get(key) != own:
            raise ValueError(
                f"data.{key}={settings.get(key)}: {path} was trained with data.{key}={own}; "
                f"{remedy}"
            )
    # Of a folder, whose images may have changed; others are made of their settings.
    described = trained.description
    if described.data_digest is not None:
        is_same = dataset.digest == described.data_digest
    else:  # older code has written it
        is_same = is_same_color((dataset.mean, dataset.std), _color(described))
    if settings["_target_"] == FolderConfig._target_ and not is_same:
        raise ValueError(
            f"data.root={settings['root']} has other images than those of {path}; {remedy}"
        )


def _color(description: models.Description) -> tuple[list[float], list[float]]:
    return description.mean, description.std
