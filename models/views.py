"""What the augmented convolutions of a network attend to, on images that it is given."""

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
        queries: output positions, as (row, column).
        weights: of these queries, (Nh, queries, h, w), float32 on the CPU; each map adds up to 1.
        mean: weights averaged over all queries, (Nh, h, w); None where queries were chosen, because
            only theirs are computed then.
    """

    layer: AugmentedConv
    queries: list[tuple[int, int]]
    weights: Tensor
    mean: Tensor | None

    @property
    def size(self) -> tuple[int, int]:
        """(h, w) of the map that is attended to: the layer's output, or smaller by its pooling."""
        return self.weights.shape[2], self.weights.shape[3]


def attention_views(
    model: nn.Module, batch: Tensor, queries: Sequence[tuple[int, int]] | None = None
) -> dict[str, list[AttentionView]]:
    """The attention of each augmented layer, by its name, on each image of ``batch``.

    The model is left as it was, its mode and its statistics too.

    Args:
        model: the network.
        batch: images (B, 3, H, W), normalized as it was trained.
        queries: pixels (row, column) of the image; a layer's queries are the positions that cover
            them. By default the one position of each layer and image whose attention is the
            sharpest, of the lowest entropy.

    Raises:
        ValueError: a pixel that no image of the batch has.
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
    """The query with the lowest entropy, averaged over heads, and the mean weights, (Nh, h w).

    Of several such queries the first. The weights of all queries are never held at once.
    """
    total, entropies = torch.zeros(()), []
    for part in attention_map_parts(layer, x):
        weights = part[0].float().cpu()
        total = total + weights.sum(dim=1)
        entropies.append(-torch.special.xlogy(weights, weights).sum(dim=-1).mean(dim=0))
    return int(torch.cat(entropies).argmin()), total / total.shape[-1]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode within the ``with``, and afterwards each module as it was."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
