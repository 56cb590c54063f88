"""Attention maps of a layer, computed on demand, and the augmented layers of a network."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from aaconv.backends.precision import without_autocast
from aaconv.modules import AugmentedConv

# Number of queries whose weights are computed at once, for one image or several small ones.
QUERIES = 1024


@torch.no_grad()
def attention_maps(layer: AugmentedConv, x: Tensor, queries: Sequence[int] | None = None) -> Tensor:
    """Return the weights with which each position of ``layer`` attends to all positions.

    This is the softmax of Bello et al. 2019, equations 1 and 3 to 5, in at least float32 and
    without gradients. The layer is left unchanged and stores nothing.

    Args:
        layer: the layer.
        x: its input, (B, in_channels, H, W).
        queries: positions to return the weights of, as ``row * width + column`` in the output or,
            with pooling, in the pooled map (`AugmentedConv.positions`); by default all, in that
            order. Only these are computed.

    Returns:
        (B, Nh, queries, positions); each row sums to 1.

    Raises:
        ValueError: if the layer has no attention (dv=0), ``x`` has the wrong shape, or a query is
            outside the map.
    """
    if layer.dv == 0:
        raise ValueError("layer has no attention: dv=0 is a plain convolution")
    if x.dim() != 4:
        raise ValueError(f"x must be (B, in_channels, H, W); got {tuple(x.shape)}")
    q, k, _, rel_h, rel_w = layer.queries_keys_values(x)
    height, width = q.shape[2:4]
    wanted = range(height * width) if queries is None else queries
    for query in wanted:
        if not 0 <= query < height * width:
            raise ValueError(
                f"queries has {query}, but the map of {height}x{width} has the positions 0 to "
                f"{height * width - 1}"
            )
    positions = torch.tensor(list(wanted), dtype=torch.int64, device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device.type):
        q = q.flatten(2, 3)[:, :, positions].to(wide) * q.shape[-1] ** -0.5  # (B, Nh, n, dkh)
        logits = q @ k.flatten(2, 3).to(wide).mT
        if rel_h is not None and rel_w is not None:
            by_row = _bias(q, rel_h.to(wide), positions // width, height)[..., None]
            by_column = _bias(q, rel_w.to(wide), positions % width, width)[..., None, :]
            logits = logits.unflatten(-1, (height, width)) + by_row + by_column
            logits = logits.flatten(-2)
        return torch.softmax(logits, dim=-1)


def attention_map_parts(layer: AugmentedConv, x: Tensor) -> Iterator[Tensor]:
    """Yield `attention_maps` of all queries in parts, in order, at most QUERIES queries at a time.

    A part is (B, Nh, queries, positions), for several images or for some queries of one image.
    """
    height, width = layer.positions(x)
    positions = height * width
    for images in x.split(max(1, QUERIES // positions)):
        for first in range(0, positions, QUERIES):
            yield attention_maps(layer, images, range(first, min(first + QUERIES, positions)))


def _bias(q: Tensor, table: Tensor, at: Tensor, length: int) -> Tensor:
    """Return ``q . table[j - at + length - 1]`` for each query and all j, (B, Nh, n, length)."""
    offsets = torch.arange(length, device=at.device) - at[:, None] + length - 1
    return torch.einsum("bhnd,njd->bhnj", q, table[offsets])


# ---- The layers of a network --------------------------------------------------------------------


def augmented_layers(model: nn.Module) -> dict[str, AugmentedConv]:
    """Return the augmented convolutions of a network by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, AugmentedConv)}


@contextmanager
def layer_inputs(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record the inputs of the augmented layers during the ``with`` block, by layer name.

    Each is (B, in_channels, H, W) in the layer's own dtype, also under autocast.
    """
    inputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: Any, kwargs: dict[str, Tensor]) -> None:
        x = (args[0] if args else kwargs["x"]).detach()
        own = next(layer.parameters()).dtype
        inputs[name] = (x if x.dim() == 4 else x[None]).to(own)

    handles = [
        layer.register_forward_pre_hook(partial(keep, name), with_kwargs=True)
        for name, layer in augmented_layers(model).items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()
