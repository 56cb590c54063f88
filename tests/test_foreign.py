"""init_from with the weights of ResNets from torchvision and timm."""

import argparse
import logging
import warnings
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import data.vision  # noqa: F401 (torchvision can then be imported)
import models
from models.foreign import find_foreign, our_name
from models.weight_files import read_torch
from training import initial

torchvision_models = pytest.importorskip("torchvision.models")


def published(name="resnet18", classes=10):
    """Return a torchvision ResNet with random weights and statistics."""
    torch.manual_seed(1)
    network = torchvision_models.get_model(name, num_classes=classes)
    for key, tensor in network.state_dict().items():
        if "running" in key or "bn" in key:
            tensor.copy_(torch.empty(tensor.shape).uniform_(0.5, 1.5))
    return network.eval()


def ours(block, depths, classes=10, **change):
    options = {"image_size": (16, 16), **change}
    widths = [64, 128, 256, 512]
    return models.ResNet(block, depths, widths, 64, "projection", classes, **options).eval()


def shallow(classes=3):
    """Return a state dict with torchvision's names and one block per stage."""
    torch.manual_seed(2)
    kinds = torchvision_models.resnet
    return kinds.ResNet(kinds.BasicBlock, [1, 1, 1, 1], num_classes=classes).state_dict()


NAMES = [f"{number}" for number in range(10)]


@pytest.mark.parametrize(
    ("name", "block", "depths"),
    [
        ("resnet18", "basic", [2, 2, 2, 2]),
        pytest.param("resnet50", "bottleneck", [3, 4, 6, 3], marks=pytest.mark.slow),
    ],
)
def test_the_stages_compute_the_same(name, block, depths, tmp_path):
    theirs, network = published(name), ours(block, depths)
    new_head = network.head.weight.clone()
    found = find_foreign(theirs.state_dict(), tmp_path)
    done = models.transfer(network, found, NAMES)
    theirs.double()  # so that the order of sums does not matter
    x = torch.randn(2, 64, 15, 16, dtype=torch.float64).relu()
    expected = theirs.layer4(theirs.layer3(theirs.layer2(theirs.layer1(x))))
    stages = deepcopy(network.stages).double()
    torch.testing.assert_close(stages(x), expected, rtol=1e-9, atol=1e-9)
    assert done.table() == [
        "conv  weight: newly initialized (64x3x7x7 in the source)",
        "head  weight, bias: newly initialized: the source has 10 other classes",
    ]
    left = network.conv.weight.numel() + network.head.weight.numel() + network.head.bias.numel()
    assert done.taken == done.of - left
    assert torch.equal(network.head.weight, new_head)
    assert torch.equal(network.bn_in.running_mean, theirs.bn1.running_mean)


def test_with_a_strided_stem_the_whole_network_is_the_same(tmp_path):
    theirs = published(classes=3)
    network = ours("basic", [2, 2, 2, 2], 3, image_size=(64, 64), strided_stem=True)
    done = models.transfer(network, find_foreign(theirs.state_dict(), tmp_path), NAMES[:3])
    assert done.table() == ["head  weight, bias: newly initialized: the source has 3 other classes"]
    x = torch.randn(1, 3, 45, 64, dtype=torch.float64)
    theirs.fc, network.head = nn.Identity(), nn.Identity()
    expected = theirs.double()(x)
    torch.testing.assert_close(network.double()(x), expected, rtol=1e-9, atol=1e-9)


def test_an_augmented_network_takes_what_is_plain_in_it(tmp_path):
    aa = models.AA(dk=16, dv=16, Nh=4, min_dkh=1, position="relative", stages=[3])
    network = ours("basic", [1, 1, 1, 1], attention=aa)
    done = models.transfer(network, find_foreign(shallow(), tmp_path), NAMES)
    block = "stages.2.0.conv1"
    assert any("conv_out.weight: the first 240 of 256 channels" in line for line in done.table())
    assert torch.equal(
        network.state_dict()[f"{block}.conv_out.weight"], shallow()["layer3.0.conv1.weight"][:240]
    )


def test_other_blocks_of_a_published_network_are_told(tmp_path):
    state = shallow() | {"layer1.0.se.fc1.weight": torch.zeros(4, 4, 1, 1)}
    done = models.transfer(ours("basic", [1, 2, 1, 1]), find_foreign(state, tmp_path), NAMES)
    said = "\n".join(done.table())
    assert "stages.0.0.se.fc1  weight: not in this network" in said
    assert "stages.1.1.conv1   weight: new" in said


def test_timm_has_the_same_names():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("resnet18", num_classes=10).state_dict()
        own = ours("basic", [2, 2, 2, 2]).state_dict()
    assert {our_name(name) for name in theirs} == own.keys()


WAYS = {
    "a .pth": lambda state, path: torch.save(state, path.with_suffix(".pth")),
    "as before archives": lambda state, path: torch.save(
        state, path.with_suffix(".pth"), _use_new_zipfile_serialization=False
    ),
    "a .pt": lambda state, path: torch.save(state, path.with_suffix(".pt")),
    "safetensors": lambda state, path: save_file(state, path.with_suffix(".safetensors")),
    "inside a checkpoint": lambda state, path: torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state.items()}},
        path.with_suffix(".pt"),
    ),
    "beside timm's config.json": lambda state, path: (
        save_file(state, path.with_suffix(".safetensors")),
        path.with_name("config.json").write_text('{"architecture": "resnet18"}'),
    ),
    "in half precision": lambda state, path: torch.save(
        {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        path.with_suffix(".pt"),
    ),
}


def load(path):
    (file,) = path.parent.glob(f"{path.name}.*")
    return initial.load_initial(argparse.Namespace(init_from=str(file), freeze=[]))


@pytest.mark.parametrize("way", WAYS)
def test_files_of_all_kinds_are_read(tmp_path, way):
    state = {
        name: tensor for name, tensor in shallow().items() if name.startswith(("layer1", "fc"))
    }
    WAYS[way](state, tmp_path / "weights")
    found = load(tmp_path / "weights")
    assert found.tensors.keys() == {our_name(name) for name in state}
    for name, tensor in state.items():
        torch.testing.assert_close(
            found.tensors[our_name(name)].to(tensor.dtype), tensor, atol=1e-3, rtol=1e-3
        )
    origin = initial.init_provenance(found)["init_from"]
    assert origin["data"] == origin["commit"] == "unknown"
    assert len(origin["weights"]) == 16


def damaged(**change):
    return {"layer1.0.conv1.weight": torch.zeros(4, 4, 3, 3), **change}


REFUSED = [
    (damaged(**{"fc.bias": torch.tensor([0.0, -float("inf")])}), "fc.bias has values that are not"),
    (damaged(**{"bn1.running_var": torch.tensor([-1.0])}), "bn1.running_var has variances below 0"),
    (damaged(**{"fc.bias": None}), "fc.bias is null, not a tensor"),
    (damaged(**{"fc.bias": torch.tensor([1])}), "fc.bias is torch.int64, not of floating-point"),
    (damaged(**{"fc.bias": torch.tensor([1e300]).double()}), "fc.bias has values that are not fin"),
    ({"features.0.weight": torch.zeros(4, 3, 3, 3)}, "does not describe its network"),
    ([torch.zeros(3)], "does not describe its network"),
    ({"model": nn.Linear(2, 2)}, "holds torch.nn.modules.linear.Linear, which only its own code"),
    ({"args": argparse.Namespace(a=1)}, "holds argparse.Namespace, which only its own code can"),
]


@pytest.mark.parametrize(("content", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_what_cannot_be_taken_says_what_can(tmp_path, content, words):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"^init_from=") as raised:
        load(tmp_path / "x")
    line = str(raised.value)
    assert words in line
    assert (
        "init_from takes a run's folder, its weights.safetensors or last.pt, and the state" in line
    )
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "content"),
    [("x.pt", b"<html>"), ("x.pth", b""), ("x.pt", b"PK\x03\x04"), ("x.bin", b"")],
)
def test_a_file_that_is_none_is_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"is damaged|is neither") as raised:
        load(tmp_path / "x")
    assert "\n" not in str(raised.value)


def test_torchs_warnings_about_a_file_are_not_passed_on(tmp_path, monkeypatch):
    def warns(*_, **__):
        warnings.warn("quantized tensors are deprecated", UserWarning, stacklevel=1)
        return {}

    torch.save({}, tmp_path / "x.pt")
    monkeypatch.setattr(torch, "load", warns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_torch(tmp_path / "x.pt") == {}


def test_a_published_network_is_not_one_that_can_be_used(tmp_path):
    torch.save(damaged(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"ResNet of torchvision or timm; train from them with"):
        models.load(tmp_path / "x.pt")


# ---- Runs ---------------------------------------------------------------------------------------


def test_a_run_begins_with_published_weights(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    state = shallow(classes=5)
    torch.save(state, tmp_path / "resnet.pth")
    words = ["attention=none", "model=resnet18", "model.depths=[1]", "model.widths=[64]"]
    words += ["model.stem=64", "epochs=1", "data.train_size=32", "data.test_size=16"]
    words += ["freeze=[conv,stages.0]", f"init_from='{tmp_path / 'resnet.pth'}'"]
    summary = run(*words, folder="second")
    assert summary["segments"][0]["init_from"]["data"] == "unknown"
    assert "freeze=[conv] with parts that are newly initialized: random" in caplog.text
    kept = models.load(tmp_path / "second").network.state_dict()
    assert torch.equal(kept["stages.0.0.conv1.weight"], state["layer1.0.conv1.weight"])


@pytest.mark.parametrize(
    ("path", "names", "warned"),
    [
        (None, ["conv"], True),
        (None, ["stages.0"], True),
        (None, ["conv", "bn_in", "head"], True),
        (None, [], False),
        ("x", ["conv"], False),
    ],
)
def test_frozen_random_weights_are_told(tmp_path, caplog, path, names, warned):
    torch.save(damaged(), tmp_path / "x.pt")
    path = path and str(tmp_path / "x.pt")
    initial.load_initial(argparse.Namespace(init_from=path, freeze=names))
    line = f"freeze=[{','.join(names)}] without init_from: random weights there stay"
    assert (line in caplog.text) is warned
