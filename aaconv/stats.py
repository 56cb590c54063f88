"""Measure how soft a network's attention is: the entropy of its weights, and its gradients.

Attention that starts out nearly one-hot hardly learns where to look, because the gradient of a
softmax vanishes where one weight is close to 1. After adding attention to your own network, check
this before the first epoch::

    print(attention_stats(model, images, lambda logits: F.cross_entropy(logits, labels)))
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from aaconv.augment import call_arguments
from aaconv.maps import attention_map_parts, augmented_layers, layer_inputs
from aaconv.modules import AugmentedConv
from aaconv.text import table


@dataclass(frozen=True)
class LayerStats:
    """One augmented layer; entropy and largest weight are means over images, heads and queries.

    Attributes:
        name: module name of the layer.
        size: (h, w) of the map of positions that attend to each other.
        entropy: entropy of a query's weights, divided by its maximum log(h w): 1 is uniform, 0 is
            one-hot.
        largest: largest weight of a query.
        gradient: norm of the loss gradient over the layer's parameters; None without a loss.
    """

    name: str
    size: tuple[int, int]
    entropy: float
    largest: float
    gradient: float | None


@dataclass(frozen=True)
class AttentionStats:
    """The result of `attention_stats`; as a string, a table by layer.

    Attributes:
        layers: the augmented layers, in module order.
        gradient: norm of the loss gradient over all parameters; None without a loss.
    """

    layers: list[LayerStats]
    gradient: float | None

    @property
    def lowest_entropy(self) -> float | None:
        """The entropy of the layer with the sharpest attention; None without attention."""
        return min((layer.entropy for layer in self.layers), default=None)

    def __str__(self) -> str:
        lines = [["attention", "map", "entropy", "largest weight", "gradient"]]
        for layer in self.layers:
            size = f"{layer.size[0]}x{layer.size[1]}"
            shares = [f"{layer.entropy:.2f}", f"{layer.largest:.3f}"]
            lines.append([layer.name, size, *shares, _norm(layer.gradient)])
        lines.append(["network", "", "", "", _norm(self.gradient)])
        return "\n".join(table(lines, "lrrrr"))


def attention_stats(
    model: nn.Module, example_input: Any, loss: Callable[[Any], Tensor] | None = None
) -> AttentionStats:
    """Measure how soft the attention of each augmented layer is and how large its gradients are.

    Runs one pass in the model's current mode: in training mode, as before the first step, batch
    normalization uses the statistics of the batch. Parameters, their ``grad`` and buffers are left
    unchanged.

    Args:
        model: any network; the table is empty if it has no augmented layers.
        example_input: what ``model`` is called with: a tensor, a tuple of arguments or a dict of
            keyword arguments. About a hundred images of the task; noise says little.
        loss: maps the model's output to a scalar whose gradient is measured; None to skip that.

    Raises:
        ValueError: if there are no images, or the forward pass skips a layer; the message names it.
    """
    args, kwargs = call_arguments(example_input)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    gradients: dict[str, Tensor] = {}
    with _buffers_kept(model), layer_inputs(model) as inputs:
        with torch.set_grad_enabled(loss is not None):
            output = model(*args, **kwargs)
            if loss is not None and parameters:
                found = torch.autograd.grad(
                    loss(output), list(parameters.values()), allow_unused=True
                )
                gradients = {n: g for n, g in zip(parameters, found, strict=True) if g is not None}
        layers = []
        for name, layer in augmented_layers(model).items():
            if layer.dv == 0:
                continue
            if name not in inputs:
                raise ValueError(f"{name} was not reached by the forward pass of example_input")
            prefix = f"{name}." if name else ""
            own = [g for n, g in gradients.items() if n.startswith(prefix)]
            gradient = None if loss is None else float(get_total_norm(own))
            layers.append(_layer_stats(name, layer, inputs[name], gradient))
    total = None if loss is None else float(get_total_norm(gradients.values()))
    return AttentionStats(layers, total)


def _layer_stats(name: str, layer: AugmentedConv, x: Tensor, gradient: float | None) -> LayerStats:
    if not len(x):
        raise ValueError("example_input has no images")
    size = layer.positions(x)
    positions = size[0] * size[1]
    entropy = largest = 0.0
    rows = 0
    for weights in attention_map_parts(layer, x):
        entropy -= float(torch.special.xlogy(weights, weights).sum())
        largest += float(weights.amax(dim=-1).sum())
        rows += weights[..., 0].numel()
    # With a single position there is nothing to choose from: its one weight is uniform.
    share = entropy / rows / math.log(positions) if positions > 1 else 1.0
    return LayerStats(name, size, share, largest / rows, gradient)


def _norm(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Restore the buffers of ``model``, such as normalization statistics, on exit."""
    before = [
        (module._buffers, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, name, buffer, value in before:
                buffers[name] = buffer  # the forward pass may have put another one there
                buffer.copy_(value)
