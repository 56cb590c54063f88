"""`models.load`: loading a network from its files, and one-line errors if they do not match."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import models
from models import AA, GE, SE, Description, NoAttention
from models.fields import FORMAT
from models.saved import describe_attention, description_as_text, tensors_as_bytes

from app import run_app
from helpers import ROOT, TINY

ATTENTIONS = [
    NoAttention(),
    GE(),
    SE(ratio=2),
    AA(dk=0.5, dv=0.25, Nh=2, min_dkh=2, position="relative", stages=[2, 3]),
    AA(dk=4, dv=4, Nh=2, min_dkh=20, position="coord", stages=[1]),
    AA(dk=1.0, dv=0.5, Nh=2, min_dkh=1, position="none", stages=[2], backend="sdpa"),
]


def describe(attention=ATTENTIONS[3], **change):
    network = {
        "block": "basic",
        "depths": [1, 1, 1],
        "widths": [4, 8, 8],
        "stem": 4,
        "shortcut": "pad",
        "num_classes": 3,
        "image_size": [16, 20],
        "attention": describe_attention(attention),
    }
    rest = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "data": "own", "version": "1"}
    rest |= {"data_digest": "a1"}
    rest |= {"settings": {"epochs": 3, "optim": {"lr": 0.1}}, "precision": "float32"}
    names = {"format": FORMAT, "class_names": ["a", "b", "ü"], "commit": "unknown"}
    return Description(**{"network": network, **rest, **names} | change)


def trained(description):
    torch.manual_seed(0)
    network = models.build(description.network)
    network(torch.randn(4, 3, 16, 20))  # changes the running statistics
    return network.eval()


def write(folder, description=None, network=None):
    description = description or describe()
    network = network or trained(description)
    (folder / "weights.safetensors").write_bytes(tensors_as_bytes(network.state_dict()))
    (folder / "config.json").write_text(description_as_text(description), encoding="utf-8")
    return network


def save(folder, description):
    """Write the network of ``description`` to a new folder; return the folder."""
    folder.mkdir()
    write(folder, description)
    return folder


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_the_same_network_comes_back(tmp_path, attention):
    description = describe(attention)
    network = write(tmp_path, description)
    loaded = models.load(tmp_path)
    x = torch.randn(2, 3, 16, 20)
    assert torch.equal(loaded.network(x), network(x))
    assert loaded.description == description
    assert loaded.class_names == ["a", "b", "ü"]
    assert loaded.image_size == (16, 20)
    assert not any(module.training for module in loaded.network.modules())
    assert all(p.requires_grad for p in loaded.network.parameters())
    assert torch.equal(models.load(str(tmp_path / "weights.safetensors")).network(x), network(x))


@pytest.mark.parametrize("backend", ["fused", "tiled", "native"])
def test_attention_is_computed_as_is_best_where_the_network_is_loaded(tmp_path, backend):
    """The machine it was trained on may have had a GPU or a compiler that is missing here."""
    write(tmp_path, describe(replace(ATTENTIONS[3], backend="sdpa")))
    text = (tmp_path / "config.json").read_text().replace('"sdpa"', f'"{backend}"')
    (tmp_path / "config.json").write_text(text)
    network = models.load(tmp_path).network
    assert {layer.backend for layer in models.augmented_layers(network).values()} == {"auto"}


@pytest.mark.slow
def test_loading_does_not_import_the_compiler_of_torch(tmp_path):
    """Importing it takes nearly as long as importing torch, and loading does not need it."""
    write(tmp_path)
    program = (
        "import sys, torch, models; x = torch.zeros(1, 3, 16, 20); "
        "models.load(sys.argv[1]).network(x); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT).returncode == 0


def test_other_tools_open_the_weights(tmp_path):
    network = write(tmp_path, network=trained(describe()).to(memory_format=torch.channels_last))
    with safe_open(tmp_path / "weights.safetensors", framework="numpy") as file:
        assert set(file.keys()) == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            assert (file.get_tensor(name) == tensor.detach().numpy()).all()


def test_of_a_run_the_finished_network_is_loaded_and_of_a_checkpoint_the_same(tmp_path):
    words = [*TINY, "epochs=2", "attention=aa", "ema=0.5", "tracking=csv"]
    command = [ROOT / "train.py", *words, f"run_dir={tmp_path / 'run'}"]
    run_app(command, cwd=tmp_path, check=True)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"weights.safetensors", "config.json", "last.pt", "previous.pt"} <= files
    last = models.load(tmp_path / "run" / "last.pt")
    finished = models.load(tmp_path / "run")
    previous = models.load(tmp_path / "run" / "previous.pt")
    assert finished.description == last.description
    assert finished.description.data == "lookup"
    assert finished.description.network["num_classes"] == len(finished.class_names)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(finished.network(x), last.network(x))  # both have the averaged weights
    assert not torch.equal(previous.network(x), last.network(x))
    state = torch.load(tmp_path / "run" / "last.pt", weights_only=True)
    assert not torch.equal(state["model"]["head.weight"], last.network.head.weight)
    # An unfinished run has only its checkpoint.
    (tmp_path / "run" / "weights.safetensors").unlink()
    assert torch.equal(models.load(tmp_path / "run").network(x), last.network(x))


def change_description(change):
    def damage(folder):
        path = folder / "config.json"
        values = json.loads(path.read_text(encoding="utf-8"))
        change(values)
        path.write_text(json.dumps(values), encoding="utf-8")

    return damage


def change_weights(change):
    def damage(folder):
        tensors = load_file(folder / "weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "weights.safetensors")

    return damage


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def set_weight(name, value):
    return change_weights(lambda tensors: tensors[name].view(-1)[0].fill_(value))


def pipe(name):
    def damage(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return damage


def set_description(**values):
    return change_description(lambda d: d.update(values))


def without(key):
    return change_description(lambda d: d.pop(key))


def set_network(**values):
    return change_description(lambda d: d["network"].update(values))


DAMAGE = {
    "cut short": (cut("weights.safetensors", 1000), "weights.safetensors is damaged: "),
    "empty": (cut("weights.safetensors", 0), "weights.safetensors is damaged: "),
    "no description": (lambda f: (f / "config.json").unlink(), "config.json, which describes"),
    "description cut": (cut("config.json", 50), "config.json is damaged: "),
    "a list": (text("config.json", "[1]"), r"config.json: it is \[1\]; input should be "),
    "deep": (text("config.json", "[" * 100_000), "config.json is damaged: "),
    "other format": (set_description(format=9), "format is 9; this version reads format 3"),
    "no format": (without("format"), "config.json: format is missing"),
    "mean": (set_description(mean=[1, 1]), r"mean is \[1, 1\]; list should have at least 3"),
    "std": (set_description(std=[1, 0, 1]), r"std\[1\] is 0; input should be greater than 0.0"),
    "fewer names": (
        change_description(lambda d: d["class_names"].pop()),
        "2 class_names for network.num_classes=3",
    ),
    "network": (set_description(network=3), "network is 3; input should be a valid dictionary"),
    "block": (set_network(block="dense"), "does not describe a valid network: block=dense must be"),
    "unknown": (set_network(color=1), "does not describe a valid network: .*color"),
    "depths": (set_network(depths=[1, 10**12, 1]), "are more blocks than there are weights"),
    "widths": (set_network(widths=[4, 8, 16]), r"has shape \(.*\); the network of .* has \("),
    "huge": (set_network(widths=[4, 8, 2**40]), "does not describe a valid network|, and .* by "),
    "size": (set_network(image_size=[16, 16]), r"key_rel_w has shape \(19, 2\); .* has \(15, 2\)"),
    "attention": (set_network(attention={"name": "exec"}), "attention=exec is not one of none, ge"),
    "no name": (set_network(attention={}), "does not describe a valid network: 'name'"),
    "setting": (
        set_network(attention={"name": "se", "code": "x"}),
        "does not describe a valid network: .*code",
    ),
    "one missing": (
        change_weights(lambda t: t.pop("head.bias")),
        "missing key head.bias of the network of",
    ),
    "one more": (
        change_weights(lambda t: t.update(extra=torch.zeros(1))),
        "unexpected key extra, not in the network of",
    ),
    "shape": (
        change_weights(lambda t: t.update({"head.bias": torch.zeros(4)})),
        r"head.bias has shape \(4,\); the network of .* has \(3,\)",
    ),
    "nan": (set_weight("head.weight", float("nan")), "head.weight has values that are not finite"),
    "variance": (set_weight("bn_in.running_var", -1.0), "running_var has variances below 0"),
    "whole": (
        change_weights(lambda t: t.update({"head.bias": torch.zeros(3, dtype=torch.int32)})),
        "head.bias is torch.int32; the network of .* has torch.float32",
    ),
    "settings of the data": (
        set_description(settings={"data": None}),
        "settings.data is null, not the settings of a data set",
    ),
    "setting of the data": (
        set_description(settings={"data": {"white": float("nan")}}),
        "settings.data.white is NaN, not a finite number",
    ),
    "plain images": (set_network(image_size=[10**5, 10**5]), r"image_size\[0\] is 100000; input"),
    "mean of nothing": (set_description(mean=[0.5, 1e30, 0.5]), r"mean\[1\] is 1e\+30; input"),
    "a pipe": (pipe("weights.safetensors"), "has no weights.safetensors and no last.pt"),
    "described by a pipe": (pipe("config.json"), "config.json is not a file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_does_not_fit_is_named_in_one_line(tmp_path, kind):
    damage, words = DAMAGE[kind]
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=words) as raised:
        models.load(tmp_path)
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_what_is_no_network_is_named(tmp_path):
    for path, words in [
        (tmp_path / "nowhere", "there is no "),
        (tmp_path, "has no weights.safetensors and no last.pt"),
        (tmp_path / "page.html", "is neither a .safetensors file nor a checkpoint"),
    ]:
        (tmp_path / "page.html").write_text("")
        with pytest.raises(ValueError, match=words):
            models.load(path)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file has run",))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {}}, "does not describe its network: it is not a checkpoint of train"),
        ([1, 2], "does not describe its network"),
        ({"model": {}, "description": Evil()}, "holds print, which only its own code can read"),
    ],
)
def test_a_checkpoint_that_does_not_explain_itself_is_refused(tmp_path, content, words, capsys):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=words) as raised:
        models.load(tmp_path / "last.pt")
    assert "\n" not in str(raised.value)
    assert capsys.readouterr().out == ""
    (tmp_path / "last.pt").write_bytes((tmp_path / "last.pt").read_bytes()[:-30])
    with pytest.raises(ValueError, match="is damaged: "):
        models.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.update(ema_model=None), "ema_model is null, not tensors by their names"),
        (lambda s: s.update(model=[1]), r"model is \[1\], not tensors by their names"),
        (lambda s: s["model"].update({"head.bias": None}), "head.bias is null, not a tensor"),
        (lambda s: s["model"].update({"head.bias": 0.5}), "head.bias is 0.5, not a tensor"),
        (
            lambda s: s["model"].update({"conv.weight": torch.zeros(()).expand(4, 3, 3, 3)}),
            "conv.weight has shape .4, 3, 3, 3., but the file holds fewer values",
        ),
        (
            lambda s: s["model"].update({"conv.weight": torch.zeros(4, 3, 3, 3).to_sparse()}),
            "conv.weight is not a dense CPU tensor",
        ),
        (lambda s: s["model"].update({3: torch.zeros(1)}), "not tensors by their names"),
        (lambda s: s["description"]["settings"].update(a=torch.zeros(1)), "settings.a is a Tensor"),
        (
            lambda s: s["description"]["settings"].update({"a": {1: 2}}),
            "has the key 1, which is no",
        ),
    ],
)
def test_damaged_fields_of_a_checkpoint_are_named(tmp_path, change, words):
    description = describe()
    state = {"model": trained(description).state_dict(), "description": description.model_dump()}
    change(state)
    torch.save(state, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=words) as raised:
        models.load(tmp_path / "last.pt")
    assert "\n" not in str(raised.value)


OTHERS = [None, [], {}, -1, 0, 1.5, True, 2**62, 1e300, float("nan"), "x", [[]], {"": 0}]


def test_whatever_a_field_of_the_description_is_the_network_works_or_is_refused(tmp_path):
    """Replace each value of config.json by each of `OTHERS`: only ValueErrors, and no NaN."""
    write(tmp_path)
    path = tmp_path / "config.json"
    original = json.loads(path.read_text(encoding="utf-8"))

    def places(value, *keys):
        yield keys
        inside = dict(enumerate(value)) if isinstance(value, list) else value
        for key, inner in inside.items() if isinstance(inside, dict) else ():
            yield from places(inner, *keys, key)

    refused = []
    for keys in list(places(original))[1:]:
        for other in OTHERS:
            values = deepcopy(original)
            inside = values
            for key in keys[:-1]:
                inside = inside[key]
            inside[keys[-1]] = other
            path.write_text(json.dumps(values), encoding="utf-8")
            try:
                network = models.load(tmp_path).network
            except ValueError as error:
                refused.append(str(error))
            else:
                assert network(torch.randn(1, 3, 16, 20)).isfinite().all()
    assert len(refused) > 300
    assert not [line for line in refused if "\n" in line]


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt", "x.pth"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")])
def test_a_pipe_or_a_device_is_not_opened(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name} is not a file"):
        models.load(tmp_path / name)
