"""Pictures and tables of a run: attention on a few images, predictions, classes.

Nothing here changes a run: the network's mode, its running statistics and all random generators
stay as they were. `training.tracking` sends the results to the dashboard.
"""

import statistics
from collections.abc import Sequence

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from aaconv import attention_stats
from data import Dataset, EvaluationSet, Images, evaluation_batches
from models import augmented_layers
from models.views import eval_mode
from training import attention_picture
from training.scores import ClassScore, Confusion, most_mistaken
from training.tracking import Media, Picture, Table

# Images whose attention is drawn: on the dashboard, in the report, and by visualize.py.
ATTENTION_IMAGES = 3
# Images on which the entropy of attention is measured; every position of each is a query.
ENTROPY_IMAGES = 16
# Images in the table of predictions.
PREDICTIONS = 32
# Classes listed in the confusion table, and the number of other classes for each.
WORST_CLASSES = 10
CONFUSED_WITH = 3
# Classes that a confusion matrix on the dashboard has room for.
MATRIX_CLASSES = 30


def media_epochs(epochs: int) -> frozenset[int]:
    """Return the epochs after which attention is drawn: first, middle and last, counted from 1."""
    return frozenset((1, (epochs + 1) // 2, epochs))


def attention_images(
    dataset: Dataset | EvaluationSet, indices: list[int] | None = None
) -> tuple[Images, list[str]]:
    """Return evaluation images and their class names, by index, or else a few evenly spread ones.

    Raises:
        ValueError: if an index is out of range.
    """
    number = len(dataset.evaluation)
    if indices is None:
        indices = spread(number, ATTENTION_IMAGES)
    for index in indices:
        if not 0 <= index < number:
            raise ValueError(
                f"there is no image {index}; {dataset.name} {dataset.evaluated_on} has the images "
                f"0 to {number - 1}"
            )
    images = dataset.evaluation.select(indices)
    return images, [dataset.class_names[label] for label in images.labels.tolist()]


def attention_pictures(model: nn.Module, dataset: Dataset) -> dict[str, list[Picture]]:
    """Draw what each augmented layer of ``model`` attends to, on a few fixed evaluation images.

    Return one picture per layer, computed in float32, see `training.attention_picture`; none for a
    plain network.
    """
    images, names = attention_images(dataset)
    drawn = attention_picture.attention_pictures(model, images, names, dataset.mean, dataset.std)
    return {
        f"media/attention/{layer}": [
            Picture(
                attention_picture.labeled(picture),
                f"{layer}, {picture.words}. For each image: attention from the marked position, "
                "where it is sharpest, and the mean over all positions",
            )
        ]
        for layer, picture in drawn.items()
    }


def attention_entropy(model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """Measure how softly ``model`` attends, as columns of metrics.csv; none for a plain network.

    This is the entropy of a query's attention weights as a fraction of the maximum (1 is uniform, 0
    one-hot; see `aaconv.attention_stats`), on a few fixed evaluation images, in float32 and
    evaluation mode. ``attention/entropy`` is the mean over the layers, ``attention/lowest_entropy``
    that of the layer with the sharpest attention.
    """
    if not augmented_layers(model):
        return {}
    images = dataset.evaluation.select(spread(len(dataset.evaluation), ENTROPY_IMAGES))
    (batch, _), *_ = evaluation_batches(images, len(images), dataset.mean, dataset.std)
    with eval_mode(model):
        stats = attention_stats(model, batch)
    assert stats.lowest_entropy is not None
    mean = statistics.fmean(layer.entropy for layer in stats.layers)
    return {"attention/entropy": mean, "attention/lowest_entropy": stats.lowest_entropy}


def final_media(
    model: nn.Module, dataset: Dataset, batch_size: int, autocast: torch.autocast
) -> dict[str, Media]:
    """Return tables of a trained network's predictions on the evaluation images, from one pass.

    ``media/predictions``: fixed images with truth, prediction and confidence (the softmax of the
    prediction). ``media/classes``: top-1 accuracy of each class in percent.
    ``media/confusion_matrix``: counts for the classes with the most mistakes. ``media/confusion``:
    the classes that those with the lowest accuracy are mistaken for, in percent of their images.
    For the charts see `training.tracking.CHARTS`.
    """
    logits = _all_logits(model, dataset, batch_size, autocast)
    labels = dataset.evaluation.labels.cpu()
    confusion = Confusion(dataset.num_classes)
    confusion.add(logits, labels)
    names, counts, scores = dataset.class_names, confusion.counts.tolist(), confusion.by_class()
    return {
        "media/predictions": _predictions(dataset, logits, labels),
        "media/classes": _classes(names, scores),
        "media/confusion_matrix": _matrix(names, counts),
        "media/confusion": _confusion(names, counts, scores),
    }


@torch.no_grad()
def _all_logits(
    model: nn.Module, dataset: Dataset, batch_size: int, autocast: torch.autocast
) -> Tensor:
    batches = evaluation_batches(dataset.evaluation, batch_size, dataset.mean, dataset.std)
    with eval_mode(model), autocast:
        logits: list[Tensor] = [model(images).float().cpu() for images, _ in batches]
    return torch.cat(logits)


# ---- Tables and pictures ------------------------------------------------------------------------


def spread(number: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` indices from 0 to number - 1, evenly spread."""
    wanted = min(number, wanted)
    return [index * number // wanted for index in range(wanted)]


def _predictions(dataset: Dataset, logits: Tensor, labels: Tensor) -> Table:
    names, predicted = dataset.class_names, logits.argmax(dim=1)
    confidence = logits.softmax(dim=1).amax(dim=1)
    rows = []
    for index in spread(len(labels), PREDICTIONS):
        truth, guess = int(labels[index]), int(predicted[index])
        image = Image.fromarray(dataset.evaluation.pixels[index].cpu().numpy())
        # Enlarged, because browsers blur an image of 32 pixels.
        shown = ImageOps.contain(image, (96, 96), Image.Resampling.NEAREST)
        picture = Picture(shown, names[truth])
        share = round(100 * float(confidence[index]), 2)
        rows.append([picture, names[truth], names[guess], share, "yes" if truth == guess else "no"])
    return Table(["image", "truth", "prediction", "confidence %", "correct"], rows)


def _classes(names: Sequence[str], scores: list[ClassScore]) -> Table:
    rows = [
        [name, round(score.recall, 2), score.images]
        for name, score in zip(names, scores, strict=True)
        if score.recall is not None
    ]
    return Table(["class", "top-1 %", "images"], rows)


def _matrix(names: Sequence[str], counts: list[list[int]]) -> Table:
    chosen = most_mistaken(counts, MATRIX_CLASSES)
    rows = [[names[row], names[col], counts[row][col]] for row in chosen for col in chosen]
    return Table(["class", "predicted as", "images"], rows)


def _confusion(names: Sequence[str], counts: list[list[int]], scores: list[ClassScore]) -> Table:
    recalls = {n: score.recall for n, score in enumerate(scores) if score.recall is not None}
    rows = []
    for index in sorted(recalls, key=recalls.__getitem__)[:WORST_CLASSES]:
        mistakes = {n: count for n, count in enumerate(counts[index]) if count and n != index}
        for other in sorted(mistakes, key=lambda n: -mistakes[n])[:CONFUSED_WITH]:
            share = 100 * mistakes[other] / scores[index].images
            rows.append([names[index], round(recalls[index], 2), names[other], round(share, 2)])
    return Table(["class", "top-1 %", "predicted as", "of its images %"], rows)
