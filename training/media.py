"""What there is to see of a run: attention on a few images, predictions, classes.

Nothing here changes a run: the network's mode, its statistics and all random generators are left
as they were. `training.tracking` sends what these functions return.
"""

import statistics
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from aaconv import attention_stats
from data import Dataset, evaluation_batches
from models import augmented_layers
from models.views import eval_mode
from training import attention_picture
from training.scores import most_mistaken
from training.tracking import Media, Picture, Table

# Images whose attention is drawn: on the dashboard, in the report, and by visualize.py.
ATTENTION_IMAGES = 3
# Images on which the entropy of attention is measured; each has as many queries as positions.
ENTROPY_IMAGES = 16
# Images in the table of predictions.
PREDICTIONS = 32
# Classes listed in the confusion table, and how many others for each.
WORST_CLASSES = 10
CONFUSED_WITH = 3
# Classes that a confusion matrix on the dashboard has room for.
MATRIX_CLASSES = 30


def media_epochs(epochs: int) -> frozenset[int]:
    """The epochs, counted from 1, after which attention is drawn: first, middle and last."""
    return frozenset((1, (epochs + 1) // 2, epochs))


def attention_pictures(model: nn.Module, dataset: Dataset) -> dict[str, list[Picture]]:
    """What each augmented block of ``model`` attends to, on a few fixed images of the evaluation.

    One picture for each block, see `training.attention_picture`; computed in float32. Empty for a
    plain network.
    """
    images = dataset.evaluation.select(spread(len(dataset.evaluation), ATTENTION_IMAGES))
    names = [dataset.class_names[label] for label in images.labels.tolist()]
    drawn = attention_picture.attention_pictures(model, images, names, dataset.mean, dataset.std)
    return {
        f"media/attention/{layer}": [
            Picture(
                attention_picture.labeled(picture),
                f"{layer}, {picture.words}. Of each image from the marked position, whose "
                "attention is the sharpest, and the mean over all positions",
            )
        ]
        for layer, picture in drawn.items()
    }


def attention_entropy(model: nn.Module, dataset: Dataset) -> dict[str, float]:
    """How softly ``model`` attends: columns of metrics.csv, none for a plain network.

    The entropy of a query's weights as a share of its maximum (1 is uniform, 0 one-hot; see
    `aaconv.attention_stats`), on a few fixed images of the evaluation, in float32 and evaluation
    mode: ``attention/entropy``, the mean over the layers, and ``attention/lowest_entropy``, that of
    the layer that attends most sharply.
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
    """What a trained network makes of the evaluation's images, in one pass over them.

    ``media/predictions``: fixed images with truth, prediction and confidence (the softmax of the
    prediction). ``media/classes``: top-1 accuracy of each class in percent.
    ``media/confusion_matrix``: the classes with the most mistakes. ``media/confusion``: what the
    classes with the lowest accuracy are taken for, in percent of their images. For the charts see
    `training.tracking.CHARTS`.
    """
    logits = _all_logits(model, dataset, batch_size, autocast)
    labels = dataset.evaluation.labels.cpu()
    predicted = logits.argmax(dim=1)
    classes = dataset.num_classes
    counts = torch.bincount(labels * classes + predicted, minlength=classes * classes)
    confusion = counts.view(classes, classes)  # rows: truth
    return {
        "media/predictions": _predictions(dataset, logits, labels, predicted),
        "media/classes": _classes(dataset.class_names, confusion),
        "media/confusion_matrix": _matrix(dataset.class_names, confusion.tolist()),
        "media/confusion": _confusion(dataset.class_names, confusion),
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
    """At most ``wanted`` of the indices 0 to number - 1, evenly spread."""
    wanted = min(number, wanted)
    return [index * number // wanted for index in range(wanted)]


def _predictions(dataset: Dataset, logits: Tensor, labels: Tensor, predicted: Tensor) -> Table:
    names = dataset.class_names
    confidence = logits.softmax(dim=1).amax(dim=1)
    rows = []
    for index in spread(len(labels), PREDICTIONS):
        truth, guess = int(labels[index]), int(predicted[index])
        image = Image.fromarray(dataset.evaluation.pixels[index].cpu().numpy())
        # Enlarged, because browsers blur an image of 32 pixels.
        picture = Picture(image.resize((96, 96), Image.Resampling.NEAREST), names[truth])
        share = round(100 * float(confidence[index]), 2)
        rows.append([picture, names[truth], names[guess], share, "yes" if truth == guess else "no"])
    return Table(["image", "truth", "prediction", "confidence %", "correct"], rows)


def _shares(confusion: Tensor) -> Tensor:
    """Percent of each row's images; 0 for a class without any."""
    return 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)


def _classes(names: Sequence[str], confusion: Tensor) -> Table:
    shares, seen = _shares(confusion), confusion.sum(dim=1)
    rows = [
        [name, round(float(shares[index, index]), 2), int(seen[index])]
        for index, name in enumerate(names)
        if seen[index]
    ]
    return Table(["class", "top-1 %", "images"], rows)


def _matrix(names: Sequence[str], confusion: list[list[int]]) -> Table:
    chosen = most_mistaken(confusion, MATRIX_CLASSES)
    rows = [[names[row], names[col], confusion[row][col]] for row in chosen for col in chosen]
    return Table(["class", "predicted as", "images"], rows)


def _confusion(names: Sequence[str], confusion: Tensor) -> Table:
    shares, seen = _shares(confusion), confusion.sum(dim=1).tolist()
    worst = sorted((i for i in range(len(names)) if seen[i]), key=lambda i: float(shares[i, i]))
    rows = []
    for index in worst[:WORST_CLASSES]:
        others = shares[index].clone()
        others[index] = 0
        for other in others.argsort(descending=True, stable=True)[:CONFUSED_WITH].tolist():
            if others[other] > 0:
                own, share = (round(float(shares[index, i]), 2) for i in (index, other))
                rows.append([names[index], own, names[other], share])
    return Table(["class", "top-1 %", "predicted as", "of its images %"], rows)
