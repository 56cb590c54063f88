"""What attention looks at, as pictures: for the report, and for scripts/visualize.py."""

from dataclasses import dataclass
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

import models
from configs.schema import OPTIONS
from data import Dataset, EvaluationSet, Images, evaluation_batches
from models.views import attention_views
from reporting import figures
from reporting.runs import Run, Variant
from training import run_folder
from training.attention_picture import AttentionPicture, attention_picture, layer_line
from training.compose import make
from training.errors import explain
from training.media import ATTENTION_IMAGES, spread

# What makes a data set.
KNOWN = {kind._target_ for group, _, kind in OPTIONS if group == "data"}


@dataclass(frozen=True)
class Block:
    """One augmented layer on several images.

    Attributes:
        name: of the layer.
        words: its map size, dk, dv and Nh.
        picture: see `training.attention_picture`.
        titles: what each row of the picture is called.
    """

    name: str
    words: str
    picture: AttentionPicture
    titles: list[str]

    def figure(self) -> figures.Figure:
        """The picture with its titles."""
        columns = ["image", *(f"head {number + 1}" for number in range(self.picture.heads))]
        title = f"{self.name} ({self.words})"
        return figures.attention(title, self.picture.image, self.titles, columns)


def blocks(
    trained: models.Trained,
    images: Images,
    titles: list[str],
    queries: list[tuple[int, int]] | None = None,
) -> list[Block]:
    """A block for each augmented layer; none for a plain network.

    Args:
        trained: the network.
        images: what it looks at, on its device.
        titles: what each image is called.
        queries: pixels (row, column) from whose place is looked; by default the position of each
            layer and image whose attention is the sharpest.

    Raises:
        ValueError: a pixel that is not in the images.
    """
    mean, std = trained.description.mean, trained.description.std
    (batch, _), *_ = evaluation_batches(images, len(images), mean, std)
    made = []
    for name, views in attention_views(trained.network, batch, queries).items():
        picture = attention_picture(images.pixels, views)
        rows = [
            "mean over positions"
            if query is None
            else f"{titles[image]}\nfrom {query[0]},{query[1]}"
            for image, query in picture.rows
        ]
        made.append(Block(name, layer_line(views[0]), picture, rows))
    return made


# ---- For the report -----------------------------------------------------------------------------


def of_report(variants: list[Variant]) -> tuple[Run, list[Block], str] | None:
    """The blocks of one run with attention whose weights are there, and what was not possible.

    Of each of its stages the last block. None where no such run has its weights.
    """
    runs = (run for variant in variants if variant.attention == "aa" for run in variant.runs)
    run = next((run for run in runs if (run.folder / run_folder.WEIGHTS).is_file()), None)
    if run is None:
        return None
    try:
        trained = models.load(run.folder)
        images, titles = chosen(_dataset(run, trained), ATTENTION_IMAGES)
        made = blocks(trained, images, titles)
    except (ValueError, TypeError, OSError, HydraException, OmegaConfBaseException) as error:
        return run, [], f"The attention of {run.folder.name} is not shown: {explain(error)}."
    last = {block.name.rpartition(".conv")[0].rpartition(".")[0]: block for block in made}
    return run, list(last.values()), ""


def _dataset(run: Run, trained: models.Trained) -> Dataset:
    """The run's images, if they are still where it found them; nothing is downloaded."""
    settings: dict[str, Any] = dict(run.summary["config"]["data"])
    # What a file names is not called, but for the project's own; nor what its values name.
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


def chosen(dataset: Dataset | EvaluationSet, number: int) -> tuple[Images, list[str]]:
    """Images of the evaluation, evenly spread, and their classes."""
    return by_index(dataset, spread(len(dataset.evaluation), number))


def by_index(dataset: Dataset | EvaluationSet, indices: list[int]) -> tuple[Images, list[str]]:
    """Images of the evaluation by their numbers, from 0 on, and their classes.

    Raises:
        ValueError: there is no image of that number.
    """
    for index in indices:
        if not 0 <= index < len(dataset.evaluation):
            raise ValueError(
                f"there is no image {index}; {dataset.name} {dataset.evaluated_on} has the images "
                f"0 to {len(dataset.evaluation) - 1}"
            )
    images = dataset.evaluation.select(indices)
    return images, [dataset.class_names[label] for label in images.labels.tolist()]
