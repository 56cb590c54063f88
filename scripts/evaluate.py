"""Score trained networks again: top-1, top-5, classes, calibration, speed.

    python scripts/evaluate.py outputs/train/RUN
    python scripts/evaluate.py RUN RUN2/last.pt weights.safetensors --out evaluation
    python scripts/evaluate.py RUN device=cpu eval_batch_size=100 data.root=FOLDER

Networks are given as for `models.load`: a run's folder, a weights.safetensors or a checkpoint. Each
is evaluated on the images that its run was evaluated on, in the precision in which it was trained;
that gives the run's own scores. What has an = is a setting, for all of them: another `data` must
have the same classes. --out writes evaluation.json, with the accuracy of each class and the bins of
the confidence, and a reliability diagram of each network.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, paths_and_overrides, start


def options(parser: argparse.ArgumentParser) -> None:
    """The command line."""
    parser.add_argument(
        "words", nargs="+", metavar="NETWORK|NAME=VALUE", help="networks, and settings for all"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the details")


if __name__ == "__main__":
    start(__file__, options)

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import models
from aaconv import text
from data import evaluation_batches
from reporting.text import printable
from training import console
from training.device import choose_device, choose_dtype, to_device
from training.files import write_texts
from training.scores import Calibration, evaluate
from training.trained import compose_settings, load_data

# What may be set here; all else is the network's own.
SETTINGS = ("device", "precision", "eval_batch_size", "channels_last")


@dataclass(frozen=True)
class Evaluation:
    """What one network has come to; accuracies in percent, ``ece`` in [0, 1]."""

    path: str
    data: str
    images: int
    scores: dict[str, float]
    per_class_top1: dict[str, float | None]
    ece: float
    bins: list[dict[str, float | None]]
    images_per_s: float
    precision: str


def evaluate_file(path: str, overrides: list[str]) -> Evaluation:
    """Load a network and score it.

    Raises:
        ValueError, FileNotFoundError: see `models.load`, `compose_settings` and `load_data`.
    """
    trained = models.load(path)
    cfg = compose_settings(trained, path, overrides, SETTINGS)
    device = choose_device(cfg.device)
    dtype = choose_dtype(cfg.precision.name, device)
    dataset = load_data(cfg, trained, path).to(device)
    model = to_device(trained.network, device, cfg.channels_last)
    calibration = Calibration()
    asked: list[Tensor] = []  # the labels of the batch that the network is given

    def recorded(images: Tensor) -> Tensor:
        logits: Tensor = model(images)
        calibration.add(logits.detach().float(), asked.pop())
        return logits

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        # The network was trained with the mean and the deviation of its own images.
        mean, std = (tuple(getattr(trained.description, name)) for name in ("mean", "std"))
        for images, labels in evaluation_batches(
            dataset.evaluation, cfg.eval_batch_size, mean, std
        ):
            asked.append(labels)
            yield images, labels

    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    started = time.perf_counter()
    scores, per_class = evaluate(recorded, batches(), autocast)
    seconds = time.perf_counter() - started
    return Evaluation(
        path=path,
        data=f"{dataset.name} {dataset.evaluated_on}",
        images=len(dataset.evaluation),
        scores=scores,
        per_class_top1=dict(zip(trained.class_names, per_class, strict=True)),
        ece=calibration.expected_error(),
        bins=calibration.rows(),
        images_per_s=len(dataset.evaluation) / seconds,
        precision=str(dtype).removeprefix("torch."),
    )


def table(evaluations: list[Evaluation]) -> list[str]:
    """A line for each network, below a line of headings."""
    lines = [["network", "data", "images", "top-1 %", "top-5 %", "loss", "ECE %", "images/s"]]
    for one in evaluations:
        scores = [f"{one.scores['top1']:.2f}", f"{one.scores['top5']:.2f}"]
        scores += [f"{one.scores['loss']:.4f}", f"{100 * one.ece:.2f}", f"{one.images_per_s:.0f}"]
        lines.append([one.path, one.data, str(one.images), *scores])
    return text.table(lines, "llrrrrrr")


def written(evaluations: list[Evaluation], out: Path) -> dict[Path, str]:
    """The files of --out: evaluation.json, and for each network a diagram, by its number."""
    from reporting import figures  # which needs matplotlib

    rows: list[dict[str, Any]] = [vars(one) for one in evaluations]
    texts = {out / "evaluation.json": json.dumps(rows, indent=1) + "\n"}
    for number, one in enumerate(evaluations, start=1):
        name = "reliability.svg" if len(evaluations) == 1 else f"reliability-{number}.svg"
        texts[out / name] = figures.as_svg(figures.reliability(one.bins, one.ece))
    return texts


@command(options, code=1, errors=(RuntimeError,))
def main(args: argparse.Namespace) -> None:
    paths, overrides = paths_and_overrides(args.words)
    if not paths:
        console.stop("evaluate.py", f"no network given; there is no {overrides[0]}")
    evaluations = [evaluate_file(path, overrides) for path in paths]
    print(printable("\n".join(table(evaluations))))
    if args.out is not None:
        texts = written(evaluations, args.out)
        write_texts(texts)
        print(printable(f"written: {', '.join(map(str, texts))}"))
