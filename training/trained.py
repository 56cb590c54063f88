"""The settings and the images of a run, found again by its trained network alone."""

import json
from typing import Any

from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import models
from configs.schema import FolderConfig
from data import Dataset
from training.compose import compose_config
from training.device import precision_name
from training.errors import explain
from training.launch import hydra_quote


def compose_settings(
    trained: models.Trained, path: str, overrides: list[str], allowed: tuple[str, ...]
) -> DictConfig:
    """The settings of the run that has trained the network of ``path``, and over them others.

    ``data`` and its settings may be among them, and those of ``allowed``. A data set that is given
    begins with its own defaults.

    Raises:
        ValueError: an override is of none of these, or cannot be read.
    """
    keys = [word.partition("=")[0] for word in overrides]
    for key in keys:
        if key not in ("data", *allowed) and not key.startswith("data."):
            there = ", ".join(("data", *allowed))
            raise ValueError(f"{key}: not a setting here; there are {there}")
    settings = trained.description.settings
    words = [f"precision={precision_name(trained.description.precision)}"]
    if "data" not in keys:
        words += _own_data(trained, path, keys)
    words += [f"{key}={json.dumps(settings[key])}" for key in ("channels_last",) if key in settings]
    try:
        return compose_config([*words, *overrides])
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(f"{path}: {explain(error)}") from error


def _own_data(trained: models.Trained, path: str, keys: list[str]) -> list[str]:
    own: dict[str, Any] = trained.description.settings.get("data", {})
    folder = own.get("_target_") == FolderConfig._target_
    if folder and "data.root" not in keys:
        raise ValueError(
            f"{path} was trained on the folder {trained.description.data}; give its place, "
            "data.root=..."
        )
    words = [f"data={'folder' if folder else trained.description.data}"]
    # What is called cifar10 is chosen by the option above; a folder has any name.
    fixed = ("_target_",) if folder else ("_target_", "name")
    return words + [f"data.{k}={_as_word(v)}" for k, v in own.items() if k not in fixed]


def _as_word(value: Any) -> str:
    return hydra_quote(value) if isinstance(value, str) else json.dumps(value)


def load_data(cfg: DictConfig, trained: models.Trained, path: str) -> Dataset:
    """The data set of ``cfg``.

    Raises:
        ValueError: it has other classes than the network, or cannot be had.
    """
    dataset: Dataset = instantiate(cfg.data, _convert_="all")
    if list(dataset.class_names) != trained.class_names:
        raise ValueError(
            f"{path} was trained on the {len(trained.class_names)} classes of "
            f"{trained.description.data}; {dataset.name} has {dataset.num_classes} others"
        )
    return dataset
