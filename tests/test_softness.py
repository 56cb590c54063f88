"""scripts/softness.py: what it prints for networks and runs, and what it rejects."""

import re

import pytest
import torch
import torch.nn.functional as F

import models
from aaconv import attention_stats
from data import evaluation_batches, make_lookup
from scripts import softness

from helpers import TINY, call, refused

SETTINGS = [*TINY, "attention=aa"]


def printed(capsys, *words):
    call(softness.main, *words)
    return capsys.readouterr().out


def numbers(text, name):
    """Return entropies, largest weights and gradients from the lines with this name."""
    return re.findall(rf"^{name} .*?([\d.]+) +([\d.e-]+) +([\d.e-]+)$", text, re.MULTILINE)


def test_a_network_by_its_settings(capsys):
    text = printed(capsys, *SETTINGS, "--images", 32)
    soft = numbers(text, "stages.1.0.conv1")
    assert len(soft) == 1
    assert text.startswith("at the start (init=torch, qk_norm=false, seed=0)\n")
    assert "after training" not in text
    former = ["attention.init=kaiming", "attention.qk_norm=false", "seed=7"]
    text = printed(capsys, *SETTINGS, *former, "--images", 32)
    assert text.startswith("at the start (init=kaiming, qk_norm=false, seed=7)\n")
    assert numbers(text, "stages.1.0.conv1") != soft


def test_a_run_at_its_start_and_after_training(run, tmp_path, capsys):
    run("attention=aa", "seed=3", "epochs=2")
    text = printed(capsys, tmp_path / "run", "--images", 40)
    start, end = numbers(text, "stages.2.0.conv1")
    assert start != end
    trained = models.load(tmp_path / "run")
    dataset = make_lookup(train_size=96, test_size=40)
    torch.manual_seed(3)
    for network, found in (
        (models.build(trained.description.network), start),
        (trained.network, end),
    ):
        x, y = next(iter(evaluation_batches(dataset.evaluation, 40, dataset.mean, dataset.std)))
        stats = attention_stats(network.train(), x, lambda out, y=y: F.cross_entropy(out, y))
        layer = stats.layers[-1]
        assert found == (f"{layer.entropy:.2f}", f"{layer.largest:.3f}", f"{layer.gradient:.3g}")
    plain = re.search(r"gradient of the plain network: ([\d.]+) \(ratio ([\d.]+)\)", text)
    assert float(plain[1]) > 0
    own = float(re.findall(r"^network +([\d.e-]+)$", text, re.MULTILINE)[0])
    assert own / float(plain[1]) == pytest.approx(float(plain[2]), rel=0.02)


def test_a_run_that_began_with_other_weights_has_no_start_of_its_own(run, tmp_path, capsys):
    run("attention=none", folder="first")
    run("attention=aa", f"init_from={tmp_path / 'first'}", folder="second")
    text = printed(capsys, tmp_path / "second")
    assert text.startswith("it began with the weights of ")
    assert "at the start" not in text
    assert len(numbers(text, "stages.2.0.conv1")) == 1


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([*TINY, "attention=none"], "softness.py: attention=none has no attention to look at"),
        ([*TINY, "attention=mean"], "softness.py: attention=mean has no attention to look at"),
        (["data=folder"], "softness.py: data.root has no value; give data.root=..."),
        (["missing"], "softness.py: there is no missing"),
        (["a", "b"], "softness.py: b: one network at a time"),
        ([*SETTINGS, "attention.init=he"], "softness.py: init='he' is unknown; choose one of"),
        ([*SETTINGS, "attention.color=1"], "softness.py: attention.color: unknown setting"),
        (
            [*SETTINGS, "init_from=x.pt"],
            "softness.py: init_from=x.pt: settings describe a newly initialized network",
        ),
        ([*SETTINGS, "attention.backend=sdpa"], "softness.py: attention.backend= changes nothing"),
        ([*SETTINGS, "device=cpu"], "softness.py: device= is for train.py; use --device here"),
        (
            [*SETTINGS, "--images", "1"],
            "softness.py: --images: 1 must be a whole number, at least 2 and",
        ),
    ],
)
def test_mistakes_are_one_line(capsys, words, line):
    assert refused(capsys, softness.main, *words).startswith(line)
