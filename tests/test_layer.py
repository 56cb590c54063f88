"""`AugmentedConv`: values, gradients, conventions, and what it rejects."""

import copy
import math

import pytest
import torch
from torch import nn

from aaconv import AugmentedConv

import reference
from helpers import slow, usable


def build(**change):
    torch.manual_seed(0)
    arguments = {
        "in_channels": 5,
        "out_channels": 11,
        "kernel_size": 3,
        "dk": 6,
        "dv": 4,
        "Nh": 2,
        "shape": (3, 5),
        "relative": True,
    }
    layer = AugmentedConv(**(arguments | change)).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def image(*shape):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


EQUAL = [
    {},
    {"stride": 2},
    {"relative": False},
    {"relative": False, "shape": 0, "stride": 2},
    {"dv": 11, "Nh": 1},
    {"dv": 0},
    {"dk": 0, "dv": 0},
    {"Nh": 1},
    {"dk": 2, "dv": 2},
    {"qk_norm": True},
    {"qk_norm": True, "qkv_bias": False, "stride": 2},
    {"dilation": 2, "padding": 2},
    {"kernel_size": 5},
    {"in_channels": 6, "out_channels": 10, "groups": 3},
]


@pytest.mark.parametrize("backend", usable(torch.float64))
@pytest.mark.parametrize("change", EQUAL, ids=str)
def test_equals_the_formula_with_gradients(change, backend):
    layer = build(**change, backend=backend)
    stride, kernel = change.get("stride", 1), change.get("kernel_size", 3)
    dilation = change.get("dilation", 1)
    x = image(2, change.get("in_channels", 5), *((5, 9) if stride == 2 else (3, 5)))
    x.requires_grad_()
    names, parameters = zip(*layer.named_parameters(), strict=True)

    out = layer(x)
    expected = reference.augmented_conv(
        x,
        dict(zip(names, parameters, strict=True)),
        dk=layer.dk,
        dv=layer.dv,
        Nh=layer.Nh,
        stride=stride,
        padding=dilation * (kernel - 1) // 2,
        dilation=dilation,
        groups=change.get("groups", 1),
        qk_norm=layer.qk_norm,
    )
    assert out.shape == (2, change.get("out_channels", 11), 3, 5)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-10)

    direction = image(*out.shape)
    got = torch.autograd.grad(out, (x, *parameters), direction)
    wanted = torch.autograd.grad(expected, (x, *parameters), direction)
    for name, a, b in zip(("x", *names), got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("stride", "size"), [(2, 16), (1, 32)])
def test_the_examples_of_the_description(stride, size):
    layer = AugmentedConv(
        in_channels=3,
        out_channels=20,
        kernel_size=3,
        dk=40,
        dv=4,
        Nh=4,
        relative=True,
        padding=1,
        stride=stride,
        shape=size,
    )
    assert layer(torch.randn(16, 3, 32, 32)).shape == (16, 20, size, size)
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes["key_rel_w"] == shapes["key_rel_h"] == (2 * size - 1, 10)
    assert shapes["qkv_conv.weight"] == (84, 3, 1, 1)
    assert shapes["attn_out.weight"] == (4, 4, 1, 1)
    assert shapes["conv_out.weight"] == (16, 3, 3, 3)


# Variances of weights (out, in, 1, 1) with fan_in = in and fan_out = out; a uniform distribution on
# (-a, a) has the variance a^2 / 3.
@pytest.mark.parametrize(
    ("init", "variance", "uniform"),
    [
        ("torch", lambda fan_in, fan_out: 1 / (3 * fan_in), True),
        ("glorot", lambda fan_in, fan_out: 2 / (fan_in + fan_out), True),
        ("kaiming", lambda fan_in, fan_out: 2 / fan_in, False),
    ],
)
def test_attention_starts_as_init_says(init, variance, uniform):
    torch.manual_seed(0)
    layer = AugmentedConv(150, 310, 3, dk=120, dv=300, Nh=4, init=init)
    first = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_parameters()
    for conv, fan_in, fan_out in ((layer.qkv_conv, 150, 540), (layer.attn_out, 300, 300)):
        weight, expected = conv.weight.detach(), variance(fan_in, fan_out)
        assert weight.shape[:2] == (fan_out, fan_in)
        # The mean of n squares has a relative error of at most sqrt(2 / n): 0.005 for 90,000.
        assert weight.square().mean().item() == pytest.approx(expected, rel=0.03)
        most = math.sqrt(3 * expected)
        assert (weight.abs().max().item() <= most * (1 + 1e-6)) is uniform
        assert (conv.bias.abs().max().item() > 0) is (init == "torch")
    assert layer.conv_out.weight.std().item() == pytest.approx((1 / (3 * 9 * 150)) ** 0.5, rel=0.03)
    for name, parameter in layer.named_parameters():
        if name.endswith("weight"):
            assert not torch.equal(parameter, first[name]), name


def test_normalized_attention_does_not_depend_on_the_size_of_queries_and_keys():
    layers = [build(qk_norm=qk_norm, relative=False) for qk_norm in (True, False)]
    outs = []
    for layer in layers:
        before = layer(image(2, 5, 3, 5))
        with torch.no_grad():
            layer.qkv_conv.weight[: 2 * layer.dk] *= 30
            layer.qkv_conv.bias[: 2 * layer.dk] *= 30
        outs.append((layer(image(2, 5, 3, 5)) - before).abs().max().item())
    assert outs[0] < 1e-5 < 0.1 < outs[1]


@pytest.mark.parametrize(
    ("change", "biased"),
    [
        ({}, ["conv_out", "qkv_conv", "attn_out"]),
        ({"bias": False}, []),
        ({"qkv_bias": False}, ["conv_out", "attn_out"]),
        ({"bias": False, "qkv_bias": True}, ["qkv_conv"]),
    ],
)
def test_each_convolution_has_its_bias_or_none(change, biased):
    names = [name for name, _ in build(**change).named_parameters() if name.endswith(".bias")]
    assert sorted(names) == sorted(f"{convolution}.bias" for convolution in biased)


def test_tables_start_with_mean_0_and_standard_deviation_of_the_formula():
    torch.manual_seed(0)
    layer = AugmentedConv(3, 8, 3, dk=32, dv=4, Nh=2, shape=(601, 401), relative=True)
    for table in (layer.key_rel_h, layer.key_rel_w):
        assert table.std().item() == pytest.approx(16**-0.5, rel=0.03)
        assert abs(table.mean().item()) < 0.01
    assert layer.key_rel_h.shape == (1201, 16)
    assert layer.key_rel_w.shape == (801, 16)


@pytest.mark.parametrize(
    ("dtype", "backend"), [(d, b) for d in (torch.bfloat16, torch.float16) for b in usable(d)]
)
def test_autocast(dtype, backend):
    layer = build(backend=backend).float()
    x = image(2, 5, 3, 5).float().requires_grad_()
    with torch.autocast("cpu", dtype):
        out = layer(x)
    assert out.dtype == dtype
    layer.backend = "reference"
    exact = layer.double()(x.detach().double())
    # Eight roundings: image, both weights, queries and keys, values, weights, mixture, output.
    assert (out.double() - exact).abs().max() < 8 * torch.finfo(dtype).eps / 2 * exact.abs().max()
    out.float().sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("backend", usable(torch.float64))
@pytest.mark.parametrize("pool", [1, 2])
def test_channels_last_in_channels_last_out(backend, pool):
    layer = build(backend=backend, pool=pool)
    x = image(2, 5, 3, 5)
    out = layer(x.to(memory_format=torch.channels_last))
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, layer(x))
    assert layer(x).is_contiguous()


@pytest.mark.parametrize("backend", usable(torch.float64))
def test_strided_and_channels_last_trains_on_few_channels(backend):
    """oneDNN's strided 1x1 convolution corrupts memory here: a crash or wrong gradients."""
    layer = build(in_channels=4, stride=2, shape=16, dk=32, dv=4, Nh=4, backend=backend).float()
    layer = layer.to(memory_format=torch.channels_last)
    x = image(32, 4, 32, 32).float().to(memory_format=torch.channels_last).requires_grad_()
    layer(x).square().mean().backward()
    got = [x.grad, *(p.grad for p in layer.parameters())]
    exact = layer.double().to(memory_format=torch.contiguous_format)
    y = x.detach().double().contiguous().requires_grad_()
    exact.zero_grad()
    exact(y).square().mean().backward()
    wanted = [y.grad, *(p.grad for p in exact.parameters())]
    # Rounding of sums over the positions of all images; see helpers.rounding_errors.
    error = 6 * (32 * 16 * 16) ** 0.5 * 2**-24
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=error * b.abs().max().item())


def test_deepcopy_keeps_nothing_of_the_last_batch():
    layer = build()
    out = layer(image(2, 5, 3, 5))
    assert out.requires_grad
    twin = copy.deepcopy(layer)
    assert set(twin.state_dict()) == {name for name, _ in layer.named_parameters()}
    tensors = [v for m in layer.modules() for v in vars(m).values() if torch.is_tensor(v)]
    assert tensors == []
    torch.testing.assert_close(twin(image(2, 5, 3, 5)), out)


@pytest.mark.parametrize("backend", ["auto", slow("reference"), slow("sdpa")])
def test_compile(backend):
    layer = build(backend=backend)
    x = image(2, 5, 3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_auto_is_sdpa_in_a_compiled_layer():
    """A compiler would unroll the loop over the tiles."""
    graphs = []

    def capture(graph, _):
        graphs.append(graph.code)
        return graph.forward

    torch.compile(build(shape=(5, 13)), fullgraph=True, backend=capture)(image(2, 5, 5, 13))
    assert "scaled_dot_product_attention" in graphs[0]


@pytest.mark.parametrize(("stride", "size"), [(1, (3, 5)), (2, (5, 9))])
def test_qkv_kernel_size_reads_the_neighborhood(stride, size):
    layer = build(qkv_kernel_size=3, out_channels=4, stride=stride)
    assert layer.qkv_conv.weight.shape == (16, 5, 3, 3)
    x = image(2, 5, *size)
    qkv = layer.qkv_conv
    qkv = nn.functional.conv2d(x, qkv.weight, qkv.bias, stride=stride, padding=1)
    weights = dict(layer.named_parameters())
    weights["qkv_conv.weight"] = torch.eye(16).double()[:, :, None, None]
    weights["qkv_conv.bias"] = torch.zeros(16).double()
    expected = reference.augmented_conv(qkv, weights, dk=6, dv=4, Nh=2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("kernel", "dilation", "padding"),
    [(3, 1, 1), (3, 2, 2), ((3, 5), 1, (1, 2)), (3, (1, 3), (1, 3)), ((1, 5), (3, 2), (0, 4))],
)
def test_padding_keeps_the_size_by_default(kernel, dilation, padding):
    x = image(2, 5, 3, 5)
    layer = build(kernel_size=kernel, dilation=dilation)
    expected = build(kernel_size=kernel, dilation=dilation, padding=padding)(x)
    assert expected.shape == (2, 11, 3, 5)
    torch.testing.assert_close(layer(x), expected)


def test_defaults():
    layer = AugmentedConv(5, 11, 3, 6, 4, 2)
    assert layer(torch.randn(2, 5, 3, 7)).shape == (2, 11, 3, 7)
    assert layer.qkv_conv.weight.shape == (16, 5, 1, 1)
    assert (layer.key_rel_h, layer.key_rel_w, layer.backend) == (None, None, "auto")


def test_a_pair_of_kernel_and_stride():
    layer = build(kernel_size=(1, 3), stride=(1, 2))
    assert layer(image(2, 5, 3, 10)).shape == (2, 11, 3, 5)


def test_even_kernel_where_the_sizes_agree():
    layer = build(kernel_size=4, stride=2, padding=1)
    assert layer(image(2, 5, 6, 10)).shape == (2, 11, 3, 5)
    with pytest.raises(ValueError, match=r"differ in size: \(2, 4\) and \(3, 5\)"):
        layer(image(2, 5, 5, 9))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dk": 7}, "dk=7 must be divisible by Nh=2"),
        ({"dv": 3}, "dv=3 must be divisible by Nh=2"),
        ({"dv": 12}, "dv=12 .*out_channels=11"),
        ({"dv": -2}, "dv=-2"),
        ({"dk": 0}, "dk=0 must be at least 1"),
        ({"Nh": 0}, "Nh=0 must be at least 1"),
        ({"Nh": -2}, "Nh=-2"),
        ({"in_channels": 0}, "in_channels=0"),
        ({"in_channels": 2**62}, f"in_channels={2**62} must be at most {2**60}"),
        ({"dk": 10**30}, f"dk={10**30} must be at most {2**60}"),
        ({"shape": 10**30}, f"shape={10**30} must be at most 1048576"),
        ({"stride": (1, 10**30)}, f"stride={10**30} must be at most 1048576"),
        ({"pool": 2**62}, f"pool={2**62} must be at most 1048576"),
        ({"dtype": torch.complex64}, "dtype=torch.complex64 must be a floating-point type"),
        ({"dtype": torch.int64}, "dtype=torch.int64 must be a floating-point type"),
        ({"shape": 0}, "relative=True needs shape"),
        ({"shape": (3, 0)}, r"shape=\(3, 0\)"),
        ({"shape": -1}, "shape=-1"),
        ({"padding": 0}, "padding=0 with kernel_size=3.*use padding=1"),
        ({"padding": 2}, "padding=2 with kernel_size=3"),
        ({"padding": -1}, "padding=-1"),
        ({"padding": "valid"}, "padding='valid' must be an int, a pair of ints, or 'same'"),
        ({"padding": "same", "stride": 2}, r"padding='same' needs stride=1, not \(2, 2\)"),
        ({"padding": 1.0}, "padding=1.0 must be an int or a pair"),
        ({"padding": "same", "kernel_size": 0}, "kernel_size=0, .* must be at least 1"),
        ({"padding": "same", "dilation": 0}, "dilation=0 must be at least 1"),
        ({"pool": 0}, "pool=0 must be at least 1"),
        ({"kernel_size": 2}, "kernel_size=2.*odd kernel_size"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size=\(3, 3, 3\) must be an int or a pair"),
        ({"stride": 0}, "stride=0"),
        ({"groups": 2}, "groups=2 must divide in_channels=5"),
        ({"qkv_kernel_size": 2}, "qkv_kernel_size=2 must be odd"),
        ({"backend": "quick"}, "backend='quick' is unknown; choose one of auto, reference, sdpa"),
        ({"init": "he"}, "init='he' is unknown; choose one of torch, glorot, kaiming"),
        ({"absolute": "cosine"}, "absolute='cosine' is unknown; choose one of none, sine, coord"),
        ({"absolute": "sine", "in_channels": 3}, "absolute=sine needs in_channels"),
    ],
)
def test_wrong_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        build(**change)


def test_a_smaller_map_keeps_its_offsets():
    """On a 3x5 map, only the middle 5 and 9 rows of tables made for 7x11 are used."""
    large, small = build(shape=(7, 11)), build()
    weights = dict(large.named_parameters())
    weights |= {"key_rel_h": large.key_rel_h[4:9], "key_rel_w": large.key_rel_w[6:15]}
    x = image(2, 5, 3, 5)
    expected = reference.augmented_conv(x, weights, dk=6, dv=4, Nh=2)
    torch.testing.assert_close(large(x), expected, rtol=0, atol=1e-10)
    small.load_state_dict(large.state_dict())
    torch.testing.assert_close(small(x), expected, rtol=0, atol=1e-10)
    assert large.key_rel_h.shape == (13, 3)


def test_a_larger_map_stretches_the_offsets():
    """Offset o in a map of length L is interpolated at o (l-1) / (L-1) in a table for length l."""
    layer = build()

    def stretched(table, length):
        rows, middle = [], (len(table) - 1) / 2
        for offset in range(1 - length, length):
            position = middle + offset * middle / (length - 1)
            low = min(int(position), len(table) - 2)
            part = position - low
            rows.append((1 - part) * table[low] + part * table[low + 1])
        return torch.stack(rows)

    weights = dict(layer.named_parameters())
    weights["key_rel_h"] = stretched(layer.key_rel_h, 4)
    weights["key_rel_w"] = stretched(layer.key_rel_w, 7)
    x = image(2, 5, 4, 7)
    expected = reference.augmented_conv(x, weights, dk=6, dv=4, Nh=2)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-10)
    layer(x).square().sum().backward()
    assert layer.key_rel_h.grad.abs().min() > 0

    larger = build(shape=(4, 7))
    larger.load_state_dict(layer.state_dict())
    torch.testing.assert_close(larger(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (13, 1), (2, 11), (11, 2)])
def test_other_sizes_in_one_direction_and_down_to_a_pixel(size):
    layer = build()
    assert layer(image(2, 5, *size)).shape == (2, 11, *size)
    twin = build(shape=size)
    twin.load_state_dict(layer.state_dict())
    torch.testing.assert_close(twin(image(2, 5, *size)), layer(image(2, 5, *size)))
    # A table with one row has one value for all offsets.
    back = build()
    back.load_state_dict(build(shape=1).state_dict())
    assert back.key_rel_h.std(dim=0).max() == 0


def test_other_tables_are_loaded_by_copies_and_nested_layers_too():
    large = nn.Sequential(build(shape=(7, 11)))
    copied = copy.deepcopy(nn.Sequential(build()))
    before = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    given = large.state_dict()
    copied.load_state_dict(given)
    torch.testing.assert_close(copied[0].key_rel_h, large[0].key_rel_h[4:9])
    assert all(torch.equal(given[name], before[name]) for name in before)


def test_tables_of_other_queries_are_not_loaded():
    with pytest.raises(RuntimeError, match="size mismatch for key_rel_w"):
        build().load_state_dict(build(dk=4).state_dict())
    state = build().state_dict()
    state["key_rel_h"] = torch.zeros(4, 3)  # fits no map: 2H-1 is odd
    with pytest.raises(RuntimeError, match="size mismatch for key_rel_h"):
        build().load_state_dict(state)
    del state["key_rel_h"]
    with pytest.raises(RuntimeError, match="key_rel_h"):
        build().load_state_dict(state)


def encode_by_hand(x, absolute):
    """Add each pixel's position encoding to the input, one channel after the other."""
    B, C, H, W = x.shape
    planes = []
    if absolute == "sine":
        n = C // 4
        wavelengths = [10000 ** (i / max(n - 1, 1)) for i in range(n)]
        for axis in range(2):
            for function in (math.sin, math.cos):
                for wavelength in wavelengths:
                    plane = [
                        [function((y, c)[axis] / wavelength) for c in range(W)] for y in range(H)
                    ]
                    planes.append(plane)
        planes += [[[0.0] * W] * H] * (C - len(planes))
        return x + torch.tensor(planes, dtype=x.dtype)
    for what in ("column", "row", "distance"):
        plane = []
        for y in range(H):
            for c in range(W):
                row = 0 if H == 1 else -1 + 2 * y / (H - 1)
                column = 0 if W == 1 else -1 + 2 * c / (W - 1)
                distance = (row * row + column * column) ** 0.5
                plane.append({"column": column, "row": row, "distance": distance}[what])
        planes.append(plane)
    extra = torch.tensor(planes, dtype=x.dtype).reshape(3, H, W)
    return torch.cat((x, extra.expand(B, 3, H, W)), dim=1)


@pytest.mark.parametrize("absolute", ["sine", "coord"])
@pytest.mark.parametrize(("stride", "size"), [(1, (7, 5)), (2, (5, 9)), (1, (1, 3))])
def test_absolute_positions_are_in_the_input_of_the_attention_only(absolute, stride, size):
    channels = 11
    layer = build(in_channels=channels, relative=False, absolute=absolute, stride=stride)
    extra = 3 if absolute == "coord" else 0
    assert layer.qkv_conv.weight.shape == (16, channels + extra, 1, 1)
    x = image(2, channels, *size)
    attention = dict(layer.named_parameters())
    convolution = {n: attention.pop(n) for n in ("conv_out.weight", "conv_out.bias")}
    encoded = encode_by_hand(x[:, :, ::stride, ::stride], absolute)
    expected = torch.cat(
        (
            nn.functional.conv2d(x, *convolution.values(), stride=stride, padding=1),
            reference.augmented_conv(encoded, attention, dk=6, dv=4, Nh=2),
        ),
        dim=1,
    )
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    plain = build(in_channels=channels, relative=False, stride=stride)
    if extra == 0:
        plain.load_state_dict(layer.state_dict())
        assert (plain(x) - layer(x)).abs().max() > 1e-3


@pytest.mark.parametrize("absolute", ["sine", "coord"])
def test_absolute_positions_keep_dtype_and_layout(absolute):
    layer = build(relative=False, absolute=absolute).float()
    x = image(2, 5, 3, 5).float().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
