"""Evaluate trained networks: top-1, top-5, classes, calibration, speed.

    python scripts/evaluate.py outputs/train/RUN
    python scripts/evaluate.py RUN RUN2/last.pt weights.safetensors --out evaluation
    python scripts/evaluate.py RUN device=cpu eval_batch_size=100 data.root=FOLDER

Networks are given as for `models.load`: a run's folder, a weights.safetensors or a checkpoint. Each
is evaluated on the images that its run was evaluated on, in the precision that it was trained in;
that gives the run's own scores. NAME=VALUE is a setting for all networks. Another `data` must have
the same classes. A folder, data.root=DIR, may lack some of them; its val/ or test/ is used or, if
it has neither, the folders of the classes themselves. A network is never scored on images that it
was trained on: a data.val_size other than its own or 0 is refused.

--out writes evaluation.json, with recall and precision of each class and the confidence bins, and
for each network the confusion matrix as CSV and SVG and a reliability diagram.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import check_out, command, paths_and_overrides, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument(
        "words", nargs="+", metavar="NETWORK|NAME=VALUE", help="networks, and settings for all"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the details")


if __name__ == "__main__":
    start(__file__, options)

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch

import models
from aaconv import text
from data import evaluation_batches
from reporting.text import DASH, csv_cell, first_few, printable
from training.assemble import try_backends
from training.device import choose_device, choose_dtype, dtype_name, to_device
from training.files import csv_text, write_texts
from training.scores import NOT_FINITE, Calibration, ClassScore, Confusion, evaluate
from training.trained import check_not_trained_on, compose_settings, load_data

# Settings that may be given here; all others are the network's own.
SETTINGS = ("device", "precision", "eval_batch_size", "channels_last")
# Number of classes shown for each network.
WORST = 3


@dataclass(frozen=True)
class Evaluation:
    """The scores of one network; accuracies in percent, ``ece`` in [0, 1]."""

    path: str
    data: str
    images: int
    scores: dict[str, float]
    per_class_top1: dict[str, float | None]
    classes: dict[str, ClassScore]
    confusion: list[list[int]]
    ece: float
    bins: list[dict[str, float | None]]
    images_per_s: float
    precision: str


def evaluate_file(path: str, overrides: list[str]) -> Evaluation:
    """Load a network and score it.

    Raises:
        ValueError, FileNotFoundError: see `models.load`, `compose_settings`, `load_data` and
            `check_not_trained_on`.
    """
    trained = models.load(path)
    cfg = compose_settings(trained, path, overrides, SETTINGS)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.precision.name, device)
    dataset = load_data(cfg, trained, path)
    check_not_trained_on(dataset, cfg, trained, path)
    images = dataset.evaluation.to(device)
    model = to_device(trained.network, device, cfg.channels_last)
    # The mean and standard deviation that the network was trained with.
    mean, std = trained.description.mean, trained.description.std
    batches = evaluation_batches(images, cfg.eval_batch_size, mean, std)
    calibration, confusion = Calibration(), Confusion(len(trained.class_names))
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    # One-time work must not count toward the speed.
    try_backends(model, evaluation_batches(images, 1, mean, std), autocast)
    started = time.perf_counter()
    scores, per_class = evaluate(model, batches, autocast, [calibration.add, confusion.add])
    seconds = time.perf_counter() - started
    if not math.isfinite(scores["loss"]):
        raise ValueError(f"{path}: {NOT_FINITE}")
    return Evaluation(
        path=path,
        data=f"{dataset.name} {dataset.evaluated_on}",
        images=len(images),
        scores=scores,
        per_class_top1=dict(zip(trained.class_names, per_class, strict=True)),
        classes=dict(zip(trained.class_names, confusion.by_class(), strict=True)),
        confusion=confusion.counts.tolist(),
        ece=calibration.expected_error(),
        bins=calibration.rows(),
        images_per_s=len(images) / seconds,
        precision=dtype_name(dtype),
    )


def table(evaluations: list[Evaluation]) -> list[str]:
    """A line for each network, below a line of headings."""
    lines = [["network", "data", "images", "top-1 %", "top-5 %", "loss", "ECE %", "images/s"]]
    for one in evaluations:
        scores = [f"{one.scores['top1']:.2f}", f"{one.scores['top5']:.2f}"]
        scores += [f"{one.scores['loss']:.4f}", f"{100 * one.ece:.2f}", f"{one.images_per_s:.0f}"]
        lines.append([one.path, one.data, str(one.images), *scores])
    return text.table(lines, "llrrrrrr")


def worst_classes(evaluation: Evaluation) -> list[str]:
    """The classes with the lowest recall as a table, and a line on those without images."""
    names, classes = list(evaluation.classes), evaluation.classes
    seen = [name for name in names if classes[name].images]
    lines = [["lowest recall", "images", "recall %", "precision %", "most often predicted as"]]
    for name in sorted(seen, key=lambda name: classes[name].recall or 0)[:WORST]:
        score, row = classes[name], evaluation.confusion[names.index(name)]
        others = {other: n for other, n in zip(names, row, strict=True) if n and other != name}
        most = max(others, key=others.__getitem__, default="")
        precision = DASH if score.precision is None else f"{score.precision:.2f}"
        mistake = f"{most} ({100 * others[most] / score.images:.2f} %)" if most else ""
        lines.append([name, f"{score.images}", f"{score.recall:.2f}", precision, mistake])
    absent = [name for name in names if name not in seen]
    verb = "has" if len(absent) == 1 else "have"
    absent_line = f"{len(absent)} of {len(names)} classes {verb} no images: {first_few(absent, 20)}"
    return text.table(lines, "lrrrl") + ([absent_line] if absent else [])


def written(evaluations: list[Evaluation], out: Path) -> dict[Path, str]:
    """Return the files of --out: evaluation.json and, by number, those of each network."""
    from reporting import figures  # needs matplotlib

    texts = {
        out / "evaluation.json": json.dumps([*map(as_json, evaluations)], indent=1, allow_nan=False)
        + "\n"
    }
    for number, one in enumerate(evaluations, start=1):
        end = "" if len(evaluations) == 1 else f"-{number}"
        names = list(one.classes)
        cells = list(map(csv_cell, names))
        rows = [[cell, *counts] for cell, counts in zip(cells, one.confusion, strict=True)]
        texts[out / f"confusion{end}.csv"] = csv_text([["true class", *cells], *rows])
        matrix = figures.confusion(one.confusion, names)
        texts[out / f"confusion{end}.svg"] = figures.as_svg(matrix)
        texts[out / f"reliability{end}.svg"] = figures.as_svg(
            figures.reliability(one.bins, one.ece)
        )
    return texts


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return a network's record in evaluation.json; the confusion matrix has its own file."""
    record = {key: value for key, value in vars(evaluation).items() if key != "confusion"}
    classes = {name: score._asdict() for name, score in evaluation.classes.items()}
    return {**record, "classes": classes}


@command(options, errors=(RuntimeError,))
def main(args: argparse.Namespace) -> None:
    paths, overrides = paths_and_overrides(args.words)
    if not paths:
        raise ValueError(f"no network given; there is no {overrides[0]}")
    if args.out is not None:
        check_out(args.out)
    evaluations = [evaluate_file(path, overrides) for path in paths]
    lines = table(evaluations)
    for one in evaluations:
        lines += ["", *([one.path] if len(evaluations) > 1 else []), *worst_classes(one)]
    print(printable("\n".join(lines)))
    if args.out is not None:
        texts = written(evaluations, args.out)
        write_texts(texts)
        print(printable(f"written: {', '.join(map(str, texts))}"))
