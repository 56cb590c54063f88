"""What attention looks at, as pictures: for the report, and for scripts/visualize.py."""

from dataclasses import dataclass
from typing import Any

import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf.errors import OmegaConfBaseException

import models
from configs.schema import OPTIONS
from data import Dataset, Images, evaluation_batches
from models.attending import Look, looks
from reporting import figures
from reporting.runs import Run, Variant
from training import run_folder, tiles
from training.cli import explain
from training.media import spread

# Images in the report, and by default of visualize.py.
IMAGES = 3
# What makes a data set.
KNOWN = {kind._target_ for group, _, kind in OPTIONS if group == "data"}


@dataclass(frozen=True)
class Block:
    """One augmented layer on several images: a row for each image and query."""

    name: str
    words: str
    rows: list[figures.Tiles]

    def figure(self) -> figures.Figure:
        """The picture."""
        return figures.attention(f"{self.name} ({self.words})", self.rows)


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
    (batch, _), *_ = evaluation_batches(images, len(images), (*mean,), (*std,))  # type: ignore[arg-type]
    seen = looks(trained.network, batch, queries)
    made = []
    for number, name in enumerate(models.augmented_layers(trained.network)):
        of_images = [of_image[number] for of_image in seen]
        first = of_images[0]
        height, width = first.size
        words = f"{height}x{width}, Nh={first.layer.Nh}, dk={first.layer.dk}, dv={first.layer.dv}"
        rows = [
            _tiles(pixels.cpu(), look, query, title)
            for pixels, look, title in zip(images.pixels, of_images, titles, strict=True)
            for query in range(len(look.queries))
        ]
        made.append(Block(name, words, rows))
    return made


def _tiles(pixels: torch.Tensor, look: Look, query: int, title: str) -> figures.Tiles:
    image = tiles.enlarged(pixels)
    row, column = look.queries[query]
    heads = [tiles.tile(image, head[query]) for head in look.weights]
    frame = tiles.marked(image, look.queries[query], look.size)
    return figures.Tiles(f"{title}\nfrom {row},{column}", [frame, *heads])


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
        images, titles = chosen(_dataset(run, trained), IMAGES)
        made = blocks(trained, images, titles)
    except (ValueError, OSError, HydraException, OmegaConfBaseException) as error:
        return run, [], f"The attention of {run.folder.name} is not shown: {explain(error)}."
    last = {block.name.rpartition(".conv")[0].rpartition(".")[0]: block for block in made}
    return run, list(last.values()), ""


def _dataset(run: Run, trained: models.Trained) -> Dataset:
    """The run's images, if they are still where it found them; nothing is downloaded."""
    settings: dict[str, Any] = dict(run.summary["config"]["data"])
    # What a file names is not called, but for the project's own; nor what its values name.
    if settings.get("_target_") not in KNOWN:
        raise ValueError(f"its data, {settings.get('_target_')}, are none of this project's")
    if "download" in settings:
        settings["download"] = False
    dataset: Dataset = instantiate(settings, _convert_="all", _recursive_=False)
    if list(dataset.class_names) != trained.class_names:
        raise ValueError(f"the images of {dataset.name} have other classes by now")
    return dataset


def chosen(dataset: Dataset, number: int) -> tuple[Images, list[str]]:
    """Images of the evaluation, evenly spread, and their classes."""
    return by_index(dataset, spread(len(dataset.evaluation), number))


def by_index(dataset: Dataset, indices: list[int]) -> tuple[Images, list[str]]:
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
    labels = dataset.evaluation.labels[indices]
    images = Images(dataset.evaluation.pixels[indices], labels)
    return images, [dataset.class_names[label] for label in labels.tolist()]
