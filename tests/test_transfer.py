"""Loading weights of another network (init_from), frozen parts, and more epochs."""

import json
import logging

import pytest
import torch
from test_saved import describe

import models
from aaconv.tables import fit_table
from models import AA, GE, SE, NoAttention, Trained, freeze, set_frozen_eval, transfer
from models.saved import describe_attention
from training import cli, run_folder
from training.variants import public_settings, result_settings

from helpers import TINY, call, rows

SIZE = (9, 7)
NETWORK = {
    "block": "basic",
    "depths": [1, 1],
    "widths": [6, 8],
    "stem": 6,
    "shortcut": "projection",
    "num_classes": 3,
    "image_size": list(SIZE),
}
NAMES = ["ant", "bee", "cat"]


def aa(dk=4, dv=2, Nh=2, stages=(2,), position="relative"):
    return AA(dk=dk, dv=dv, Nh=Nh, min_dkh=1, position=position, stages=list(stages))


def network(attention=None, seed=0, **change):
    """Build a network with random weights and running statistics."""
    torch.manual_seed(seed)
    described = describe_attention(attention or NoAttention())
    made = models.build({**NETWORK, **change, "attention": described})
    for name, tensor in made.state_dict().items():
        if "running" in name:
            tensor.uniform_(0.5, 2)
    return made


def trained(attention=None, names=NAMES, **change):
    """Return another network in the form of `models.load`."""
    made = network(attention, seed=1, num_classes=len(names), **change)
    description = describe()
    object.__setattr__(description, "class_names", list(names))
    return Trained(made.eval(), description)


def after(attention, other, names=NAMES, **change):
    """Transfer from ``other``; return new, previous and other tensors, and what was done."""
    new = network(attention, num_classes=len(names), **change)
    before = {name: t.clone() for name, t in new.state_dict().items()}
    done = transfer(new, other, names)
    return new.state_dict(), before, other.network.state_dict(), done


@pytest.mark.parametrize("attention", [NoAttention(), SE(2), GE(), aa(), aa(stages=(1, 2))])
def test_the_same_network_is_taken_whole(attention):
    new, _, old, done = after(attention, trained(attention))
    assert new.keys() == old.keys()
    assert all(torch.equal(new[name], old[name]) for name in new)
    assert done.rows == []
    assert done.table() == []
    assert done.taken == done.of == sum(p.numel() for p in network(attention).parameters())


@pytest.mark.parametrize(
    "names", [["ant", "bee"], ["ant", "bee", "cow"], ["bee", "ant", "cat"], [*NAMES, "dog"]]
)
def test_other_classes_get_a_new_last_layer(names):
    new, before, old, done = after(aa(), trained(aa()), names)
    for name in new:
        assert torch.equal(new[name], before[name] if name.startswith("head.") else old[name])
    assert done.table() == ["head  weight, bias: newly initialized: the source has 3 other classes"]
    assert done.taken == done.of - len(names) * 9


def test_plain_to_augmented_takes_the_convolutions_first_channels():
    new, before, old, done = after(aa(), trained())
    block = "stages.1.0.conv1"
    assert torch.equal(new[f"{block}.conv_out.weight"], old[f"{block}.weight"][:6])
    for own in ("qkv_conv.weight", "attn_out.weight", "key_rel_h", "key_rel_w"):
        assert torch.equal(new[f"{block}.{own}"], before[f"{block}.{own}"])
    others = [name for name in new if not name.startswith(block)]
    assert all(torch.equal(new[name], old[name]) for name in others)
    assert done.table() == [
        f"{block}  key_rel_w, key_rel_h, qkv_conv.weight, attn_out.weight: newly initialized; "
        "conv_out.weight: the first 6 of 8 channels"
    ]
    attention = sum(
        new[f"{block}.{row.tensor}"].numel() for row in done.rows if row.why == "newly initialized"
    )
    assert done.taken == done.of - attention


def test_augmented_to_plain_leaves_the_other_channels_new():
    new, before, old, done = after(NoAttention(), trained(aa()))
    block = "stages.1.0.conv1"
    assert torch.equal(new[f"{block}.weight"][:6], old[f"{block}.conv_out.weight"])
    assert torch.equal(new[f"{block}.weight"][6:], before[f"{block}.weight"][6:])
    (line,) = done.table()
    assert "weight: copied 6 of 8 channels, the rest newly initialized" in line
    assert "key_rel_w, key_rel_h, qkv_conv.weight, attn_out.weight: not in this network" in line
    assert done.taken == done.of - new[f"{block}.weight"][6:].numel()


@pytest.mark.parametrize("size", [(5, 13), (9, 14), (18, 7), (2, 2)])
def test_tables_of_another_map_are_fitted(size):
    """They are fitted by `fit_table` (see test_export.py); the layer is in the second stage."""
    new, _, old, done = after(aa(), trained(aa()), image_size=list(size))
    changed = set()
    for own, length, was in (("key_rel_h", size[0], 9), ("key_rel_w", size[1], 7)):
        name, here, there = f"stages.1.0.conv1.{own}", (length + 1) // 2, (was + 1) // 2
        assert len(new[name]) == 2 * here - 1
        assert torch.equal(new[name], fit_table(old[name], here))
        if here != there:
            changed.add(own)
    assert {row.tensor for row in done.rows} == changed
    assert all("fitted from" in row.why for row in done.rows)
    assert done.taken == done.of


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (aa(dk=8), "newly initialized (dk=4 in the source)"),
        (aa(Nh=1), "newly initialized (Nh=2 in the source)"),
        # The convolution for q, k and v has as many channels as before, but splits differently.
        (aa(dk=3, dv=4, Nh=1), "newly initialized (dk=4, dv=2, Nh=2 in the source)"),
    ],
)
def test_other_attention_is_new_and_its_convolution_taken(attention, words):
    new, before, old, done = after(attention, trained(aa()))
    block = "stages.1.0.conv1"
    assert words in done.table()[0]
    for own in ("qkv_conv.weight", "attn_out.weight", "key_rel_h"):
        assert torch.equal(new[f"{block}.{own}"], before[f"{block}.{own}"])
    kept = min(len(new[f"{block}.conv_out.weight"]), 6)
    assert torch.equal(
        new[f"{block}.conv_out.weight"][:kept], old[f"{block}.conv_out.weight"][:kept]
    )


def test_attention_learned_on_inputs_with_sines_is_not_taken_without_them():
    _, _, _, done = after(aa(position="none"), trained(aa(position="sine")))
    assert "newly initialized (absolute=sine in the source)" in done.table()[0]


def test_other_widths_depths_and_modules_are_named():
    _, _, _, done = after(NoAttention(), trained(SE(2)))
    assert any("recalibrate" in line and "not in this network" in line for line in done.table())
    _, _, _, done = after(NoAttention(), trained(), depths=[2, 1])
    assert any(line.startswith("stages.0.1.conv1") and "new" in line for line in done.table())
    _, _, _, done = after(NoAttention(), trained(), widths=[6, 10])
    words = "stages.1.0.conv2  weight: newly initialized (8x8x3x3 in the source)"
    assert any(line.split() == words.split() for line in done.table())


def test_a_network_of_which_nothing_fits_is_refused():
    other = trained(block="bottleneck", stem=5, widths=[7, 9])
    with pytest.raises(ValueError, match="none of its convolutions fits this network"):
        transfer(network(), other, NAMES)


# ---- Freezing -----------------------------------------------------------------------------------


def test_frozen_modules_are_not_trained_and_keep_their_statistics():
    new = network(aa())
    freeze(new, ["conv", "bn_in", "stages.0"])
    trainable = {name for name, p in new.named_parameters() if p.requires_grad}
    assert not any(name.startswith(("conv.", "bn_in.", "stages.0.")) for name in trainable)
    assert "stages.1.0.conv1.key_rel_h" in trainable
    new.train()
    set_frozen_eval(new, ["conv", "bn_in", "stages.0"])
    before = {name: t.clone() for name, t in new.state_dict().items()}
    new(torch.randn(4, 3, *SIZE))
    moved = {n for n, t in new.state_dict().items() if not torch.equal(t, before[n])}
    assert moved
    assert not any(name.startswith(("bn_in.", "stages.0.")) for name in moved)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["stem"],
            "freeze=stem is not a module of the network; choose from conv, bn_in, stages, bn",
        ),
        (["stages.7"], "freeze=stages.7 is not a module of stages; choose from 0, 1"),
        ([""], "freeze= is not a module of the network"),
        (["bn_out"], "freeze=bn_out: that module has no parameters"),
        (["conv.weight"], "freeze=conv.weight is not a module of conv; choose from conv"),
        (["conv", "bn_in", "stages", "head"], "leaves nothing to train"),
    ],
)
def test_what_cannot_be_frozen_is_named(names, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (looked at below)
        freeze(network(), names)
    assert words in str(caught.value)


# ---- Runs ---------------------------------------------------------------------------------------


def test_a_run_begins_with_the_weights_of_another(run, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    first = run("attention=none", folder="first")
    second = run("attention=aa", f"init_from='{tmp_path / 'first'}'", "epochs=1", folder="second")
    assert "parameters taken" in caplog.text
    assert "the first 4 of 8 channels" in caplog.text
    origin = second["segments"][0]["init_from"]
    assert (origin["data"], origin["data_digest"]) == ("lookup", first["data_digest"])
    assert "init_from" not in first["segments"][0]
    scratch = run("attention=aa", "epochs=1", folder="scratch")
    assert second["train/loss"] != scratch["train/loss"]


def test_a_run_from_weights_that_has_stopped_continues_without_them(run, tmp_path):
    run("attention=none", folder="first")
    words = ["attention=none", f"init_from='{tmp_path / 'first'}'", "freeze=[conv,bn_in]"]
    whole = run(*words, folder="whole")
    with pytest.raises(SystemExit):  # stops and saves right after the first step
        run(*words, "max_minutes=1e-9", folder="parts")
    (tmp_path / "first").rename(tmp_path / "gone")
    parts = run(*words, "resume=auto", folder="parts")
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")
    assert parts["segments"][0]["init_from"] == whole["segments"][0]["init_from"]
    with pytest.raises(ValueError, match=r"first: there is no"):
        run(*words, folder="again")
    assert not list((tmp_path / "again").glob("*"))


@pytest.mark.parametrize("extra", [[], ["ema=0.9"]])
def test_frozen_parts_of_a_run_stay_as_they_were(run, tmp_path, extra):
    run("attention=none", folder="first")
    words = ["attention=none", f"init_from='{tmp_path / 'first'}'", "freeze=[conv,bn_in,stages.0]"]
    run(*words, *extra, folder="second")
    before, after = (
        models.load(tmp_path / name).network.state_dict() for name in ("first", "second")
    )
    # torch averages num_batches_tracked as well, rounding it down.
    before = {n: t for n, t in before.items() if not n.endswith("num_batches_tracked")}
    frozen = {n for n in before if n.startswith(("conv.", "bn_in.", "stages.0."))}
    assert frozen
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in frozen), name


def test_what_decides_a_result():
    aa = {"_target_": "models.AA", "dk": 0.5}
    config = {"seed": 1, "name": "a", "attention": aa, "model": {"aa": {"dk": 0.5}, "stem": 4}}
    assert result_settings(config) == {
        "seed": 1,
        "attention._target_": "models.AA",
        "attention.dk": 0.5,
        "model.stem": 4,
    }


def test_no_path_of_a_machine_is_published():
    path = "/home/someone/outputs/train/attention=aa/seed=0"
    assert public_settings({"init_from": path, "freeze": []}) == {
        "init_from": "train/attention=aa/seed=0",
        "freeze": [],
    }


# ---- More epochs --------------------------------------------------------------------------------


def test_more_epochs_are_never_silently_a_new_run(tmp_path, capsys):
    words = [*TINY, "attention=none", f"out_dir='{tmp_path}'"]
    call(cli.run, *words, "epochs=1")
    capsys.readouterr()
    call(cli.run, *words, "epochs=2", "resume=auto")
    said = capsys.readouterr().out
    assert "nothing to continue in" in said
    (line,) = (one for one in said.splitlines() if "is the same run with epochs=1" in one)
    assert "a new schedule of the learning rate over 2 epochs" in line
    word = line.partition("; ")[2].partition(" begins with its")[0].strip('"')
    call(cli.run, *words, "epochs=2", word)  # as printed
    (summary,) = tmp_path.glob("lookup/*init_from*/seed=0/summary.json")
    assert json.loads(summary.read_text())["segments"][0]["init_from"]["data"] == "lookup"


def test_a_finished_run_asked_for_more_epochs_says_how_to_go_on(run, tmp_path):
    run("epochs=1", folder="one")
    with pytest.raises(ValueError, match="from a run of 1 epochs, and its learning rate") as caught:
        run("epochs=3", "resume=auto", folder="one")
    assert f"init_from='{tmp_path / 'one'}'" in str(caught.value)
    assert "a new schedule of 3 epochs" in str(caught.value)
    assert (tmp_path / "one" / run_folder.SUMMARY).exists()
