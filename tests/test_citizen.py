"""`AugmentedConv` in place of a torch layer: conventions, pooling, transforms, FLOP counting.

Its formula is tested in test_layer.py, exported programs in test_export.py.
"""

import numpy as np
import pytest
import torch
from test_layer import build, image
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from aaconv import AugmentedConv, attention_2d, attention_maps
from aaconv.functional import BACKENDS

import reference
from helpers import usable

# ---- Conventions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"kernel_size": (3, 3), "stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}),
        ({"kernel_size": (3, 5), "stride": (2, 1)}, {"stride": (2, 1), "padding": (1, 2)}),
        ({"dilation": 2}, {"dilation": (2, 2), "padding": (2, 2)}),
        ({"in_channels": 6, "out_channels": 10, "groups": 3}, {"groups": 3, "out_channels": 10}),
        ({"padding": "same"}, {"padding": "same", "in_channels": 5}),
    ],
    ids=str,
)
def test_has_the_attributes_of_torchs_convolution(change, expected):
    layer = build(**change)
    assert {name: getattr(layer, name) for name in expected} == expected
    for name in ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels"):
        assert getattr(layer, name) == getattr(layer.conv_out, name)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own warning
@pytest.mark.parametrize("kernel", [3, 2, (3, 4)])
def test_padding_same_keeps_the_size(kernel):
    layer = build(kernel_size=kernel, padding="same")
    x = image(2, 5, 3, 5)
    out = layer(x)
    assert out.shape == (2, 11, 3, 5)
    assert torch.equal(out[:, :7], layer.conv_out(x))


def test_one_image_without_its_batch():
    layer = build(stride=2)
    x = image(2, 5, 5, 9)
    torch.testing.assert_close(layer(x[0]), layer(x)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", usable(torch.float64))
@pytest.mark.parametrize("change", [{}, {"stride": 2}, {"pool": 2}, {"relative": False}], ids=str)
def test_no_image_at_all(backend, change):
    layer = build(backend=backend, **change)
    x = torch.zeros(0, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    out = layer(x)
    assert out.shape == (0, 11, *((2, 3) if "stride" in change else (4, 6)))
    out.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.abs().max() == 0 for p in layer.parameters())


def test_numpys_integers_are_integers():
    change = {"in_channels": 5, "out_channels": 11, "dk": 6, "dv": 4, "Nh": 2, "kernel_size": 3}
    layer = build(**{name: np.int64(value) for name, value in change.items()}, shape=np.int32(4))
    assert type(layer.dk) is type(layer.out_channels) is int
    assert layer.shape == (4, 4)
    assert build(shape=(np.int64(3), np.int64(5))).shape == (3, 5)


@pytest.mark.parametrize("value", [6.0, True, "6", None, np.float32(6), [6], (6,)], ids=repr)
@pytest.mark.parametrize("name", ["dk", "dv", "Nh", "in_channels", "out_channels", "pool"])
def test_what_is_no_integer_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* must be an int$"):
        build(**{name: value})


@pytest.mark.parametrize("value", [3.0, True, "3", (3, 3.0), (3, True), (3,), {3}], ids=repr)
@pytest.mark.parametrize("name", ["kernel_size", "stride", "dilation", "shape"])
def test_what_is_no_pair_is_named(name, value):
    with pytest.raises(ValueError, match=rf"^{name}=.* must be an int or a pair of ints$"):
        build(**{name: value})


@pytest.mark.parametrize("shape", [(2, 4, 3, 5), (1, 3, 5), (5,), (2, 5, 1, 3, 5), (2, 3, 5, 5)])
def test_an_input_of_other_channels_or_dimensions_is_named(shape):
    with pytest.raises(ValueError, match=r"^x must be \(B, 5, H, W\) or .* in_channels=5; got \("):
        build()(image(*shape))


def test_device_and_dtype():
    layer = AugmentedConv(
        4, 8, 3, 8, 4, 2, shape=5, relative=True, device="meta", dtype=torch.float16
    )
    kinds = {(p.device.type, p.dtype) for p in layer.parameters()}
    assert kinds == {("meta", torch.float16)}


def test_reset_parameters_draws_all_anew_as_a_new_layer_does():
    torch.manual_seed(3)
    new = AugmentedConv(4, 8, 3, 8, 4, 2, shape=5, relative=True)
    on_meta = AugmentedConv(4, 8, 3, 8, 4, 2, shape=5, relative=True, device="meta")
    filled = on_meta.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in filled.parameters():
            parameter.fill_(torch.nan)
    torch.manual_seed(3)
    filled.reset_parameters()
    for (name, a), b in zip(new.named_parameters(), filled.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_no_weight_decay_names_the_tables():
    assert build().no_weight_decay() == {"key_rel_h", "key_rel_w"}
    assert build(relative=False).no_weight_decay() == set()


# ---- Pooled attention ---------------------------------------------------------------------------


def averaged(x, pool):
    """Average the existing pixels within pool - 1 of every pool-th pixel."""
    H, W = x.shape[2:]
    rows = []
    for y in range(0, H, pool):
        row = []
        for u in range(0, W, pool):
            top, left = max(0, y - pool + 1), max(0, u - pool + 1)
            row.append(x[:, :, top : y + pool, left : u + pool].mean(dim=(2, 3)))
        rows.append(torch.stack(row, dim=-1))
    return torch.stack(rows, dim=-2)


def spread(small, pool, size):
    """Upsample linearly: pixel y is at y / pool in the small map, at most at its last row."""
    for axis, length in ((2, size[0]), (3, size[1])):
        slices = []
        for y in range(length):
            low = min(y // pool, small.shape[axis] - 1)
            high = min(low + 1, small.shape[axis] - 1)
            part = y / pool - low if high > low else 0.0
            slices.append((1 - part) * small.select(axis, low) + part * small.select(axis, high))
        small = torch.stack(slices, dim=axis)
    return small


@pytest.mark.parametrize("backend", usable(torch.float64))
@pytest.mark.parametrize("size", [(5, 7), (6, 4), (1, 5)])
@pytest.mark.parametrize(("pool", "stride"), [(2, 1), (3, 1), (2, 2)])
def test_pooled_attention_equals_the_formula_with_gradients(backend, size, pool, stride):
    layer = build(pool=pool, stride=stride, shape=size, backend=backend)
    x = image(2, 5, *((2 * length - 1 for length in size) if stride == 2 else size))
    weights = dict(layer.named_parameters())
    attention = {n: w for n, w in weights.items() if not n.startswith("conv_out")}
    for name, length in (("key_rel_h", size[0]), ("key_rel_w", size[1])):
        small = -(-length // pool)
        offsets = [pool * o for o in range(1 - small, small)]
        attention[name] = torch.stack([weights[name][o + length - 1] for o in offsets])
    pooled = averaged(x[:, :, ::stride, ::stride], pool)
    small = reference.augmented_conv(pooled, attention, dk=6, dv=4, Nh=2)
    convolved = nn.functional.conv2d(x, layer.conv_out.weight, layer.conv_out.bias, stride, 1)
    expected = torch.cat((convolved, spread(small, pool, size)), dim=1)
    out = layer(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)
    direction = image(*out.shape)
    parameters = list(layer.parameters())
    own = torch.autograd.grad((out * direction).sum(), parameters)
    right = torch.autograd.grad((expected * direction).sum(), parameters)
    for a, b in zip(own, right, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_the_weights_of_a_pooled_layer_are_over_its_pooled_map():
    layer = build(pool=2, shape=(5, 7))
    maps = attention_maps(layer, image(2, 5, 5, 7))
    assert maps.shape == (2, 2, 12, 12)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 12).double())


def test_a_pooled_layer_has_the_parameters_of_one_that_is_not():
    pooled, plain = build(pool=2, shape=(6, 7)), build(shape=(6, 7))
    pooled.load_state_dict(plain.state_dict())
    wide = build(pool=2, shape=(12, 14))
    wide.load_state_dict(plain.state_dict())
    assert wide(image(1, 5, 12, 14)).shape == (1, 11, 12, 14)


# ---- Tracing and transforms ---------------------------------------------------------------------


# Warnings from torch.jit.trace, and from modules that torch imports for forward-mode derivatives.
DEPRECATED = pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")


def test_torch_fx_takes_it_as_a_leaf():
    network = nn.Sequential(nn.Conv2d(3, 5, 1).double(), build(), nn.ReLU())
    traced = torch.fx.symbolic_trace(network)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == ["0", "1", "2"]
    x = image(2, 3, 3, 5)
    assert torch.equal(traced(x), network(x))
    with pytest.raises(ValueError, match="trace a network that has it"):
        torch.fx.symbolic_trace(build())


@DEPRECATED
@pytest.mark.parametrize("change", [{}, {"stride": 2}, {"pool": 2}, {"absolute": "coord"}], ids=str)
def test_a_traced_layer_is_right_at_every_size(change):
    layer = build(**change)
    with pytest.warns(torch.jit.TracerWarning):
        traced = torch.jit.trace(layer, image(2, 5, 6, 5))
    for size in [(2, 5, 6, 5), (1, 5, 4, 4), (3, 5, 11, 9)]:
        # The tracer computes with sizes in single precision.
        torch.testing.assert_close(traced(image(*size)), layer(image(*size)), rtol=0, atol=1e-6)


def loss(layer, parameters, x):
    return functional_call(layer, parameters, (x,)).square().sum()


@pytest.mark.parametrize("change", [{}, {"stride": 2}, {"pool": 2}, {"absolute": "sine"}], ids=str)
def test_gradients_of_each_sample(change):
    layer = build(**change)
    parameters, x = dict(layer.named_parameters()), image(3, 5, 3, 5)
    each = vmap(lambda image: grad(lambda p: loss(layer, p, image[None]))(parameters))(x)
    for index in range(3):
        own = torch.autograd.grad(loss(layer, parameters, x[index : index + 1]), layer.parameters())
        for name, expected in zip(parameters, own, strict=True):
            torch.testing.assert_close(each[name][index], expected, rtol=0, atol=1e-9)


def test_vmap_over_parameters_and_images():
    layers = [build(), build(relative=True)]
    with torch.no_grad():
        for parameter in layers[1].parameters():
            parameter.mul_(0.5)
    together = {
        name: torch.stack([dict(layer.named_parameters())[name] for layer in layers])
        for name, _ in layers[0].named_parameters()
    }
    x = image(4, 5, 3, 5)
    got = vmap(lambda p: functional_call(layers[0], p, (x,)))(together)
    expected = torch.stack([layer(x) for layer in layers])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(vmap(layers[0])(x), layers[0](x), rtol=0, atol=1e-12)


@DEPRECATED
def test_forward_mode_equals_the_difference():
    layer, x, along = build(), image(2, 5, 3, 5), image(2, 5, 3, 5).flip(0)
    step = 1e-6
    _, derivative = jvp(layer, (x,), (along,))
    difference = (layer(x + step * along) - layer(x - step * along)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=1e-6, atol=1e-6)


def arguments(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = [*((2, 2, 3, 5, channels) for channels in (4, 4, 3)), (5, 4), (9, 4)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


@DEPRECATED
@pytest.mark.parametrize(
    "backend", [name for name in BACKENDS if name not in ("auto", "reference")]
)
def test_transforms_that_a_backend_has_not_are_refused_by_name(backend):
    given = arguments()
    words = f"^backend='{backend}' cannot be used inside transforms of torch.func or with forward"
    with pytest.raises(ValueError, match=words):
        vmap(lambda q: attention_2d(q, *given[1:], backend=backend))(given[0][None])
    with pytest.raises(ValueError, match=words):
        grad(lambda q: attention_2d(q, *given[1:], backend=backend).sum())(given[0])
    with pytest.raises(ValueError, match=words):
        jvp(lambda q: attention_2d(q, *given[1:], backend=backend), (given[0],), (given[0],))


@pytest.mark.parametrize("backend", [b for b in usable(torch.float32) if b != "auto"])
@pytest.mark.parametrize("way", ["grad", "backward"])
def test_second_derivatives_are_right_or_refused(backend, way):
    """They never silently lack attention's part, as they would with once_differentiable."""

    def second(backend, dtype):
        q, *others = arguments(dtype)
        q.requires_grad_()
        out = attention_2d(q, *others, backend=backend).square().sum()
        (first,) = torch.autograd.grad(out, q, create_graph=True)
        if way == "grad":
            return torch.autograd.grad(first.square().sum(), q)[0]
        first.square().sum().backward()
        return q.grad

    if backend == "reference":
        exact = second(backend, torch.float64)
        got = second(backend, torch.float32).double()
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-4)
        return
    words = f"backend='{backend}' cannot be differentiated twice|flash_attention.*not implemented"
    with pytest.raises((RuntimeError, NotImplementedError), match=words):
        second(backend, torch.float32)


# ---- Counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_flops_do_not_depend_on_the_backend(backend):
    """Two FLOPs per multiply-add of the formula, and twice as many in the backward pass."""
    B, H, W, dkh, dvh, Nh = 2, 3, 5, 3, 2, 2
    layer = build(backend=backend).float()
    x = image(B, 5, H, W).float()
    with FlopCounterMode(display=False) as counter:
        layer(x).sum().backward()
    positions = H * W
    attention = positions**2 * (dkh + dvh) + positions * (H + W) * dkh
    convolutions = positions * (5 * 7 * 9 + 5 * 16 + 4 * 4)
    forward = 2 * B * (Nh * attention + convolutions)
    backward = 2 * forward - 2 * B * positions * 5 * (7 * 9 + 16)  # none for the input
    assert counter.get_total_flops() == forward + backward
