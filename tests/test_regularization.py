"""Random dropping in training: of blocks, values between convolutions, attention weights."""

import pytest
import torch

from aaconv import AugmentedConv, attention_2d
from models import AA, NoAttention, ResNet, build, describe
from models.attention import Place
from models.blocks import BasicBlock, Bottleneck, PreActBlock
from training.device import set_seed
from training.settings import check

from helpers import inputs, rows

AUGMENTED = AA(dk=0.5, dv=0.25, Nh=2, min_dkh=2, position="relative", stages=[2], dropout=0.5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck, PreActBlock])
def test_a_block_is_left_out_for_some_images_and_scaled_for_the_others(block):
    torch.manual_seed(0)
    place, channels = Place(1, 1, 1, 1, (3, 5)), 2 * block.expansion
    whole, dropping = (
        block(channels, 2, place, "pad", NoAttention(), drop_path=p) for p in (0.0, 0.25)
    )
    dropping.load_state_dict(whole.state_dict())
    x = torch.rand(400, channels, 3, 5)  # not negative, so a ReLU after the sum does not change it
    branches = []
    whole.recalibrate.register_forward_hook(lambda _, args, y: branches.append(y))
    whole(x)
    last = torch.relu if block is not PreActBlock else (lambda out: out)
    out, left_out = dropping(x), 0
    for image, branch, got in zip(x, branches[0], out, strict=True):
        if torch.equal(got, image):
            left_out += 1
        else:
            torch.testing.assert_close(got, last(image + branch / 0.75))
    assert 70 <= left_out <= 130
    torch.testing.assert_close(dropping.eval()(x), whole.eval()(x), rtol=0, atol=0)


def test_blocks_are_left_out_linearly_in_their_depth():
    network = ResNet("basic", [2, 1, 3], [4, 8, 8], 4, "pad", 3, drop_path=0.6)
    rates = [block.drop_path for stage in network.stages for block in stage]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_dropout_is_between_the_two_convolutions():
    torch.manual_seed(0)
    block = PreActBlock(4, 4, Place(1, 1, 1, 1, (6, 5)), "pad", NoAttention(), dropout=0.25)
    seen = {}
    block.bn2.register_forward_hook(lambda _, args, y: seen.update(before=torch.relu(y)))
    block.conv2.register_forward_hook(lambda _, args, y: seen.update(after=args[0]))
    block(torch.randn(50, 4, 6, 5))
    before, after = seen["before"], seen["after"]
    kept = after != 0
    torch.testing.assert_close(after, torch.where(kept, before / 0.75, 0.0))
    assert 0.73 < kept.sum() / (before > 0).sum() < 0.77
    block.eval()(torch.randn(5, 4, 6, 5))
    assert torch.equal(seen["before"], seen["after"])


def test_weights_of_attention_are_dropped_after_the_softmax():
    q, k, _, rel_h, rel_w = inputs((3, 4), 2, 4, 12, batch=20)
    # With one-hot values for the positions, the output equals the weights.
    v = torch.eye(12, dtype=q.dtype).view(3, 4, 12).expand(20, 2, 3, 4, 12)
    torch.manual_seed(0)
    weights = attention_2d(q, k, v, rel_h, rel_w, backend="reference")
    dropped = attention_2d(q, k, v, rel_h, rel_w, dropout=0.25)
    kept = dropped != 0
    torch.testing.assert_close(dropped, torch.where(kept, weights / 0.75, 0.0))
    assert 0.73 < kept.double().mean() < 0.77


def test_a_layer_drops_weights_in_training_alone():
    torch.manual_seed(0)
    layer = AugmentedConv(4, 6, 3, dk=4, dv=2, Nh=2, shape=5, relative=True, dropout=0.5)
    x = torch.randn(3, 4, 5, 5)
    first, second = layer(x), layer(x)
    assert torch.equal(first[:, :4], second[:, :4])
    assert not torch.equal(first[:, 4:], second[:, 4:])
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train().dropout = 0.0
    torch.testing.assert_close(layer(x), layer.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["sdpa", "tiled", "native", "fused"])
def test_other_backends_than_the_reference_refuse(settings, backend):
    with pytest.raises(ValueError, match=f"backend='{backend}' does not support dropout.*'auto'"):
        check(settings("attention.dropout=0.1", f"attention.backend={backend}"))


def test_dropout_in_other_blocks_is_refused(settings):
    with pytest.raises(ValueError, match=r"dropout=0.1 needs block=preact, not basic"):
        check(settings("model.dropout=0.1"))


def test_what_older_code_has_described_drops_nothing():
    network = ResNet("preact", [1, 1], [4, 8], 4, "pad", 3, (8, 8), AUGMENTED, False, 0.5, 0.5)
    assert describe(build(describe(network))) == describe(network)
    older = describe(network)
    del older["drop_path"], older["dropout"], older["attention"]["dropout"]
    rebuilt = build(older)
    assert rebuilt.arguments["drop_path"] == rebuilt.arguments["dropout"] == 0
    assert rebuilt.arguments["attention"].dropout == 0


def test_each_setting_changes_the_training_of_a_run_alone(run, tmp_path):
    """The initial network, which does not change with this learning rate, stays the same."""
    words = ["model.block=preact", "epochs=1", "optim.lr=1e-30", "optim.weight_decay=0"]
    names = ["model.drop_path", "model.dropout", "attention.dropout"]
    for folder, own in (("plain", []), *((n, [f"{n}=0.5"]) for n in names)):
        run(*words, *own, folder=folder)
    losses = {rows(tmp_path / name)[0]["train/loss"] for name in ("plain", *names)}
    assert len(losses) == 4
    first = torch.load(tmp_path / "plain" / "last.pt", weights_only=True)["model"]
    for name in names:
        again = torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
        assert all(torch.equal(again[n], t) for n, t in first.items() if "weight" in n)


def test_a_seed_leaves_nothing_behind():
    """torch.manual_seed would queue a call with its traceback for GPUs that are not initialized."""
    torch.manual_seed(7)
    expected, queued = torch.rand(3), len(torch.cuda._queued_calls)
    for _ in range(3):
        set_seed(torch.device("cpu"), 7)
        assert torch.equal(torch.rand(3), expected)
    assert len(torch.cuda._queued_calls) == queued
