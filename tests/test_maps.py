"""Attention weights, against the pair-by-pair formula."""

import pytest
import torch

from aaconv import AugmentedConv, attention_maps

import reference
from helpers import slow


def layer_of(size, *, dk=6, dv=4, Nh=2, in_channels=5, stride=1, dtype=torch.float64, **more):
    torch.manual_seed(0)
    arguments = {"shape": size, "relative": True, "stride": stride} | more
    return AugmentedConv(in_channels, 9, 3, dk, dv, Nh, **arguments).to(dtype)


@torch.no_grad()
def weights_by_pairs(layer, x):
    """Return the weights as the output for one-hot values of the positions."""
    q, k, _, *tables = layer.queries_keys_values(x)
    B, N, H, W, _ = q.shape
    values = torch.eye(H * W, dtype=x.dtype).view(H, W, H * W).expand(B, N, H, W, H * W)
    return reference.attention(q, k, values, *tables).flatten(2, 3)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize(("size", "stride"), [((3, 5), 1), slow((7, 2), 1), ((2, 3), 2)])
def test_equals_the_formula(size, stride, relative):
    layer = layer_of(size, stride=stride, relative=relative, qk_norm=size == (3, 5))
    x = torch.randn(2, 5, size[0] * stride, size[1] * stride - (stride - 1), dtype=torch.float64)
    maps = attention_maps(layer, x)
    positions = size[0] * size[1]
    assert maps.shape == (2, 2, positions, positions)
    torch.testing.assert_close(maps, weights_by_pairs(layer, x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, positions, dtype=torch.float64))


@pytest.mark.parametrize(
    "more",
    [{}, {"absolute": "sine", "relative": False}, {"absolute": "coord"}, {"qkv_kernel_size": 3}],
    ids=str,
)
@pytest.mark.parametrize("size", [(3, 5), (4, 3)])
def test_are_the_weights_of_the_layers_output(more, size):
    """This includes maps of other sizes than that of the tables, and channels_last inputs."""
    layer = layer_of((3, 5), **more)
    x = torch.randn(2, 5, *size, dtype=torch.float64).to(memory_format=torch.channels_last)
    _, _, v, _, _ = layer.queries_keys_values(x)
    attended = attention_maps(layer, x) @ v.flatten(2, 3)  # (B, Nh, HW, dvh)
    attended = attended.permute(0, 1, 3, 2).reshape(2, 4, *size)
    torch.testing.assert_close(layer.attn_out(attended), layer(x)[:, 5:], rtol=1e-10, atol=1e-12)


def test_of_chosen_queries_are_rows_of_all():
    layer = layer_of((3, 5))
    x = torch.randn(2, 5, 3, 5, dtype=torch.float64)
    chosen = attention_maps(layer, x, queries=[14, 0, 7, 7])
    assert chosen.shape == (2, 2, 4, 15)
    torch.testing.assert_close(chosen, attention_maps(layer, x)[:, :, [14, 0, 7, 7]])
    assert attention_maps(layer, x, queries=[]).shape == (2, 2, 0, 15)


def test_of_chosen_queries_hold_no_matrix_of_all():
    """With 256x256 positions, all weights of a head would take 16 GiB."""
    layer = layer_of((256, 256), dtype=torch.float32)
    maps = attention_maps(layer, torch.randn(1, 5, 256, 256), queries=[256 * 100 + 3])
    assert maps.shape == (1, 2, 1, 256 * 256)
    torch.testing.assert_close(maps.sum(-1), torch.ones(1, 2, 1))


def test_leave_the_layer_as_it_is():
    layer = layer_of((3, 5), dtype=torch.bfloat16).train()
    x = torch.randn(1, 5, 3, 5, dtype=torch.bfloat16, requires_grad=True)
    before, rng = dict(vars(layer)), torch.get_rng_state()
    maps = attention_maps(layer, x)
    assert maps.dtype == torch.float32
    assert not maps.requires_grad
    assert vars(layer) == before
    assert layer.training
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention_maps(layer.float(), x.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("layer", "shape", "queries", "line"),
    [
        (layer_of((3, 5), dv=0), (1, 5, 3, 5), None, "layer has no attention: dv=0"),
        (layer_of((3, 5)), (5, 3, 5), None, r"x must be \(B, in_channels, H, W\); got \(5, 3, 5"),
        (layer_of((3, 5)), (1, 5, 3, 5), [0, 15], "queries has 15, but the map of 3x5 has the"),
        (layer_of((3, 5)), (1, 5, 3, 5), [-1], "queries has -1"),
    ],
    ids=["no attention", "no batch", "too far", "negative"],
)
def test_what_cannot_be_asked_is_named(layer, shape, queries, line):
    with pytest.raises(ValueError, match=line):
        attention_maps(layer, torch.zeros(shape, dtype=torch.float64), queries)
