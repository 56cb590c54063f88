"""`augment_`: what it replaces and by what, what it keeps, and what it rejects unchanged."""

import copy
import pickle
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from aaconv import AugmentedConv, augment_
from data import vision
from models import AA


class Small(nn.Module):
    """A network with many kinds of convolutions, on maps of 18x14, 9x7 and 5x4."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(24)
        self.blocks = nn.Sequential(
            nn.Conv2d(24, 24, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv2d(24, 24, 1),
            nn.Conv2d(24, 24, 3, padding=1, groups=2),
            nn.Conv2d(24, 32, (1, 5), padding=(0, 2)),
        )
        self.last = nn.ModuleDict({"conv": nn.Conv2d(32, 40, 5, stride=2, padding=2)})
        self.idle = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.down(torch.relu(self.stem(x))))
        return self.last["conv"](self.blocks(x)).mean(dim=(2, 3))


EXAMPLE = torch.zeros(2, 3, 18, 14)
BY_DEFAULT = ["stem", "down", "blocks.0", "blocks.4", "last.conv"]


def build(**change):
    torch.manual_seed(0)
    return Small(**change)


def images():
    return torch.randn(2, 3, 18, 14, generator=torch.Generator().manual_seed(1))


def state(model):
    """Return all state that a rejected call must not change: modules, tensors, flags, hooks."""
    modules = {name: id(module) for name, module in model.named_modules()}
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: module.training for name, module in model.named_modules()}
    hooks = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    own = {name: sorted(vars(module)) for name, module in model.named_modules()}
    return modules, tensors, flags, hooks, own


def assert_same(before, model):
    after = state(model)
    assert before[0] == after[0]
    assert before[1].keys() == after[1].keys()
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
    assert before[2:] == after[2:]


# ---- What is replaced ---------------------------------------------------------------------------


def test_replaces_what_can_have_attention_and_says_why_not():
    model = build()
    report = augment_(model, EXAMPLE, min_dkh=2)
    assert report.augmented == BY_DEFAULT
    assert {row.name: row.skip_reason for row in report.rows if row.skip_reason} == {
        "blocks.2": "kernel 1x1",
        "blocks.3": "groups=2",
        "idle": "never called",
    }
    sizes = {row.name: row.map for row in report.rows}
    assert sizes["stem"] == (18, 14)
    assert sizes["down"] == sizes["blocks.4"] == (9, 7)
    assert sizes["last.conv"] == (5, 4)
    assert sizes["idle"] is None
    for name in BY_DEFAULT:
        layer = model.get_submodule(name)
        assert isinstance(layer, AugmentedConv)
        assert layer.shape == sizes[name]
        assert layer.relative
    assert (model.down.dk, model.down.dv, model.down.Nh, model.down.pool) == (16, 8, 8, 1)
    assert model(images()).shape == (2, 40)


def test_the_report_is_a_table():
    lines = str(augment_(build(), EXAMPLE, min_dkh=2)).splitlines()
    assert lines[0].split() == ["convolution", "map", "out", "dk", "dv", "Nh", "pool"]
    assert lines[2].split() == ["down", "9x7", "24", "16", "8", "8", "1"]
    assert lines[4].split() == ["blocks.2", "9x7", "24", "kernel", "1x1"]
    assert lines[-1] == "5 of 8 convolutions are augmented"


def test_dk_and_dv_are_those_of_the_networks():
    """`models.AA` and `augment_` use the same rule."""
    for dk, dv, Nh, min_dkh in [
        (0.5, 0.25, 4, 1),
        (0.2, 0.1, 2, 7),
        (12, 4, 4, 20),
        (1.5, 0.9, 2, 1),
    ]:
        model = build()
        augment_(model, EXAMPLE, dk=dk, dv=dv, Nh=Nh, min_dkh=min_dkh)
        rule = AA(dk=dk, dv=dv, Nh=Nh, min_dkh=min_dkh, position="relative", stages=(1,))
        for name in BY_DEFAULT:
            layer = model.get_submodule(name)
            out = layer.out_channels
            assert (layer.dk, layer.dv) == (rule.dk_of(out), rule.dv_of(out))


@pytest.mark.parametrize(
    ("most", "first"), [(18 * 14, "stem"), (18 * 14 - 1, "down"), (10**30, "stem")]
)
def test_max_positions_is_the_largest_map(most, first):
    report = augment_(build(), EXAMPLE, max_positions=most)
    assert report.augmented[0] == first
    if first == "down":
        assert report.rows[0].skip_reason == "252 positions, more than max_positions=251"


def test_filter_fn_chooses_and_may_choose_any_size_and_kernel():
    asked = []

    def choose(module, name):
        asked.append((type(module), name))
        return name in ("stem", "blocks.2")

    model = build()
    report = augment_(model, EXAMPLE, filter_fn=choose, max_positions=1)
    assert report.augmented == ["stem", "blocks.2"]
    assert model.blocks[2].kernel_size == (1, 1)
    assert {kind for kind, _ in asked} == {nn.Conv2d}
    assert [name for _, name in asked] == [row.name for row in report.rows]
    assert {row.skip_reason for row in report.rows} == {"", "not chosen by filter_fn"}


@pytest.mark.parametrize(
    ("size", "pool", "expected"),
    [
        ((28, 28), None, [2, 1]),  # like the paper, which pools maps of 28x28 but not of 14x14
        ((20, 20), None, [1, 1]),
        ((21, 20), None, [2, 1]),
        ((28, 28), 1, [1, 1]),
        ((28, 28), 3, [3, 3]),
    ],
)
def test_maps_of_more_than_400_positions_are_pooled_unless_pool_says_otherwise(
    size, pool, expected
):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, 2, 1))
    augment_(model, torch.zeros(1, 3, *size), pool=pool)
    assert [layer.pool for layer in model] == expected


@pytest.mark.parametrize(
    "example",
    [(EXAMPLE,), [EXAMPLE], {"x": EXAMPLE}, EXAMPLE.to("meta"), torch.zeros(1, 3, 18, 14)],
    ids=["tuple", "list", "dict", "meta", "one image"],
)
def test_examples_of_all_kinds(example):
    model = build().to(getattr(example, "device", "cpu"))
    assert augment_(model, example).augmented == BY_DEFAULT


# ---- What is kept -------------------------------------------------------------------------------


def test_the_kept_channels_compute_what_they_did():
    model = build().double().eval()
    before = {name: model.get_submodule(name) for name in BY_DEFAULT}
    inputs = {}
    for name, module in before.items():
        module.register_forward_pre_hook(
            lambda _, given, name=name: inputs.update({name: given[0]})
        )
    model(images().double())
    for module in before.values():
        module._forward_pre_hooks.clear()
    augment_(model, EXAMPLE.double())
    for name, old in before.items():
        new = model.get_submodule(name)
        kept = new.out_channels - new.dv
        torch.testing.assert_close(new(inputs[name])[:, :kept], old(inputs[name])[:, :kept])


def test_all_parameters_are_new_without_keep_weights():
    model = build()
    old = model.stem.weight.clone()
    augment_(model, EXAMPLE, keep_weights=False)
    assert not torch.isclose(model.stem.conv_out.weight, old[:8]).any()


def test_dtype_flags_bias_and_requires_grad_are_kept():
    model = build().double()
    model.stem.eval()
    model.down.weight.requires_grad_(False)
    model.blocks[0].bias.requires_grad_(False)
    augment_(model, EXAMPLE.double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert [m.training for m in model.stem.modules()] == [False] * 4
    assert model.down.training
    assert model.training
    assert model.down.conv_out.bias is model.down.qkv_conv.bias is model.down.attn_out.bias is None
    assert model.stem.attn_out.bias is not None
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"down.conv_out.weight", "blocks.0.conv_out.bias"}


def test_one_module_at_two_places_stays_one():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(16, 16, 3, padding=1)
            self.blocks = nn.ModuleList([self.first, nn.Conv2d(16, 16, 3, padding=1)])

        def forward(self, x):
            return self.blocks[1](self.blocks[0](self.first(x)))

    model = Twice()
    report = augment_(model, torch.zeros(1, 16, 5, 7))
    assert report.augmented == ["first", "blocks.1"]
    assert model.first is model.blocks[0]
    assert isinstance(model.first, AugmentedConv)


def test_the_forward_pass_of_the_example_leaves_no_trace():
    class Counting(Small):
        def forward(self, x):
            self.calls = getattr(self, "calls", 0) + 1
            self.seen = x
            return super().forward(x)

    model = Counting()
    twin = copy.deepcopy(model)
    before, generator = state(model), torch.get_rng_state()
    with pytest.raises(ValueError, match="nothing to augment"):
        augment_(model, EXAMPLE, max_positions=1)
    assert_same(before, model)
    assert torch.equal(torch.get_rng_state(), generator)
    augment_(model, EXAMPLE)
    assert not hasattr(model, "calls")
    assert torch.equal(model.norm.running_mean, twin.norm.running_mean)
    assert model.norm.num_batches_tracked == 0


def test_the_hooks_of_a_network_see_nothing_of_the_example():
    model, seen = build(), []
    model.norm.register_forward_hook(lambda _, args, output: seen.append(output.detach()))
    model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args))
    assert augment_(model, EXAMPLE).augmented == BY_DEFAULT
    assert seen == []
    model(EXAMPLE)
    assert len(seen) == 2


def test_a_model_that_cannot_be_copied_is_named():
    model = build()
    model.lock = threading.Lock()
    with pytest.raises(ValueError, match=r"^model cannot be copied: TypeError: cannot pickle"):
        augment_(model, EXAMPLE)


def test_weight_decay_named_by_an_attribute_is_refused_before_any_change():
    class Named(Small):
        no_weight_decay = ("stem.bias",)

    model = Named()
    with pytest.raises(ValueError, match=r"^model\.no_weight_decay must be a method"):
        augment_(model, EXAMPLE)
    assert type(model.stem) is nn.Conv2d


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.int64(8)])
def test_amounts_may_be_numpys(number):
    model = build()
    augment_(model, EXAMPLE, dk=number, dv=number, min_dkh=1)
    assert (model.last["conv"].dk, model.last["conv"].dv) in {(16, 16), (8, 8)}


def test_the_start_that_is_asked_for_reaches_every_layer():
    model = build()
    augment_(model, EXAMPLE, init="glorot", qk_norm=True)
    layers = [m for m in model.modules() if isinstance(m, AugmentedConv)]
    assert {(layer.init, layer.qk_norm) for layer in layers} == {("glorot", True)}


class Spared(Small):
    """A network that names a parameter without weight decay, as timm's models do."""

    def no_weight_decay(self):
        return {"head.weight"}


@pytest.mark.parametrize("kind", [Small, Spared])
def test_the_tables_are_named_to_optimizers_that_ask(kind):
    model = kind().to(torch.float64)
    report = augment_(model, EXAMPLE.to(torch.float64), max_positions=100)
    tables = {
        f"{name}.{table}" for name in report.augmented for table in ("key_rel_h", "key_rel_w")
    }
    own = {"head.weight"} if kind is Spared else set()
    assert model.no_weight_decay() == tables | own
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = augment_(other, EXAMPLE.to(torch.float64))  # augments the stem as well
        assert again.augmented == ["stem"]
        assert other.no_weight_decay() == tables | own | {"stem.key_rel_h", "stem.key_rel_w"}
        assert model.no_weight_decay() == tables | own
    model = build()
    assert augment_(model, EXAMPLE, relative=False).augmented
    assert model.no_weight_decay() == set()


def test_timms_optimizers_decay_no_table():
    assert vision.datasets  # makes torchvision importable
    timm = pytest.importorskip("timm")
    optim = pytest.importorskip("timm.optim")
    model = timm.create_model("resnet18")
    report = augment_(model, torch.zeros(1, 3, 64, 64))
    optimizer = optim.create_optimizer_v2(model, "sgd", lr=0.1, weight_decay=0.5)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    tables = [p for name, p in model.named_parameters() if "key_rel" in name]
    assert len(tables) == 2 * len(report.augmented) == 32
    assert {decay[table] for table in tables} == {0.0}
    assert decay[model.layer3[0].conv1.qkv_conv.weight] == 0.5


def test_the_network_trains_and_its_weights_are_saved_and_loaded():
    model = build()
    augment_(model, EXAMPLE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    model(images()).square().sum().backward()
    optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    # The key bias adds the same number to all logits of a query, so without positions it cancels.
    assert changed >= {
        name for name in before if not name.startswith("idle") and "bias" not in name
    }
    twin = build()
    augment_(twin, EXAMPLE)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin.eval()(images()), model.eval()(images()))


# ---- What is refused ----------------------------------------------------------------------------


class Branching(Small):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


class Shared(nn.Module):
    """A network that applies one convolution at two sizes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x):
        return self.head(x).mean() + self.head(x[:, :, ::2, ::2]).mean()


class Same(nn.Conv2d):
    """A subclass of Conv2d, which may compute anything."""


def tied():
    model = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1))
    model[1].weight = model[0].weight
    return model


def hooked(register):
    """Return a function that builds a network with a hook on its convolution or a parameter."""

    def make():
        model = one()
        register(model[0])(lambda *_: None)
        return model

    return make


def own_forward():
    model = one()
    model[0].forward = lambda x: x
    return model


def frozen_as_a_buffer(name):
    def make():
        model = one()
        value = getattr(model[0], name).detach().clone()
        delattr(model[0], name)
        model[0].register_buffer(name, value)
        return model

    return make


class InAList(nn.Module):
    """A network that calls its convolutions from a plain list, which torch does not register."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(16, 16, 3, padding=1)
        self.order = [self.a]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return x


def normed():
    convolution = nn.Conv2d(16, 16, 3, padding=1)
    return nn.Sequential(nn.utils.parametrizations.weight_norm(convolution))


def spectral():
    """A convolution whose weight is not a parameter but is computed by a hook before each call."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(16, 16, 3, padding=1)))
    model(SIXTEEN)
    return model


def one(**change):
    return nn.Sequential(nn.Conv2d(16, 16, **{"kernel_size": 3, "padding": 1} | change))


def test_what_would_fit_at_some_sizes_only_is_left_alone_by_default():
    """For 66x66 pixels, this patch embedding gives 16x16 positions, attention would give 17x17."""
    model = nn.Sequential(nn.Conv2d(3, 64, 7, stride=4, padding=2))
    with pytest.raises(ValueError, match=r"padding=\(2, 2\) is not half of \(6, 6\)"):
        augment_(model, torch.zeros(1, 3, 64, 64))
    same = nn.Sequential(nn.Conv2d(16, 32, 5, padding="same", dilation=2))
    assert augment_(same, SIXTEEN).augmented == ["0"]
    assert same(SIXTEEN).shape == (1, 32, 6, 8)
    augment_(model, torch.zeros(1, 3, 64, 64), filter_fn=lambda module, name: True)
    assert model(torch.zeros(1, 3, 68, 64)).shape == (1, 64, 17, 16)


SIXTEEN = torch.zeros(1, 16, 6, 8)
LOST = "has hooks, which would be lost"
CANNOT = [
    (lambda: one(groups=4), "group"),
    (lambda: one(padding_mode="reflect"), "padding_mode=reflect"),
    (lambda: one(padding_mode="circular"), "padding_mode=circular"),
    (lambda: one(padding=0), "4x6 from 6x8, on which attention gives 6x8"),
    (lambda: one(stride=3, padding=0), "2x2 from 6x8, on which attention gives 2x3"),
    (lambda: one(kernel_size=5, stride=3, padding=1), "2x2 from 6x8, on which attention gives 2x3"),
    (lambda: one(padding="valid"), "4x6 from 6x8, on which attention gives 6x8"),
    (lambda: nn.Sequential(Same(16, 16, 3, padding=1)), "Same, a subclass of Conv2d"),
    (normed, "ParametrizedConv2d, a subclass of Conv2d"),
    (spectral, LOST),
    (hooked(lambda conv: conv.register_forward_hook), LOST),
    (hooked(lambda conv: conv.weight.register_hook), LOST),
    (hooked(lambda conv: conv.bias.register_post_accumulate_grad_hook), LOST),
    (hooked(lambda conv: conv.register_state_dict_post_hook), LOST),
    (own_forward, "has a forward of its own"),
    (frozen_as_a_buffer("weight"), "has a weight or bias that is no parameter"),
    (frozen_as_a_buffer("bias"), "has a weight or bias that is no parameter"),
    (InAList, "also in order, a list of its network"),
    (tied, "shares its weight with another module"),
    (Shared, "called at several sizes: 6x8, 3x4"),
    (lambda: nn.Sequential(nn.Conv2d(16, 8, 3, padding=1)), "Nh=8 heads would take all of its 8"),
]


@pytest.mark.parametrize(("make", "reason"), CANNOT, ids=[reason for _, reason in CANNOT])
def test_what_cannot_be_replaced_is_named(make, reason):
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=r"^nothing to augment: ") as raised:
        augment_(model, SIXTEEN)
    assert reason in str(raised.value)
    assert_same(before, model)
    with pytest.raises(
        ValueError, match=r"^filter_fn chooses .*, which cannot be augmented: "
    ) as raised:
        augment_(model, SIXTEEN, filter_fn=lambda module, name: True)
    assert reason in str(raised.value)
    assert_same(before, model)


@pytest.mark.parametrize(
    ("shape", "pool", "augmented"),
    [((1, 1), None, 0), ((3, 1), None, 2), ((2, 2), 2, 0), ((2, 3), 2, 2), ((18, 14), 18, 0)],
)
def test_a_single_position_is_not_augmented_unless_asked_for(shape, pool, augmented):
    def network():
        return nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, (1, 3), 1, (0, 1)))

    example = torch.zeros(2, 3, *shape)
    words = "nothing to augment: 2 of 2: single position: nothing to attend to"
    if augmented:
        assert len(augment_(network(), example, pool=pool).augmented) == augmented
    else:
        with pytest.raises(ValueError, match=f"^{words}$"):
            augment_(network(), example, pool=pool)
    model = network()
    assert len(augment_(model, example, pool=pool, filter_fn=lambda *_: True).augmented) == 2
    assert model(torch.randn(2, 3, *shape)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_networks_are_refused(dtype):
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, dtype=dtype))
    before = state(model)
    words = f"1 of 1: dtype={dtype} must be a floating-point type"
    with pytest.raises(ValueError, match=f"^nothing to augment: {words}$"):
        augment_(model, EXAMPLE.to(dtype))
    with pytest.raises(ValueError, match=f"0, which cannot be augmented: {words[8:]}$"):
        augment_(model, EXAMPLE.to(dtype), filter_fn=lambda *_: True)
    assert_same(before, model)


def test_an_even_kernel_is_not_replaced_unless_asked_for():
    model = one(kernel_size=2, stride=2, padding=0)
    with pytest.raises(ValueError, match="even kernel 2x2"):
        augment_(model, SIXTEEN)
    augment_(model, SIXTEEN, filter_fn=lambda module, name: True)
    assert model(SIXTEEN).shape == (1, 16, 3, 4)


def compiled_in_place():
    model = Small()
    model.compile()
    return model


MODELS = [
    (lambda: nn.Conv2d(3, 16, 3, padding=1), "model is itself a convolution"),
    (lambda: nn.Sequential(nn.Linear(3, 3)), "nothing to augment: model has no Conv2d"),
    (lambda: nn.DataParallel(Small()), "model is wrapped in DataParallel"),
    (lambda: nn.Sequential(nn.DataParallel(Small())), "its module 0 is wrapped in DataParallel"),
    (lambda: torch.compile(Small()), "model is compiled"),
    (compiled_in_place, "model is compiled"),
    (lambda: "resnet50", "model must be a torch module, not str"),
    (Branching, "model's forward pass depends on the values of the data"),
]


# Warnings from modules that torch.compile imports.
@pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("make", "words"), MODELS, ids=[words for _, words in MODELS])
def test_models_that_cannot_be_augmented_are_refused(make, words):
    example = torch.zeros(2, 3) if "no Conv2d" in words else EXAMPLE
    with pytest.raises(ValueError, match=f"^{words}") as raised:
        augment_(make(), example)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("example", [torch.zeros(2, 4, 18, 14), (), "image", None, torch.zeros(3)])
def test_an_example_that_the_model_does_not_take_is_named(example):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=r"^model cannot be called with example_input: ") as raised:
        augment_(model, example)
    assert "\n" not in str(raised.value)
    assert_same(before, model)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dk": 16.0}, "dk=16.0 is a fraction .* write 16 for channels"),
        ({"dv": 0.0}, "dv=0.0 is a fraction"),
        ({"dv": 1.5}, "dv=1.5 is a fraction"),
        ({"dk": 1}, "dk=1 means 1 of the channels; write 1.0 for 1 times the layer.s output"),
        ({"dk": 1, "Nh": 1}, "dk=1 means 1 of the channels; write 1.0"),
        ({"dk": 2, "Nh": 2}, "dk=2 means 2 of the channels; write 2.0"),
        ({"dk": 10**30}, f"dk={10**30} must be at most 1048576"),
        ({"dv": 2**62}, f"dv={2**62} must be at most 1048576"),
        ({"Nh": 10**30}, f"Nh={10**30} must be at most 1048576"),
        ({"min_dkh": 10**30}, f"min_dkh={10**30} must be at most 1048576"),
        ({"pool": 10**30}, f"pool={10**30} must be at most 1048576"),
        ({"dk": True}, "dk=True must be an int or a float"),
        ({"dv": "0.1"}, "dv='0.1' must be an int or a float"),
        ({"dv": 0}, "dv=0 must be greater than 0, or nothing is augmented"),
        ({"Nh": np.int64(0)}, "Nh=0 must be at least 1"),
        ({"Nh": 2.0}, "Nh=2.0 must be an int"),
        ({"min_dkh": 0}, "min_dkh=0 must be at least 1"),
        ({"max_positions": -1}, "max_positions=-1 must be at least 1"),
        ({"pool": 0}, "pool=0 must be at least 1"),
        ({"pool": 1.5}, "pool=1.5 must be an int"),
        ({"dk": 12}, "nothing to augment: .*dk=12 must be divisible by Nh=8"),
        ({"dv": 48}, "nothing to augment: .*dv=48 must lie between 0 and out_channels=16"),
    ],
    ids=str,
)
def test_wrong_options_are_named(change, words):
    model = build()
    before = state(model)
    with pytest.raises(ValueError, match=f"^{words}"):
        augment_(model, EXAMPLE, **change)
    assert_same(before, model)


# ---- The paper's networks -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "count", "parameters", "flops", "paper"),
    [
        (50, 13, 25_781_872, 8_360_198_496, ("25.8", 8.3)),
        (101, 30, 45_359_208, 16_277_030_496, ("45.4", 16.1)),
        (152, 47, 61_558_496, 24_091_352_928, ("61.6", 23.8)),
    ],
    ids=["AA-ResNet-50", "AA-ResNet-101", "AA-ResNet-152"],
)
def test_the_papers_imagenet_networks(layers, count, parameters, flops, paper):
    """Table 2 of Bello et al. 2019 prints millions of parameters and GFLOPs with one decimal."""
    from torchvision import models

    example = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        model = models.get_model(f"resnet{layers}")
    plain = sum(p.numel() for p in model.parameters())
    report = augment_(model, example)
    assert len(report.augmented) == count
    counted = sum(p.numel() for p in model.parameters())
    assert counted == parameters
    assert f"{counted / 1e6:.1f}" == paper[0]
    assert plain < counted
    with FlopCounterMode(display=False) as counter:
        model.eval()(example)
    assert counter.get_total_flops() == flops
    assert abs(flops / 1e9 / paper[1] - 1) < 0.015
