"""scripts/evaluate.py: reproducing a run's scores, test sets, and one-line errors."""

import csv
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image, ImageOps
from test_saved import describe, save

import models
from data import evaluation_batches, load_folder, make_lookup
from reporting.text import DASH
from scripts import evaluate
from training import trained
from training.scores import Calibration, ClassScore, Confusion

from app import run_app
from helpers import ROOT, TINY, call, refused
from image_folders import write

LOOKUP = make_lookup(train_size=32, test_size=16)


def described(attention, **data):
    """An untrained network for the built-in task, described as a run would describe it."""
    settings = {"train_size": 32, "test_size": 16, "noise": 0.04, "data_seed": 0, **data}
    network = describe(attention).network
    return describe(
        network=network | {"num_classes": LOOKUP.num_classes, "image_size": [32, 32]},
        class_names=list(LOOKUP.class_names),
        mean=list(LOOKUP.mean),
        std=list(LOOKUP.std),
        data="lookup",
        data_digest=LOOKUP.digest,
        settings={"data": settings, "channels_last": True},
    )


@pytest.fixture
def folder(tmp_path):
    """Two networks, one of them from a run with held-out images."""
    (tmp_path / "runs").mkdir()
    save(tmp_path / "runs" / "plain=1", described(models.NoAttention(), val_size=12))
    attention = models.AA(dk=0.5, dv=0.25, Nh=2, min_dkh=2, position="relative", stages=[3])
    save(tmp_path / "runs" / "aa=1", described(attention))
    return tmp_path / "runs"


def record(out):
    return json.loads((out / "evaluation.json").read_text())


@pytest.mark.slow
def test_equals_the_summary_to_the_last_digit(tmp_path):
    """Both run in similar processes: another number of threads would round sums differently."""
    words = [*TINY, "ema=0.5", "data.val_size=12", "data.data_seed=3", "tracking=csv"]
    run, out = tmp_path / "run=1", tmp_path / "out"
    commands = [
        ["train.py", *words, f"run_dir='{run}'"],
        ["scripts/evaluate.py", run, run / "last.pt", "--out", out],
    ]
    for script, *rest in commands:
        run_app([ROOT / script, *rest], check=True)
    summary = json.loads((run / "summary.json").read_text())
    of_run, of_checkpoint = record(out)
    for got in (of_run, of_checkpoint):
        assert got["data"] == "lookup val"
        assert got["images"] == 12
        assert got["scores"] == {name: summary[f"val/{name}"] for name in ("loss", "top1", "top5")}
        assert list(got["per_class_top1"].values()) == summary["per_class_top1"]
        assert list(got["per_class_top1"]) == summary["class_names"]


def test_several_at_once_are_a_table(folder, tmp_path, capsys):
    out = tmp_path / "out"
    call(evaluate.main, folder / "plain=1", folder / "aa=1", "eval_batch_size=7", "--out", out)
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
        *(f"confusion-{n}.{end}" for n in (1, 2) for end in ("csv", "svg")),
        *(f"reliability-{n}.svg" for n in (1, 2)),
    }
    assert "<svg" in (out / "reliability-1.svg").read_text()
    assert "<svg" in (out / "confusion-2.svg").read_text()


def test_what_happens_once_is_not_timed(folder, tmp_path, monkeypatch):
    """For example the compilation of the attention kernel, which delays the first image."""
    seen, events = [], []
    clock = SimpleNamespace(perf_counter=lambda: events.append(len(seen)) or len(events))
    monkeypatch.setattr(evaluate, "time", clock)
    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: seen.append(1) if isinstance(module, models.ResNet) else None
    ):
        call(evaluate.main, folder / "plain=1", "eval_batch_size=6", "--out", tmp_path / "out")
    assert events == [1, 1 + 2]  # forward passes before the clock starts and ends
    assert record(tmp_path / "out")[0]["images_per_s"] == 12


def test_settings_are_used(folder, tmp_path):
    """Settings may select other images of the same classes, another precision or batch size."""
    run, results = folder / "plain=1", []
    for number, words in enumerate(
        [[], ["data.val_size=0"], ["data=lookup", "data.test_size=33"], ["precision=bf16"]]
    ):
        call(evaluate.main, run, *words, "--out", tmp_path / str(number))
        results += record(tmp_path / str(number))
    assert [one["images"] for one in results] == [12, 16, 33, 12]
    assert [one["data"] for one in results][2] == "lookup test"
    assert [one["precision"] for one in results] == ["float32"] * 3 + ["bfloat16"]
    assert results[3]["scores"]["loss"] != results[0]["scores"]["loss"]


# ---- Images that the network was not trained on -------------------------------------------------

PETS = ["ant", "bee", "cat"]


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of images of three classes."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pets"
    for number, name in enumerate(PETS):
        for image in range(6):
            write(root / "train" / name / f"{image}.png", seed=10 * number + image)
        write(root / "val" / name / "x.png", seed=100 + number)
    return root


def network_of(root, folder, val_size):
    dataset = load_folder(str(root), "pets", 8, val_size)
    settings = {"_target_": "data.load_folder", "name": "pets", "size": 8, "val_size": val_size}
    settings |= {"white": None, "skip_damaged": False, "max_pixels": 1000}
    description = describe(
        class_names=PETS,
        network=describe(models.NoAttention()).network | {"image_size": [8, 8]},
        mean=list(dataset.mean),
        std=list(dataset.std),
        data="pets",
        data_digest=dataset.digest,
        settings={"data": settings},
    )
    return save(folder, description)


def test_a_test_set_has_folders_of_classes_alone_and_may_lack_some(pets, tmp_path, capsys):
    """CIFAR-10-C's corruptions are such folders; nothing else of the run's data is read."""
    path = network_of(pets, tmp_path / "net", 0)
    fog = tmp_path / "pets-c" / "fog"
    for name, images in (("cat", 5), ("ant", 2)):
        for image in range(images):
            write(fog / name / f"{image}.png", seed=500 + 10 * images + image)
    call(evaluate.main, path, f"data.root='{fog}'", "--out", tmp_path / "out")
    (got,) = record(tmp_path / "out")
    assert (got["data"], got["images"]) == ("fog test", 7)
    assert "1 of 3 classes has no images: bee" in capsys.readouterr().out.splitlines()
    assert got["per_class_top1"]["bee"] is None
    assert got["classes"]["bee"]["recall"] is None
    assert [got["classes"][name]["images"] for name in PETS] == [2, 0, 5]
    with (tmp_path / "out" / "confusion.csv").open() as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["true class", *PETS]
    counts = {row[0]: list(map(int, row[1:])) for row in rows[1:]}
    assert [sum(counts[name]) for name in PETS] == [2, 0, 5]
    right = sum(counts[name][number] for number, name in enumerate(PETS))
    assert got["scores"]["top1"] == pytest.approx(100 * right / 7)
    call(evaluate.main, path, "data=folder", f"data.root='{fog}'", "--out", tmp_path / "again")
    assert record(tmp_path / "again")[0]["scores"] == got["scores"]  # same image size
    shutil.rmtree(pets / "train")  # a folder with only val/ can be evaluated
    call(evaluate.main, path, f"data.root='{pets}'")
    assert "pets val" in capsys.readouterr().out


def test_a_folder_is_read_by_the_white_of_the_training(tmp_path):
    data = {"_target_": "data.load_folder", "name": "deep", "size": 8, "val_size": 0}
    data |= {"white": 30000.0, "skip_damaged": False, "max_pixels": 1000}
    network = models.load(save(tmp_path / "net", describe(settings={"data": data})))
    for words in ([], ["data=folder"]):
        cfg = trained.compose_settings(network, "RUN", [*words, "data.root=x"], ())
        assert cfg.data.white == 30000
        cfg = trained.compose_settings(
            network, "RUN", [*words, "data.root=x", "data.white=4095"], ()
        )
        assert cfg.data.white == 4095


@pytest.mark.parametrize(
    ("val_size", "place", "words", "line"),
    [
        (0, "pets", ["data.val_size=4"], "data.val_size=4: .* was trained with data.val_size=0"),
        (4, "pets", ["data.val_size=5"], "data.val_size=5: .* was trained with data.val_size=4"),
        (0, "pets/train", [], "has the images that the network was trained on"),
        (4, "pets/train", ["data.val_size=0"], "has the images that the network was trained on"),
        (4, "more", [], "data.root=.*more has other images than those of"),
        (4, "pets", ["data.size=9"], "data.size=9: .* was trained with data.size=8"),
        (0, "strange", [], "class 'cow', which the network does not have; the network has 3"),
        (0, "train only", [], "it has no folder val/, valid/ or test/ to evaluate on"),
        (0, "nowhere", [], "there is no such folder"),
    ],
)
def test_images_that_may_have_been_trained_on_are_refused(
    pets, tmp_path, capsys, val_size, place, words, line
):
    path = network_of(pets, tmp_path / "net", val_size)
    shutil.copytree(pets, tmp_path / "more")
    write(tmp_path / "more" / "train" / "ant" / "new.png", seed=7)
    write(tmp_path / "strange" / "cow" / "0.png")
    shutil.copytree(pets / "train", tmp_path / "train only" / "train")
    said = refused(capsys, evaluate.main, path, f"data.root='{tmp_path / place}'", *words)
    assert re.search(line, said), said


def test_a_part_of_the_training_images_is_known_by_its_pixels(pets, tmp_path, caplog, capsys):
    """Names and format may differ; the run's settings locate the original folder."""
    path, out = network_of(pets, tmp_path / "net", 4), tmp_path / "out"
    dataset = load_folder(str(pets), "pets", 8, 4)
    held_out = {tuple(one.flatten().tolist()) for one in dataset.evaluation.pixels}
    copies = tmp_path / "copies"
    for number, file in enumerate(sorted((pets / "train").rglob("*.png"))):
        copy = copies / file.parent.name / f"{number}.bmp"
        copy.parent.mkdir(parents=True, exist_ok=True)
        Image.open(file).save(copy)
    write(copies / "ant" / "new.png", seed=999)
    words = ["data=folder", f"data.root='{copies}'", "--out", out]

    call(evaluate.main, path, *words)  # the weights alone do not say where the folder is
    line = "net: not compared with the images that it was trained on: "
    assert f"{line}the images in {copies} differ" in caplog.text
    caplog.clear()
    (tmp_path / "net" / ".hydra").mkdir()
    settings = tmp_path / "net" / ".hydra" / "config.yaml"
    settings.write_text(json.dumps({"data": {"root": str(pets)}}))
    said = refused(capsys, evaluate.main, path, *words)
    assert "14 of 19 images of data.root=" in said
    for file in copies.rglob("*.bmp"):
        with Image.open(file) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (8, 8), method=Image.Resampling.BICUBIC)
        if tuple(np.array(fitted).flatten().tolist()) not in held_out:
            file.unlink()
    call(evaluate.main, path, *words)  # the run's held-out images and a new one
    assert record(out)[0]["images"] == 5
    assert "not compared" not in caplog.text
    write(pets / "train" / "ant" / "0.png", seed=77)
    trained._own_images.cache_clear()  # as in a new process
    call(evaluate.main, path, *words)
    assert f"{line}the images in {pets} differ" in caplog.text
    shutil.rmtree(pets)
    caplog.clear()
    trained._own_images.cache_clear()
    call(evaluate.main, path, *words)
    assert f"{line}the location of pets is unknown" in caplog.text


def test_training_images_that_were_written_to_files_are_known(folder, tmp_path, caplog, capsys):
    for number, (pixels, label) in enumerate(
        zip(LOOKUP.train.pixels[:5], LOOKUP.train.labels[:5].tolist(), strict=True)
    ):
        file = tmp_path / "files" / LOOKUP.class_names[label] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(file)
    words = [folder / "aa=1", "data=folder", f"data.root='{tmp_path / 'files'}'"]
    assert "5 of 5 images of data.root=" in refused(capsys, evaluate.main, *words)
    call(evaluate.main, *words, "data.size=33")
    assert "not compared with the images that it was trained on: those are 32x32" in caplog.text


def test_an_image_on_which_the_run_was_evaluated_is_scored_as_the_run_has_done(pets, tmp_path):
    shutil.copy(pets / "train" / "ant" / "0.png", pets / "val" / "ant" / "again.png")
    path = network_of(pets, tmp_path / "net", 0)
    call(evaluate.main, path, f"data.root='{pets}'", "--out", tmp_path / "out")
    assert record(tmp_path / "out")[0]["images"] == 4


@pytest.mark.parametrize(
    ("words", "images"),
    [
        ([], 4),
        (["data.val_size=0"], 3),
        (["data=folder", "data.val_size=4", "data.max_pixels=1000"], 4),
    ],
    ids=str,
)
def test_held_out_images_are_the_runs_own(pets, tmp_path, words, images):
    path = network_of(pets, tmp_path / "net", 4)
    call(evaluate.main, path, f"data.root='{pets}'", *words, "--out", tmp_path / "out")
    (got,) = record(tmp_path / "out")
    assert (got["data"], got["images"]) == ("pets val", images)


def test_recall_and_precision_by_counting():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 6, generator=generator)
    logits[:, 4] = -9  # is never predicted
    labels = torch.randint(5, (40,), generator=generator)  # class 5 has no images
    confusion = Confusion(6)
    confusion.add(logits[:13], labels[:13])
    confusion.add(logits[13:], labels[13:])
    pairs = [
        (label, max(range(6), key=lambda c: row[c]))
        for label, row in zip(labels.tolist(), logits.tolist(), strict=True)
    ]
    for c, got in enumerate(confusion.by_class()):
        of = [p for label, p in pairs if label == c]
        as_ = [label for label, p in pairs if p == c]
        recall = 100 * of.count(c) / len(of) if of else None
        precision = 100 * as_.count(c) / len(as_) if as_ else None
        assert got == ClassScore(len(of), len(as_), recall, precision)
        for other in range(6):
            assert confusion.counts[c, other] == pairs.count((c, other))
    assert confusion.by_class()[5].recall is None
    assert confusion.by_class()[4].precision is None


def test_the_worst_classes_come_first():
    classes = {
        "a": ClassScore(4, 5, 75.0, 60.0),
        "b": ClassScore(0, 2, None, 0.0),
        "c": ClassScore(5, 2, 20.0, 50.0),
        "d": ClassScore(1, 0, 0.0, None),
        "e": ClassScore(1, 2, 100.0, 50.0),
    }
    counts = [[3, 1, 0, 0, 0], [0] * 5, [1, 1, 1, 0, 2], [1, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    one = evaluate.Evaluation("x", "y", 11, {}, {}, classes, counts, 0, [], 0, "float32")
    lines = [line.split() for line in evaluate.worst_classes(one)]
    assert lines[1:] == [
        ["d", "1", "0.00", DASH, "a", "(100.00", "%)"],
        ["c", "5", "20.00", "50.00", "e", "(40.00", "%)"],
        ["a", "4", "75.00", "60.00", "b", "(25.00", "%)"],
        ["1", "of", "5", "classes", "has", "no", "images:", "b"],
    ]


# ---- Calibration --------------------------------------------------------------------------------


def test_the_calibration_by_hand():
    """Confidences 0.5, 0.5, 0.75 and 1 in bins of a quarter; an edge belongs to the lower bin."""
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
    """Equal logits give exact confidences, without rounding: 1, a half and a quarter."""
    calibration = Calibration(bins=4)
    for classes in (1, 2, 4):
        calibration.add(torch.zeros(1, classes), torch.tensor([0]))
    assert [row["images"] for row in calibration.rows()] == [1, 1, 0, 1]


def test_a_bin_is_whole_however_its_images_came():
    """Three bins are off by +0.2, -0.3 and +0.1, each over two batches; errors must not cancel."""
    calibration = Calibration(bins=4)
    for right in (0, 1):  # one image of each bin is right, and one is not
        sure = torch.tensor([0.3, 0.8, 0.6], dtype=torch.float64)
        scores = torch.stack([sure, *[(1 - sure) / 9] * 9], dim=1)
        calibration.add(scores.log(), torch.full((3,), 1 - right))
    assert calibration.expected_error() == pytest.approx((0.2 + 0.3 + 0.1) / 3)


def test_outputs_that_are_not_finite_are_no_score(folder, tmp_path, capsys):
    file = folder / "plain=1" / "weights.safetensors"
    tensors = safetensors.torch.load_file(file)
    huge = {name: t * 1e30 if t.dim() == 4 else t for name, t in tensors.items()}
    safetensors.torch.save_file(huge, file)
    words = [folder / "plain=1", "--out", tmp_path / "out"]
    line = refused(capsys, evaluate.main, *words)
    assert "plain=1: the network's outputs are not finite" in line
    assert not (tmp_path / "out").exists()


# ---- One-line errors ----------------------------------------------------------------------------

WRONG = [
    (["nowhere"], "there is no nowhere"),
    (["runs=nowhere/x"], "no network given; there is no runs=nowhere/x"),
    (["{run}", "runs/a=1/seed=0"], "there is no runs/a=1/seed=0"),
    (["data.val_size=0"], "no network given; there is no data.val_size=0"),
    (["{run}", "epochs=3"], "epochs: not a setting here; choose from data, device, precision"),
    (["{run}", "attention=none"], "attention: not a setting here"),
    (["{run}", "+data.color=1"], "+data.color: not a setting here"),
    (["{run}", "data=cifar11"], "{run}: .*cifar11"),
    (["{run}", "data.color=1"], "{run}: data.color: unknown setting color; data has train"),
    (["{run}", "data.val_size=x"], "{run}: data.val_size: .*'x'"),
    (
        ["{run}", "data.val_size=5"],
        "data.val_size=5: {run} was trained with data.val_size=12, .* leave it out, or give 0",
    ),
    (["{run}", "data=lookup", "data.val_size=5"], "data.val_size=5: {run} was trained with"),
    (["{run}", "data.val_size=-1"], "data.val_size=-1: {run} was trained with"),
    (["{run}", "data.train_size=44"], "data.train_size=44: {run} was trained with .*=32"),
    (["{run}", "data=lookup", "data.val_size=12"], "data.train_size=10000: {run} was trained"),
    (["{run}", "eval_batch_size=0"], "batch_size=0 is below 1"),
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
    other = description.model_copy(update={"class_names": renamed})
    names = {
        "run": folder / "plain=1",
        "page": tmp_path / "page.html",
        "other": save(tmp_path / "other", other),
    }
    names["page"].write_text("")
    before = sorted(path for path in tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    words = [word.format(**names) for word in words]
    said = refused(capsys, evaluate.main, *words)
    pattern = line.replace("{run}", re.escape(str(names["run"])))
    pattern = pattern.replace("{other}", re.escape(str(names["other"])))
    assert re.search(pattern.replace("+data", r"\+data"), said), said
    assert sorted(path for path in tmp_path.rglob("*")) == before
