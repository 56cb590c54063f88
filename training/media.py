"""What there is to see of a run: attention on a few images, predictions, classes.

Nothing here changes a run: the network's mode, its statistics and all random generators are left
as they were. `training.tracking` sends what these functions return.
"""

from collections.abc import Iterable, Sequence

import torch
from PIL import Image
from torch import Tensor, nn

from aaconv import attention_maps
from aaconv.maps import layer_inputs, output_size
from data import Dataset, evaluation_batches
from data.dataset import Images
from models import augmented_layers
from models.attending import as_in_evaluation, sharpest
from training import tiles
from training.tracking import Media, Picture, Table

# Images whose attention is drawn, and heads of each block; the rest would look much alike.
ATTENTION_IMAGES = 3
HEADS = 4
# Images in the table of predictions.
PREDICTIONS = 32
# Classes whose confusion is told, and how many others for each.
WORST_CLASSES = 10
TAKEN_FOR = 3

# The space between tiles in pixels, and the colour behind them.
GAP, PAPER = 6, (255, 255, 255)


def moments(epochs: int) -> frozenset[int]:
    """The epochs, counted from 1, after which attention is drawn: first, middle and last."""
    return frozenset((1, (epochs + 1) // 2, epochs))


def attention_pictures(
    model: nn.Module, dataset: Dataset, autocast: torch.autocast
) -> dict[str, list[Picture]]:
    """Where each augmented block of ``model`` looks, on a few fixed images of the evaluation.

    A picture has the image and a tile for each of a few heads. In the upper row a tile shows the
    weights of one query, the one marked in the image, whose attention is the sharpest (the lowest
    entropy, averaged over the heads); in the lower row their mean over all queries. The brightest
    position of a tile has its largest weight. Empty for a plain network.
    """
    layers = augmented_layers(model)
    if not layers:
        return {}
    images = _chosen(dataset.evaluation, ATTENTION_IMAGES)
    (batch, labels), *_ = evaluation_batches(images, len(images), dataset.mean, dataset.std)
    pictures: dict[str, list[Picture]] = {}
    with torch.no_grad(), as_in_evaluation(model), layer_inputs(model) as inputs, autocast:
        model(batch)
        for name, layer in layers.items():
            maps = attention_maps(layer, inputs[name])[:, :HEADS].float().cpu()
            size = output_size(layer, inputs[name])
            words = f"{name}, {size[0]}x{size[1]}, dk={layer.dk}, dv={layer.dv}, Nh={layer.Nh}"
            pictures[f"media/attention/{name}"] = [
                Picture(
                    _drawn(pixels, weights.unflatten(-1, size), sharpest(weights)),
                    f"{words}; {dataset.class_names[label]}; heads 1 to {weights.shape[0]}, "
                    "above from the marked position, the sharpest, below from all",
                )
                for pixels, weights, label in zip(
                    images.pixels.cpu(), maps, labels.tolist(), strict=True
                )
            ]
    return pictures


def final_media(
    model: nn.Module, dataset: Dataset, batch_size: int, autocast: torch.autocast
) -> dict[str, Media]:
    """What a trained network makes of the evaluation's images, in one pass over them.

    ``media/predictions``: fixed images with truth, prediction and confidence (the softmax of the
    prediction). ``media/classes``: top-1 accuracy of each class in per cent. ``media/confusion``:
    what the classes with the lowest accuracy are taken for, in per cent of their images.
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
        "media/confusion": _confusion(dataset.class_names, confusion),
    }


@torch.no_grad()
def _all_logits(
    model: nn.Module, dataset: Dataset, batch_size: int, autocast: torch.autocast
) -> Tensor:
    batches = evaluation_batches(dataset.evaluation, batch_size, dataset.mean, dataset.std)
    with as_in_evaluation(model), autocast:
        logits: list[Tensor] = [model(images).float().cpu() for images, _ in batches]
    return torch.cat(logits)


# ---- Tables and pictures ------------------------------------------------------------------------


def spread(number: int, wanted: int) -> list[int]:
    """At most ``wanted`` of the indices 0 to number - 1, evenly spread."""
    wanted = min(number, wanted)
    return [index * number // wanted for index in range(wanted)]


def _chosen(images: Images, wanted: int) -> Images:
    indices = spread(len(images), wanted)
    return Images(images.pixels[indices], images.labels[indices])


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
    return Table(["image", "truth", "prediction", "confidence %", "right"], rows)


def _shares(confusion: Tensor) -> Tensor:
    """Per cent of each row's images; 0 for a class without any."""
    return 100 * confusion.double() / confusion.sum(dim=1, keepdim=True).clamp(min=1)


def _classes(names: Sequence[str], confusion: Tensor) -> Table:
    shares, seen = _shares(confusion), confusion.sum(dim=1)
    rows = [
        [name, round(float(shares[index, index]), 2), int(seen[index])]
        for index, name in enumerate(names)
        if seen[index]
    ]
    return Table(["class", "top-1 %", "images"], rows)


def _confusion(names: Sequence[str], confusion: Tensor) -> Table:
    shares, seen = _shares(confusion), confusion.sum(dim=1).tolist()
    worst = sorted((i for i in range(len(names)) if seen[i]), key=lambda i: float(shares[i, i]))
    rows = []
    for index in worst[:WORST_CLASSES]:
        others = shares[index].clone()
        others[index] = 0
        for other in others.argsort(descending=True, stable=True)[:TAKEN_FOR].tolist():
            if others[other] > 0:
                own, share = (round(float(shares[index, i]), 2) for i in (index, other))
                rows.append([names[index], own, names[other], share])
    return Table(["class", "top-1 %", "taken for", "of its images %"], rows)


def _drawn(pixels: Tensor, weights: Tensor, query: int) -> Image.Image:
    """One image (H, W, 3), the marked query, and tiles for the weights (heads, queries, h, w)."""
    image = tiles.enlarged(pixels)
    size = (weights.shape[2], weights.shape[3])
    upper = [tiles.tile(image, head[query]) for head in weights]
    lower = [tiles.tile(image, head.mean(dim=0)) for head in weights]
    marked = tiles.marked(image, divmod(query, size[1]), size)
    return _grid([[marked, *upper], [image, *lower]])


def _grid(rows: Iterable[Sequence[Image.Image]]) -> Image.Image:
    rows = list(rows)
    width, height = (side + GAP for side in rows[0][0].size)
    page = Image.new("RGB", (len(rows[0]) * width - GAP, len(rows) * height - GAP), PAPER)
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            page.paste(tile, (x * width, y * height))
    return page
