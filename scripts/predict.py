"""Classify images with a trained network.

    python scripts/predict.py outputs/train/RUN picture.jpg folder/
    python scripts/predict.py weights.safetensors folder/ --json > predictions.json

The network is given as for `models.load`: a run's folder, a weights.safetensors or a checkpoint.
Pictures may be of any format and size that Pillow reads; folders are searched at all levels. They
are rotated as their EXIF data say, put on white where they are transparent, scaled in proportion
until they cover the network's image size, and cropped at the center. Gray values of more than 8
bits are divided by the data.white that the network was trained with. Prints the most likely classes
of each picture with their probabilities, as a table, --json or --csv. A file that is not a picture
is reported on stderr; the others are still classified, and the exit code is 1.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, number, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("network", help="a run's folder, a weights.safetensors or a checkpoint")
    parser.add_argument(
        "pictures", nargs="+", metavar="PICTURE", help="image files, or folders of them"
    )
    parser.add_argument(
        "--top",
        type=number(int, at_least=1),
        default=5,
        metavar="N",
        help="classes to print per image (default: 5)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print JSON")
    form.add_argument("--csv", action="store_true", help="print CSV, a row for each class")


if __name__ == "__main__":
    start(__file__, options)

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

import models
from aaconv import text
from aaconv.text import one_line
from data import Images, evaluation_batches
from data.layout import is_stray
from data.pictures import read_picture, reading_of
from reporting.text import csv_cell, printable
from training import console
from training.device import choose_device
from training.files import csv_text
from training.scores import NOT_FINITE

BATCH_SIZE = 100


class Prediction(NamedTuple):
    """The most likely classes of a picture and their probabilities in [0, 1], highest first."""

    file: str
    classes: list[tuple[str, float]]


def find(words: list[str]) -> list[Path]:
    """Return the files that ``words`` name; for a folder, all files in it but the `is_stray` ones.

    Raises:
        ValueError: if there is no such file, or no file in a folder.
    """
    files: list[Path] = []
    for word in words:
        path = Path(word)
        if not word or not path.exists():  # an empty word would be the current folder
            raise ValueError(f"there is no {word or 'file without a name'}")
        if path.is_file():
            files.append(path)
            continue
        if not path.is_dir():  # opening a named pipe would block forever
            raise ValueError(f"{path} is neither a file nor a folder")
        inside = [file for file in sorted(path.rglob("*")) if file.is_file()]
        inside = [f for f in inside if not any(map(is_stray, f.relative_to(path).parts))]
        if not inside:
            raise ValueError(f"there is no file in {path}")
        files += inside
    return files


def predict(
    trained: models.Trained, files: list[Path], top: int, device: torch.device
) -> Iterator[Prediction | str]:
    """Yield the prediction for each file, in order, or one line that says why there is none."""
    reading = reading_of(trained.description.settings)
    for first in range(0, len(files), BATCH_SIZE):
        read: list[Tensor | str] = [
            _read(file, trained.image_size, reading) for file in files[first : first + BATCH_SIZE]
        ]
        pixels = [picture for picture in read if isinstance(picture, Tensor)]
        rows = iter(_probabilities(trained, torch.stack(pixels).to(device)) if pixels else ())
        for file, picture in zip(files[first:], read, strict=False):
            yield picture if isinstance(picture, str) else _best(file, next(rows), trained, top)


def _read(file: Path, size: tuple[int, int], reading: dict[str, Any]) -> Tensor | str:
    try:
        return read_picture(file, size, **reading)
    except (ValueError, OSError) as error:
        return f"{file}: {one_line(error)}"


@torch.no_grad()
def _probabilities(trained: models.Trained, pixels: Tensor) -> Tensor:
    images = Images(pixels, torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device))
    mean, std = trained.description.mean, trained.description.std
    batches = evaluation_batches(images, BATCH_SIZE, mean, std)
    probabilities = torch.cat([trained.network(x).softmax(dim=1).cpu() for x, _ in batches])
    if not probabilities.isfinite().all():
        raise ValueError(NOT_FINITE)
    return probabilities


def _best(file: Path, probabilities: Tensor, trained: models.Trained, top: int) -> Prediction:
    values, indices = probabilities.topk(min(top, len(probabilities)))
    names = [trained.class_names[index] for index in indices.tolist()]
    return Prediction(str(file), list(zip(names, values.tolist(), strict=True)))


def as_table(predictions: list[Prediction]) -> str:
    """A line for each picture."""
    rows = [
        [one.file, ", ".join(f"{name} {100 * share:.1f} %" for name, share in one.classes)]
        for one in predictions
    ]
    return printable("\n".join(text.table(rows, "ll")))


def as_json(predictions: list[Prediction]) -> str:
    """A list of objects with ``file`` and ``predictions``."""
    rows: list[dict[str, Any]] = [
        {
            "file": printable(one.file),
            "predictions": [
                {"class": printable(name), "probability": p} for name, p in one.classes
            ],
        }
        for one in predictions
    ]
    return json.dumps(rows, indent=1, ensure_ascii=False)


def as_csv(predictions: list[Prediction]) -> str:
    """A row for each class of each picture; a leading ' keeps spreadsheets from computing cells."""
    rows = [
        [csv_cell(one.file), rank, csv_cell(name), probability]
        for one in predictions
        for rank, (name, probability) in enumerate(one.classes, start=1)
    ]
    return csv_text([["file", "rank", "class", "probability"], *rows])


@command(options, errors=(RuntimeError,))
def main(args: argparse.Namespace) -> None:
    device = choose_device(args.device)
    files = find(args.pictures)
    trained = models.load(args.network, device)
    results = predict(trained, files, args.top, device)
    # The bar is shown only on a terminal (None) and only after one second.
    done = list(tqdm(results, "pictures", len(files), leave=False, disable=None, delay=1))
    predictions = [one for one in done if isinstance(one, Prediction)]
    if args.json:
        print(as_json(predictions))
    elif args.csv:
        print(as_csv(predictions), end="")
    elif predictions:
        print(as_table(predictions))
    faults = [one for one in done if isinstance(one, str)]
    for fault in faults:
        console.print_error("predict.py", printable(fault))
    sys.exit(1 if faults else 0)
