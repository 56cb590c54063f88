"""The networks: shapes and counts that can be checked by hand, and settings that are rejected."""

import pytest
import torch
from torch import nn

from aaconv import AugmentedConv
from models import (
    AA,
    ATTENTIONS,
    GE,
    SE,
    GlobalMean,
    NoAttention,
    Pointwise,
    Removed,
    ResNet,
    augmented_layers,
    count_flops,
    count_parameters,
    layer_facts,
    layer_table,
    receptive_field,
)
from models.alternet import AlterBlock
from models.attention import Place, SideConv
from models.blocks import Shortcut
from training.compose import compose_config
from training.settings import build_model

import reference
from helpers import CONFIGS

CONTROLS = (Removed, Pointwise, GlobalMean)


def on_meta(*arguments, **options):
    """Build a network on the meta device, which is enough for counting."""
    with torch.device("meta"):
        return ResNet(*arguments, **options)


def wide(shortcut, attention):
    return on_meta("preact", [4, 4, 4], [160, 320, 640], 16, shortcut, 100, attention=attention)


def tiny(attention=NoAttention(), **change):  # noqa: B008
    torch.manual_seed(0)
    arguments = {
        "block": "basic",
        "depths": [1, 2],
        "widths": [8, 16],
        "stem": 8,
        "shortcut": "pad",
        "num_classes": 7,
        "image_size": (11, 13),
        "attention": attention,
    }
    return ResNet(**(arguments | change))


def aa(**change):
    settings = {"dk": 8, "dv": 4, "Nh": 2, "min_dkh": 1, "position": "relative", "stages": [1, 2]}
    return AA(**(settings | change))


PAPER = aa(dk=0.2, dv=0.1, Nh=8, min_dkh=20, stages=[1, 2, 3])


# Wide-ResNet-28-10, 100 classes. 3x3 convolutions: 3*16*9 + for widths 160, 320, 640 with
# inputs 16, 160, 320: 9*(16*160 + 7*160^2) + 9*(160*320 + 7*320^2) + 9*(320*640 + 7*640^2)
# = 432 + 1,635,840 + 6,912,000 + 27,648,000. Normalizations, 2 per channel: blocks' first
# (16 + 3*160) + (160 + 3*320) + (320 + 3*640), blocks' second 4*(160 + 320 + 640), last 640:
# 2 * (3,856 + 4,480 + 640) = 17,952. Classifier 640*100 + 100. Together 36,278,324.
# Projection shortcuts: 16*160 + 160*320 + 320*640 = 258,560.
# SE: 2 * C * C/16 in 4 blocks per width: 4 * (3,200 + 12,800 + 51,200) = 268,800.
# AA: dk = 160 everywhere, dv = 16, 32, 64 and maps of 32, 16, 8. A block replaces 9 * Cin * dv
# by Cin * (2*160 + dv) + dv^2 and two tables of (2*map - 1) * 20:
#   stage 1:    5,848 + 3 *   33,496;  stage 2: 12,504 + 3 * 22,744
#   stage 3:  -56,744 - 3 *  118,184;  together -224,224.
@pytest.mark.parametrize(
    ("shortcut", "attention", "expected"),
    [
        ("projection", NoAttention(), 36_536_884),
        ("pad", NoAttention(), 36_278_324),
        ("pad", GE(), 36_278_324),
        ("pad", SE(16), 36_278_324 + 268_800),
        ("pad", PAPER, 36_278_324 - 224_224),
    ],
)
def test_parameters_of_wide_resnet_28_10(shortcut, attention, expected):
    assert count_parameters(wide(shortcut, attention)) == expected


def test_parameters_of_wide_resnet_16_8():
    network = on_meta("preact", [2, 2, 2], [128, 256, 512], 16, "projection", 100)
    assert round(count_parameters(network) / 1e6, 1) == 11.0  # Zagoruyko and Komodakis, table 4


# The last block of a stage of C channels replaces two 3x3 convolutions (18 C^2) by a 1x1 one (C^2),
# queries, keys and values (3 C^2), the output projection (C^2) and two (2 map - 1) * C / 8 tables.
def test_parameters_of_alternet_18(settings):
    plain, alternet = (
        build_model(
            settings("model=alternet18", f"attention={name}", base=[]),
            num_classes=100,
            image_size=(32, 32),
        )
        for name in ("none", "aa")
    )
    of_stages = [(64, 64, 32), (64, 128, 16), (128, 256, 8), (256, 512, 4)]
    expected = 27 * 64 + 2 * 512 + 512 * 100 + 100
    for before, width, _ in of_stages:
        expected += 9 * (before * width + 3 * width**2) + 2 * (before + 3 * width)
        expected += before * width if before != width else 0
    assert count_parameters(plain) == expected
    for _, width, size in of_stages[1:]:
        expected += -18 * width**2 + 5 * width**2 + 2 * (2 * size - 1) * width // 8
    assert count_parameters(alternet) == expected
    assert list(augmented_layers(alternet)) == [f"stages.{i}.1.attention" for i in (1, 2, 3)]
    assert all(layer.conv_out is None for layer in augmented_layers(alternet).values())


@pytest.mark.parametrize(("in_channels", "stride"), [(8, 1), (4, 2)])
def test_an_alternet_block_by_its_formula(in_channels, stride):
    torch.manual_seed(0)
    place = Place(1, 1, 1, stride, (3, 4))
    block = AlterBlock(in_channels, 8, place, "projection", aa(dk=1.0, dv=1.0)).double().eval()
    for norm in (block.bn1, block.bn2):
        nn.init.uniform_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    x = torch.randn(2, in_channels, 3 * stride, 4 * stride).double()
    y = nn.functional.gelu(block.bn1(x))
    skip = x if stride == 1 else block.shortcut.conv(y[:, :, ::stride, ::stride])
    inner = block.bn2(nn.functional.conv2d(y, block.conv1.weight))
    weights = {"attn_out.bias": torch.zeros(8), **block.attention.state_dict()}
    attended = reference.augmented_conv(inner, weights, dk=8, dv=8, Nh=2, stride=stride)
    torch.testing.assert_close(block(x), skip + attended)


def test_flops_of_wide_resnet_28_10():
    # Multiply-adds of 3x3 convolutions: weights times positions of the map.
    convolutions = (
        432 * 32**2
        + 9 * (16 * 160 + 7 * 160**2) * 32**2
        + 9 * (160 * 320 + 7 * 320**2) * 16**2
        + 9 * (320 * 640 + 7 * 640**2) * 8**2
    )
    plain = 2 * (convolutions + 640 * 100)
    assert count_flops(wide("pad", NoAttention()), (32, 32)) == plain
    assert round(plain / 1e9, 2) == 10.43
    extra = 0
    for size, width, before, dv in ((32, 160, 16, 16), (16, 320, 160, 32), (8, 640, 320, 64)):
        inputs, positions = before + 3 * width, size * size
        extra += inputs * (320 + dv - 9 * dv) * positions + 4 * dv * dv * positions
        # q.k and weights.v over all pairs; q times the row table and the column table
        extra += 4 * (positions**2 * (160 + dv) + 2 * positions * size * 160)
    assert count_flops(wide("pad", PAPER), (32, 32)) == plain + 2 * extra


PAPER_RESNET_50 = aa(dk=0.2, dv=0.1, Nh=8, min_dkh=20, stages=[2, 3, 4])


# The counts of torchvision, and of `augment_` with its default ratios (docs/layer.md). The paper
# prints 25.6 M and 8.2 GFLOPs, and 25.8 M and 8.3 GFLOPs.
@pytest.mark.parametrize(
    ("attention", "parameters", "gflops"),
    [(NoAttention(), 25_557_032, 8.18), (PAPER_RESNET_50, 25_781_872, 8.36)],
)
def test_resnet_50_for_images_of_224x224(attention, parameters, gflops):
    arguments = compose_config(["model=resnet50_224", "attention=none"]).model
    names = ("block", "depths", "widths", "stem", "shortcut", "strided_stem")
    network = on_meta(
        **{name: arguments[name] for name in names},
        num_classes=1000,
        image_size=(224, 224),
        attention=attention,
    )
    assert count_parameters(network) == parameters
    assert round(count_flops(network, (224, 224)) / 1e9, 2) == gflops
    pools = [layer.pool for layer in augmented_layers(network).values()]
    assert sorted(set(pools)) == ([] if attention.name == "none" else [1, 2])
    assert pools.count(2) in (0, 4)  # the maps of 28x28


def test_a_strided_stem_fits_maps_of_any_size():
    network = ResNet("basic", [1, 1], [4, 8], 4, "pad", 3, (37, 50), strided_stem=True)
    seen = []
    network.stages.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    assert network(torch.randn(2, 3, 37, 50)).shape == (2, 3)
    assert seen == [(2, 4, 10, 13)]


# Millions of parameters from the paper's table of AA-ResNet-50 with kappa = upsilon (ImageNet, 1000
# classes, augmented in the last three stages, at least 20 key channels per head). Our stem is 3x3
# instead of 7x7: 3 * 64 * (49 - 9) fewer.
@pytest.mark.parametrize(
    ("ratio", "millions"), [(0.25, 24.3), (0.5, 22.3), (0.75, 20.7), (1.0, 19.4)]
)
def test_parameters_of_resnet_50_over_the_ratio(ratio, millions):
    attention = aa(dk=ratio, dv=ratio, Nh=8, min_dkh=20, stages=[2, 3, 4])
    widths = [64, 128, 256, 512]
    model = on_meta("bottleneck", [3, 4, 6, 3], widths, 64, "projection", 1000, (56, 56), attention)
    assert round((count_parameters(model) + 3 * 64 * 40) / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("position", "relative", "absolute"),
    [
        ("relative", True, "none"),
        ("none", False, "none"),
        ("sine", False, "sine"),
        ("coord", False, "coord"),
    ],
)
def test_position_reaches_every_augmented_layer(position, relative, absolute):
    layers = augmented_layers(tiny(aa(position=position))).values()
    assert len(layers) == 3
    assert {(m.relative, m.absolute) for m in layers} == {(relative, absolute)}


# He et al. print 0.27M, 0.46M, 0.66M, 0.85M and 1.7M for 10 classes. Calculated by hand:
# 432 + 9 * (16^2 * 2n + 16*32 + 32^2 * (2n-1) + 32*64 + 64^2 * (2n-1)) weights,
# 2 * (16 + 2n * (16 + 32 + 64)) for the normalizations, 650 for the classifier.
@pytest.mark.parametrize("n", [1, 2, 3, 5, 7, 9, 18])
def test_parameters_of_cifar_resnets(n):
    expected = 432 + 9 * (256 * 2 * n + 512 + 1024 * (2 * n - 1) + 2048 + 4096 * (2 * n - 1))
    expected += 2 * (16 + 2 * n * 112) + 650
    assert count_parameters(ResNet("basic", [n] * 3, [16, 32, 64], 16, "subsample", 10)) == expected


def seen_by_one_position(network, features, size):
    """Height and width of the window that the gradient of one position of ``features`` reaches.

    With positive weights and a positive image, nothing cancels and every ReLU is active.
    """
    network.double().eval()
    for weight in network.parameters():
        nn.init.constant_(weight, 0.1)
    image = torch.ones(1, 3, *size, dtype=torch.float64, requires_grad=True)
    kept = []
    features.register_forward_hook(lambda module, given, made: kept.append(made))
    network(image)
    middle = [length // 2 for length in kept[0].shape[2:]]
    (gradient,) = torch.autograd.grad(kept[0][0, 0, middle[0], middle[1]], image)
    rows, columns = gradient[0, 0].nonzero().unbind(1)
    return int(rows.max() - rows.min()) + 1, int(columns.max() - columns.min()) + 1


@pytest.mark.parametrize(
    ("change", "side"),
    [
        ({"depths": [1] * 3}, 25),
        ({"depths": [2] * 3, "shortcut": "projection"}, 53),
        ({"depths": [3] * 3, "shortcut": "subsample"}, 81),
        ({"depths": [1] * 3, "block": "preact"}, 25),
        ({"depths": [1, 2, 1], "block": "bottleneck", "shortcut": "projection"}, 15),
    ],
    ids=str,
)
def test_the_receptive_field_is_what_the_gradient_of_one_position_reaches(change, side):
    network = tiny(widths=[2, 2, 2], stem=2, **change)
    assert receptive_field(network) == side
    assert seen_by_one_position(network, network.stages, (193, 211)) == (side, side)


def test_the_receptive_field_of_strides_and_dilations():
    layers = [nn.Conv2d(3, 2, 5, stride=3, dilation=2), nn.Conv2d(2, 2, 1, stride=2)]
    network = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(2, 1, 3))
    assert receptive_field(network) == 21
    assert seen_by_one_position(network, network, (61, 67)) == (21, 21)


def test_attention_without_a_convolution_has_its_stride_alone():
    layers = [nn.Conv2d(3, 8, 3), AugmentedConv(8, 8, 3, 4, 8, 2, stride=2), nn.Conv2d(8, 1, 3)]
    assert receptive_field(nn.Sequential(*layers)) == 3 + 2 * 2


@pytest.mark.parametrize("attention", [SE(4), GE(), aa(dk=4, stages=[1, 2])], ids=str)
def test_attention_adds_nothing_to_the_receptive_field_of_the_convolutions(attention):
    assert receptive_field(tiny(attention)) == receptive_field(tiny()) == 21


@pytest.mark.parametrize("block", ["basic", "bottleneck", "preact"])
@pytest.mark.parametrize("shortcut", ["projection", "pad", "subsample"])
@pytest.mark.parametrize(
    "attention",
    [
        NoAttention(),
        SE(4),
        GE(),
        aa(dk=4),
        aa(dk=4, qk_norm=True, bias=True),
        *(kind(dv=4, Nh=2, stages=[1, 2]) for kind in CONTROLS),
    ],
    ids=["none", "se", "ge", "aa", "aa normalized", *(kind.name for kind in CONTROLS)],
)
def test_equals_the_network_written_out_and_learns(block, shortcut, attention):
    model = tiny(attention, block=block, shortcut=shortcut, image_size=(3, 5)).double().eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.dim() == 1 and tensor.is_floating_point():  # normalizations and the head's bias
            tensor.normal_()
    x = torch.randn(2, 3, 3, 5, dtype=torch.float64)
    kind = attention.name
    if isinstance(attention, AA):
        kind = {"dk": 4, "dv": 4, "Nh": 2, "qk_norm": attention.qk_norm}
    expected = reference.resnet(
        x, model.state_dict(), block=block, shortcut=shortcut, attention=kind
    )
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)
    model.train()(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_attention_is_in_the_first_convolution_of_the_named_stages():
    assert list(augmented_layers(tiny(aa(stages=[2])))) == ["stages.1.0.conv1", "stages.1.1.conv1"]
    assert [m.shape for m in augmented_layers(tiny(aa())).values()] == [(11, 13), (6, 7), (6, 7)]
    assert list(augmented_layers(tiny(aa(stages=[1]), block="bottleneck"))) == ["stages.0.0.conv2"]
    assert augmented_layers(tiny()) == {}


def test_networks_differ_in_the_augmented_convolutions_alone():
    plain, augmented = tiny().state_dict(), tiny(aa(stages=[2])).state_dict()
    same = {k for k in plain if k in augmented and plain[k].shape == augmented[k].shape}
    assert set(plain) - same == {"stages.1.0.conv1.weight", "stages.1.1.conv1.weight"}


@pytest.mark.parametrize(
    ("change", "width", "expected"),
    [
        ({"dk": 0.2, "dv": 0.1, "Nh": 8, "min_dkh": 20}, 160, (160, 16)),
        ({"dk": 0.2, "dv": 0.1, "Nh": 8, "min_dkh": 1}, 640, (128, 64)),
        ({"dk": 0.2, "dv": 0.1, "Nh": 4, "min_dkh": 1}, 16, (4, 4)),
        ({"dk": 0.25, "dv": 0.25, "Nh": 3, "min_dkh": 1}, 32, (9, 9)),
        ({"dk": 1.0, "dv": 1.0, "Nh": 1, "min_dkh": 1}, 17, (17, 17)),
        ({"dk": 1, "dv": 1, "Nh": 1, "min_dkh": 20}, 17, (1, 1)),
        ({"dk": 40, "dv": 4, "Nh": 2, "min_dkh": 99}, 16, (40, 4)),
    ],
)
def test_channels_from_numbers_and_fractions(change, width, expected):
    attention = aa(**change)
    assert (attention.dk_of(width), attention.dv_of(width)) == expected


def test_every_setting_of_aa_reaches_the_layer():
    settings = {"position": "none", "backend": "reference", "init": "glorot"}
    layers = augmented_layers(tiny(aa(dk=12, dv=6, Nh=3, bias=True, qk_norm=True, **settings)))
    layer = layers["stages.0.0.conv1"]
    assert isinstance(layer, AugmentedConv)
    assert (layer.dk, layer.dv, layer.Nh, layer.backend) == (12, 6, 3, "reference")
    assert (layer.init, layer.qk_norm) == ("glorot", True)
    assert layer.qkv_conv.bias is not None
    assert layer.attn_out.bias is None
    assert augmented_layers(tiny(aa()))["stages.0.0.conv1"].qkv_conv.bias is None


def test_the_table_shows_what_was_resolved():
    facts = layer_facts(tiny(aa(dk=0.5, dv=0.25)))
    lines = layer_table(facts)
    assert lines[0].split() == ["augmented", "out", "dk", "dv", "Nh", "dkh", "dvh", "map"]
    assert lines[1].split() == ["stages.0.0.conv1", "8", "4", "2", "2", "2", "1", "11x13"]
    assert lines[2].split() == ["stages.1.0.conv1", "16", "8", "4", "2", "4", "2", "6x7"]
    values = ("stages.1.0.conv1", 16, 8, 4, 2, 4, 2, 6, 7)
    names = ("name", "out", "dk", "dv", "Nh", "dkh", "dvh", "height", "width")
    assert facts[1] == dict(zip(names, values, strict=True))
    assert layer_table(layer_facts(tiny())) == []


def test_projection_is_a_strided_convolution_that_also_trains_in_channels_last():
    torch.manual_seed(0)
    shortcut = Shortcut(3, 7, 2, "projection")
    x = torch.randint(-8, 9, (32, 3, 31, 32)).float()  # whose sums are exact in float32
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    out = shortcut(x)
    torch.testing.assert_close(
        out, torch.nn.functional.conv2d(x.detach(), shortcut.conv.weight, stride=2)
    )
    out.sum().backward()
    expected = x.detach()[:, :, ::2, ::2].sum((0, 2, 3)).expand(7, 3)
    assert torch.equal(shortcut.conv.weight.grad[:, :, 0, 0], expected)


@pytest.mark.parametrize("init", ["torch", "glorot", "kaiming"])
def test_a_network_does_not_draw_over_the_start_of_attention(init):
    model = tiny(aa(dk=32, dv=32, Nh=4, init=init), widths=[64, 128], stem=64)
    layer = augmented_layers(model)["stages.1.0.conv1"]
    expected = {"torch": 1 / (3 * 64), "glorot": 2 / (64 + 96), "kaiming": 2 / 64}[init]
    assert layer.qkv_conv.weight.square().mean().item() == pytest.approx(expected, rel=0.06)
    assert layer.conv_out.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_initialization():
    model = tiny(widths=[64, 128], stem=64)
    conv = model.stages[1][0].conv1
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)
    assert model.head.bias.abs().max() == 0


def test_attentions_are_found_by_the_names_that_choose_them():
    assert {name: kind.name for name, kind in ATTENTIONS.items()} == {n: n for n in ATTENTIONS}
    options = {path.stem for path in (CONFIGS / "attention").glob("*.yaml")}
    assert set(ATTENTIONS) == options
    assert len({kind.label for kind in ATTENTIONS.values()}) == len(ATTENTIONS)


# A basic block from 8 to 16 channels with stride 2 on an 11x13 image, so 6x7 output positions, with
# dv = 4. The plain block's convolutions have 9 * 8 * 16 and 9 * 16 * 16 weights.
@pytest.mark.parametrize(
    ("kind", "parameters", "multiply_adds"),
    [
        # 4 channels fewer in the first convolution's outputs, in the normalization's weight and
        # bias, and in the second convolution's inputs.
        (Removed, -(9 * 8 * 4) - 2 * 4 - 9 * 4 * 16, -(9 * 8 * 4 + 9 * 4 * 16) * 42),
        # 8 * 4 weights instead of 9 * 8 * 4, applied at each position or once to the mean.
        (Pointwise, -8 * 8 * 4, -8 * 8 * 4 * 42),
        (GlobalMean, -8 * 8 * 4, -9 * 8 * 4 * 42 + 8 * 4),
    ],
)
def test_parameters_and_flops_of_controls(kind, parameters, multiply_adds):
    plain = tiny(depths=[1, 1])
    control = tiny(kind(dv=0.25, Nh=2, stages=[2]), depths=[1, 1])
    assert count_parameters(control) - count_parameters(plain) == parameters
    flops = count_flops(control, (11, 13)) - count_flops(plain, (11, 13))
    assert flops == 2 * multiply_adds


@pytest.mark.parametrize(
    ("blocks", "augmented"),
    [
        ("all", ["0.0", "0.1", "1.0", "1.1", "1.2"]),
        ("unstrided", ["0.0", "0.1", "1.1", "1.2"]),
        ("last", ["0.1", "1.2"]),
    ],
)
def test_blocks_of_a_stage(blocks, augmented):
    model = tiny(aa(blocks=blocks), depths=[2, 3])
    assert list(augmented_layers(model)) == [f"stages.{name}.conv1" for name in augmented]
    control = tiny(Pointwise(dv=4, Nh=2, stages=[1, 2], blocks=blocks), depths=[2, 3])
    found = [name for name, m in control.named_modules() if isinstance(m, SideConv)]
    assert found == list(augmented_layers(model))


@pytest.mark.parametrize(
    ("attention", "change", "words"),
    [
        (aa(dk=7), {}, "attention in stage 1: dk=7 must be divisible by Nh=2"),
        (aa(dv=12), {}, "attention in stage 1: dv=12 .*out_channels=8"),
        (aa(Nh=0), {}, "attention.Nh=0"),
        (aa(min_dkh=0), {}, "attention.min_dkh=0"),
        (aa(position="far"), {}, "attention.position=far is unknown; choose one of relative"),
        (aa(position="sine"), {"stem": 3}, "attention in stage 1: absolute=sine needs in_channels"),
        (aa(dk=0.0), {}, "attention.dk=0.0"),
        (aa(dk=float("nan")), {}, "attention.dk=nan"),
        (aa(dv=-0.1), {}, "attention.dv=-0.1"),
        (aa(dv=0), {}, "attention.dv=0 removes attention entirely; use attention=none"),
        (aa(dv=1.5), {}, "attention.dv=1.5"),
        (aa(stages=[]), {}, r"attention.stages=\[\].*attention=none"),
        (aa(stages=[0, 1]), {}, r"attention.stages=\[0, 1\].*1 to 2"),
        (aa(stages=[3]), {}, r"attention.stages=\[3\]"),
        (aa(blocks="first"), {}, "attention.blocks=first is unknown; choose one of all, unstri"),
        (aa(blocks="unstrided"), {"depths": [1, 1]}, "blocks=unstrided leaves no block of stage 2"),
        (aa(init="he"), {}, "init='he' is unknown; choose one of torch"),
        (Removed(dv=1.0, Nh=2, stages=[1]), {}, "in stage 1: dv=8 must be .* below out_channels=8"),
        (Pointwise(dv=9, Nh=3, stages=[1]), {}, "attention in stage 1: dv=9 must be"),
        (GlobalMean(dv=0.5, Nh=0, stages=[1]), {}, "attention.Nh=0"),
        (GlobalMean(dv=2.0, Nh=1, stages=[1]), {}, "attention.dv=2.0"),
        (Removed(dv=4, Nh=2, stages=[]), {}, r"attention.stages=\[\].*attention=none"),
        (aa(backend="quick"), {}, "^backend='quick' is unknown"),
        (SE(0), {}, "attention.ratio=0"),
        (SE(9), {}, "attention.ratio=9 leaves no hidden channel in a block of 8 channels"),
        (NoAttention(), {"block": "dense"}, "block=dense"),
        (NoAttention(), {"shortcut": "skip"}, "shortcut=skip"),
        (NoAttention(), {"widths": [16, 8]}, "cannot narrow 16 channels to 8"),
        (NoAttention(), {"widths": [8]}, r"widths=\[8\]"),
        (NoAttention(), {"depths": [0, 1]}, r"depths=\[0, 1\]"),
        (NoAttention(), {"stem": 0}, "stem=0"),
    ],
)
def test_wrong_settings_are_named(attention, change, words):
    with pytest.raises(ValueError, match=words):
        tiny(attention, **change)
