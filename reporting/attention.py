"""Pictures of the attention maps for the report."""

from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import models
from configs.schema import OPTIONS
from data import Dataset
from reporting.runs import Run, Variant
from training import run_folder
from training.attention_picture import AttentionPicture, attention_pictures
from training.compose import make
from training.errors import explain
from training.media import attention_images

# The `_target_`s of this project's own data sets.
KNOWN = {kind._target_ for group, _, kind in OPTIONS if group == "data"}


def of_report(variants: list[Variant]) -> tuple[Run, dict[str, AttentionPicture], str] | None:
    """An augmented run, the attention maps of the last layer of each stage, and any error message.

    None if no augmented run has its weights.
    """
    runs = (run for variant in variants if variant.attention == "aa" for run in variant.runs)
    run = next((run for run in runs if (run.folder / run_folder.WEIGHTS).is_file()), None)
    if run is None:
        return None
    try:
        trained = models.load(run.folder)
        images, titles = attention_images(_dataset(run, trained))
        about = trained.description
        made = attention_pictures(trained.network, images, titles, about.mean, about.std)
    except (ValueError, TypeError, OSError, HydraException, OmegaConfBaseException) as error:
        return run, {}, f"The attention of {run.folder.name} is not shown: {explain(error)}."
    last = {layer.rpartition(".conv")[0].rpartition(".")[0]: layer for layer in made}
    return run, {layer: made[layer] for layer in last.values()}, ""


def _dataset(run: Run, trained: models.Trained) -> Dataset:
    """Load the run's data set if it is still in the same place; never download it."""
    settings: dict[str, Any] = dict(run.summary["config"]["data"])
    # A file's `_target_` is called only if it is this project's own, and nested ones never are.
    if settings.get("_target_") not in KNOWN:
        raise ValueError(f"its data set, {settings.get('_target_')}, is not one of this project's")
    if "download" in settings:
        settings["download"] = False
    dataset: Dataset = make({**settings, "_recursive_": False})
    if list(dataset.class_names) != trained.class_names:
        raise ValueError(f"the classes of {dataset.name} have changed since")
    if trained.description.data_digest != dataset.digest:
        raise ValueError(f"the images of {dataset.name} have changed since")
    return dataset
