"""Show what the augmented convolutions of a network attend to on given images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from aaconv import AugmentedConv, attention_maps
from aaconv.maps import attention_map_parts, augmented_layers, layer_inputs


@dataclass(frozen=True)
class AttentionView:
    """The attention of one layer on one image.

    Attributes:
        layer: the layer.
        queries: positions on the map of ``size``, as (row, column).
        weights: those of the queries, (Nh, queries, h, w), float32 on the CPU; each map sums to 1.
        mean: weights averaged over all queries, (Nh, h, w); None if queries were given, because
            only their weights are computed then.
    """

    layer: AugmentedConv
    queries: list[tuple[int, int]]
    weights: Tensor
    mean: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the attention map: the layer's output size, divided by ``pool``."""
        return self.weights.shape[2], self.weights.shape[3]


def attention_views(
    model: nn.Module, batch: Tensor, queries: Sequence[tuple[int, int]] | None = None
) -> dict[str, list[AttentionView]]:
    """Return the attention of each augmented layer, by layer name, on each image of ``batch``.

    The model is left unchanged, including its mode and statistics.

    Args:
        model: the network.
        batch: images (B, 3, H, W), normalized as in training.
        queries: pixels (row, column) of the image; a layer's queries are the positions that cover
            them. By default, for each layer and image, the one position with the sharpest
            attention, that is, the lowest entropy.

    Raises:
        ValueError: if a pixel is outside the images.
    """
    height, width = batch.shape[2:]
    for row, column in queries or ():
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"pixel {row},{column} is outside the {height}x{width} image; rows go from 0 "
                f"to {height - 1}, columns from 0 to {width - 1}"
            )
    with torch.no_grad(), eval_mode(model), layer_inputs(model) as inputs:
        model(batch)
        return {
            name: [_view(layer, image[None], queries, batch) for image in inputs[name]]
            for name, layer in augmented_layers(model).items()
        }


def _view(
    layer: AugmentedConv, x: Tensor, queries: Sequence[tuple[int, int]] | None, batch: Tensor
) -> AttentionView:
    height, width = layer.positions(x)
    mean = None
    if queries is None:
        best, mean = _sharpest_and_mean(layer, x)
        places = [divmod(best, width)]
        mean = mean.unflatten(-1, (height, width))
    else:
        places = [
            (row * height // batch.shape[2], column * width // batch.shape[3])
            for row, column in queries
        ]
    flat = [row * width + column for row, column in places]
    maps = attention_maps(layer, x, flat)[0].float().cpu()
    return AttentionView(layer, places, maps.unflatten(-1, (height, width)), mean)


def _sharpest_and_mean(layer: AugmentedConv, x: Tensor) -> tuple[int, Tensor]:
    """Return the query with the lowest entropy, averaged over heads, and mean weights, (Nh, h w).

    Ties go to the first query. The weights of all queries are never in memory at once.
    """
    total, entropies = torch.zeros(()), []
    for part in attention_map_parts(layer, x):
        weights = part[0].float().cpu()
        total = total + weights.sum(dim=1)
        entropies.append(-torch.special.xlogy(weights, weights).sum(dim=-1).mean(dim=0))
    return int(torch.cat(entropies).argmin()), total / total.shape[-1]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode during the ``with`` block; restore all modes afterward."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
