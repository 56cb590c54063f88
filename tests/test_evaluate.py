"""scripts/evaluate.py: the run's own scores again, calibration, and one line for what is wrong."""

import json
import re

import pytest
import torch
from test_saved import describe, save

import models
from data import evaluation_batches, make_lookup
from models.fields import FORMAT
from scripts import evaluate
from training.scores import Calibration

from app import run_app
from helpers import ROOT, TINY

LOOKUP = make_lookup(train_size=32, test_size=16)


def described(attention, **data):
    """A network for the built-in task as a run would have described it, but not trained."""
    settings = {"train_size": 32, "test_size": 16, "noise": 0.04, "data_seed": 0, **data}
    network = describe(attention).network
    network |= {"num_classes": LOOKUP.num_classes, "image_size": [32, 32]}
    return models.Description(
        format=FORMAT,
        network=network,
        class_names=list(LOOKUP.class_names),
        mean=list(LOOKUP.mean),
        std=list(LOOKUP.std),
        data="lookup",
        settings={"data": settings, "channels_last": True},
        precision="float32",
        version="0.1.0",
        commit="unknown",
    )


@pytest.fixture
def folder(tmp_path):
    """Two networks, one of a run with held-out images."""
    (tmp_path / "runs").mkdir()
    save(tmp_path / "runs" / "plain=1", described(models.NoAttention(), val_size=12))
    attention = models.AA(dk=0.5, dv=0.25, Nh=2, min_dkh=2, position="relative", stages=[3])
    save(tmp_path / "runs" / "aa=1", described(attention))
    return tmp_path / "runs"


def go(monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, words)])
    evaluate.main()


def record(out):
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.slow
def test_equals_the_summary_to_the_last_digit(tmp_path):
    """In processes like that of the run: other numbers of threads round sums otherwise."""
    words = [*TINY, "ema=0.5", "data.val_size=12", "data.data_seed=3", "tracking=csv"]
    run, out = tmp_path / "run=1", tmp_path / "out"
    commands = [
        ["train.py", *words, f"run_dir='{run}'"],
        ["scripts/evaluate.py", run, run / "last.pt", "--out", out],
    ]
    for script, *rest in commands:
        run_app([ROOT / script, *rest], check=True)
    summary = json.loads((run / "summary.json").read_text())
    for got in record(out):
        assert got["data"] == "lookup val"
        assert got["images"] == 12
        assert got["scores"] == {name: summary[f"val/{name}"] for name in ("loss", "top1", "top5")}
        assert list(got["per_class_top1"].values()) == summary["per_class_top1"]
        assert list(got["per_class_top1"]) == summary["class_names"]


def test_several_at_once_are_a_table(folder, monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    go(monkeypatch, folder / "plain=1", folder / "aa=1", "eval_batch_size=7", "--out", out)
    lines = capsys.readouterr().out.splitlines()
    plain, augmented = record(out)
    network = models.load(folder / "aa=1").network
    ((x, labels),) = evaluation_batches(LOOKUP.evaluation, 16, LOOKUP.mean, LOOKUP.std)
    expected = torch.nn.functional.cross_entropy(network(x), labels)
    assert augmented["scores"]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert (plain["data"], augmented["data"]) == ("lookup val", "lookup test")
    assert lines[0].split()[:3] == ["network", "data", "images"]
    assert lines[1].split()[0] == str(folder / "plain=1")
    assert lines[2].split()[4] == f"{augmented['scores']['top1']:.2f}"
    assert f"{100 * plain['ece']:.2f}" in lines[1].split()
    assert {path.name for path in out.iterdir()} == {
        "evaluation.json",
        "reliability-1.svg",
        "reliability-2.svg",
    }
    assert "<svg" in (out / "reliability-1.svg").read_text()


def test_settings_are_used(folder, monkeypatch, tmp_path):
    """Other images of the same classes, another precision, other batches."""
    run, results = folder / "plain=1", []
    for number, words in enumerate(
        [[], ["data.val_size=5"], ["data=lookup", "data.test_size=33"], ["precision=bf16"]]
    ):
        go(monkeypatch, run, *words, "--out", tmp_path / str(number))
        results += record(tmp_path / str(number))
    assert [one["images"] for one in results] == [12, 5, 33, 12]
    assert [one["data"] for one in results][2] == "lookup test"
    assert [one["precision"] for one in results] == ["float32"] * 3 + ["bfloat16"]
    assert results[3]["scores"]["loss"] != results[0]["scores"]["loss"]


def test_the_calibration_by_hand():
    """Confidences 0.5, 0.5, 0.75 and 1: bins of a quarter, each edge in the bin below it."""
    calibration = Calibration(bins=4)
    probabilities = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.5, 0.2], [0.75, 0.25, 0], [0, 0, 1.0]])
    logits, labels = probabilities.double().log(), torch.tensor([0, 0, 1, 2])
    calibration.add(logits[:3], labels[:3])
    calibration.add(logits[3:], labels[3:])
    rows = calibration.rows()
    assert [row["images"] for row in rows] == [0, 2, 1, 1]
    assert [row["accuracy"] for row in rows] == [None, 0.5, 0, 1]
    assert rows[2]["confidence"] == pytest.approx(0.75)
    assert calibration.expected_error() == pytest.approx((2 * 0 + 0.75 + 0) / 4)


def test_a_confidence_just_on_an_edge_is_in_the_bin_below():
    """Equal logits have confidences that no rounding moves: 1, a half and a quarter."""
    calibration = Calibration(bins=4)
    for classes in (1, 2, 4):
        calibration.add(torch.zeros(1, classes), torch.tensor([0]))
    assert [row["images"] for row in calibration.rows()] == [1, 1, 0, 1]


def test_too_sure_in_one_bin_does_not_make_up_for_too_unsure_in_another():
    """Wrong at 0.4 and right at 0.45, in one bin; wrong at 0.9, in the other."""
    calibration = Calibration(bins=2)
    confidences = torch.tensor([[0.4, 0.3, 0.3], [0.45, 0.3, 0.25], [0.9, 0.05, 0.05]])
    calibration.add(confidences.double().log(), torch.tensor([1, 0, 1]))
    assert calibration.expected_error() == pytest.approx((1 - 0.4 - 0.45 + 0.9) / 3)


WRONG = [
    (["nowhere"], "there is no nowhere"),
    (["runs=nowhere/x"], "no network given; there is no runs=nowhere/x"),
    (["{run}", "epochs=3"], "epochs: not a setting here; there are data, device, precision"),
    (["{run}", "attention=none"], "attention: not a setting here"),
    (["{run}", "+data.color=1"], "+data.color: not a setting here"),
    (["{run}", "data=cifar11"], "{run}: .*cifar11"),
    (["{run}", "data.color=1"], "{run}: data.color: unknown setting color; data has train"),
    (["{run}", "data.val_size=x"], "{run}: data.val_size: .*'x'"),
    (["{run}", "data.val_size=100000"], "val_size=100000"),
    (["{run}", "eval_batch_size=0"], "batch_size=0 is below 1"),
    (["{run}", "device=cuda:99"], "device=cuda:99"),
    (["{run}", "device=toaster"], "device=toaster"),
    (["{run}", "precision=fp99"], "precision"),
    (["{run}", "data=cifar10", "data.root=nowhere", "data.download=false"], "nowhere"),
    (["{run}", "data=["], "data=\\["),
    (["{page}"], "is neither a .safetensors file nor a checkpoint"),
    (["{run}", "--out", "{page}"], "page.html"),
    (["{other}"], "{other} was trained on the 8 classes of lookup; lookup has 8 others"),
]


@pytest.mark.parametrize(("words", "line"), WRONG, ids=[" ".join(words) for words, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line(folder, monkeypatch, tmp_path, capsys, words, line):
    description = models.load(folder / "plain=1").description
    renamed = [f"other {number}" for number in range(8)]
    other = models.Description(**{**vars(description), "class_names": renamed})
    names = {
        "run": folder / "plain=1",
        "page": tmp_path / "page.html",
        "other": save(tmp_path / "other", other),
    }
    names["page"].write_text("")
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        go(monkeypatch, *[word.format(**names) for word in words])
    assert stopped.value.code in (1, 2)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert said.err.startswith("evaluate.py: ")
    pattern = line.replace("{run}", re.escape(str(names["run"])))
    pattern = pattern.replace("{other}", re.escape(str(names["other"])))
    assert re.search(pattern.replace("+data", r"\+data"), said.err), said.err
    assert sorted(path for path in tmp_path.rglob("*")) == before
