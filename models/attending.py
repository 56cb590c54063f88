"""What the augmented convolutions of a network attend to, on images that it is given."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aaconv import AugmentedConv, attention_maps
from aaconv.maps import augmented_layers, layer_inputs, output_size


@dataclass(frozen=True)
class Look:
    """Where one layer looks on one image.

    Attributes:
        layer: the layer.
        name: of its module.
        weights: (Nh, queries, h, w) on the CPU, float32 or wider; each map adds up to 1.
        queries: the output positions that look, as (row, column).
    """

    layer: AugmentedConv
    name: str
    weights: Tensor
    queries: list[tuple[int, int]]

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the layer's output."""
        return self.weights.shape[2], self.weights.shape[3]


def looks(
    model: nn.Module, batch: Tensor, queries: Sequence[tuple[int, int]] | None = None
) -> list[list[Look]]:
    """For each image of ``batch`` where each augmented layer looks, in the network's order.

    The model is left as it was, its mode and its statistics too.

    Args:
        model: the network.
        batch: images (B, 3, H, W), normalised as it was trained.
        queries: pixels (row, column) of the image from whose place is looked; by default from the
            one position of each layer and image whose attention is the sharpest, see `sharpest`.

    Raises:
        ValueError: a pixel that no image of the batch has.
    """
    height, width = batch.shape[2:]
    for row, column in queries or ():
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"there is no pixel {row},{column} in an image of {height}x{width}; rows go from 0 "
                f"to {height - 1}, columns from 0 to {width - 1}"
            )
    found: list[list[Look]] = [[] for _ in range(len(batch))]
    with torch.no_grad(), as_in_evaluation(model), layer_inputs(model) as inputs:
        model(batch)
        for name, layer in augmented_layers(model).items():
            x = inputs[name]
            size = output_size(layer, x)
            for image, images_looks in enumerate(found):
                images_looks.append(_look(layer, name, x[image : image + 1], size, queries, batch))
    return found


def _look(
    layer: AugmentedConv,
    name: str,
    x: Tensor,
    size: tuple[int, int],
    queries: Sequence[tuple[int, int]] | None,
    batch: Tensor,
) -> Look:
    height, width = size
    if queries is None:
        maps = attention_maps(layer, x)[0].float().cpu()
        best = sharpest(maps)
        maps, places = maps[:, best : best + 1], [divmod(best, width)]
    else:
        places = [
            (row * height // batch.shape[2], column * width // batch.shape[3])
            for row, column in queries
        ]
        flat = [row * width + column for row, column in places]
        maps = attention_maps(layer, x, flat)[0].float().cpu()
    return Look(layer, name, maps.unflatten(-1, size), places)


def sharpest(weights: Tensor) -> int:
    """Of the queries of weights (heads, queries, positions) the one with the lowest entropy.

    Averaged over the heads; of several the first.
    """
    entropy = -torch.special.xlogy(weights, weights).sum(dim=-1)
    return int(entropy.mean(dim=0).argmin())


@contextmanager
def as_in_evaluation(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the ``with``, and afterwards each module as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
