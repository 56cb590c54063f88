"""Draw what each head of each augmented block attends to, over the image.

    python scripts/visualize.py outputs/train/RUN
    python scripts/visualize.py RUN --images 0 17 photo.jpg --queries 16,16 2,2 --out attention
    python scripts/visualize.py RUN data.root=FOLDER

The network is given as for `models.load`: a run's folder, a weights.safetensors or a checkpoint.
Images are numbers, from 0 on, of images that the run was evaluated on, or files of any format and
size that Pillow reads, fitted as in predict.py. Queries are pixels, ROW,COLUMN, of the image as the
network gets it; without --queries, the position with the sharpest attention is used. Each block
becomes a PNG and an SVG with a row for each image and query and a tile for each head. NAME=VALUE is
a setting of the data set.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import check_out, command, paths_and_overrides, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("network", help="a run's folder, a weights.safetensors or a checkpoint")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="data.NAME=VALUE",
        help="settings of the data set",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="N|FILE",
        help="image numbers or files (default: three, evenly spaced)",
    )
    parser.add_argument(
        "--queries",
        nargs="+",
        metavar="ROW,COLUMN",
        help="pixels to look from (default: where attention is sharpest)",
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: attention/ of the run")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


if __name__ == "__main__":
    start(__file__, options)

import re
from typing import Any

import torch

import models
from aaconv.text import one_line
from data import Images
from data.pictures import read_picture, reading_of
from reporting import figures
from reporting.text import printable
from training.attention_picture import attention_pictures
from training.device import choose_device
from training.files import write_files
from training.media import ATTENTION_IMAGES, attention_images
from training.trained import compose_settings, load_data

# A picture with more rows would be too large for any program to open.
MAX_ROWS = 100


def parse_query(word: str) -> tuple[int, int]:
    """Parse ROW,COLUMN into two integers.

    Raises:
        ValueError: if ``word`` is anything else.
    """
    found = re.fullmatch(r"(\d{1,9}),(\d{1,9})", word)
    if found is None:
        raise ValueError(f"--queries {word}: a query is ROW,COLUMN, two whole numbers such as 16,4")
    return int(found[1]), int(found[2])


def gather(
    trained: models.Trained, path: str, words: list[str] | None, overrides: list[str]
) -> tuple[Images, list[str]]:
    """Return the images that ``words`` name, in order, and a title for each.

    The data set is read only if it is needed.

    Raises:
        ValueError: if there is no such image, or a setting would have no effect.
        OSError: if a file cannot be read.
    """
    numbers = [word for word in words or () if word.isascii() and word.isdecimal()]
    if words is not None and not numbers and overrides:
        raise ValueError(f"{overrides[0]}: none of the --images is from the data set")
    reading = reading_of(trained.description.settings)
    found = {
        word: (_picture(word, trained.image_size, reading), Path(word).name)
        for word in words or ()
        if word not in numbers
    }
    if words is None or numbers:
        dataset = load_data(compose_settings(trained, path, overrides, ()), trained, path)
        if dataset.image_size != trained.image_size:
            sizes = ["x".join(map(str, size)) for size in (dataset.image_size, trained.image_size)]
            raise ValueError(
                f"the images of {dataset.name} are {sizes[0]}, and {path} takes {sizes[1]}"
            )
        if words is None:
            return attention_images(dataset)
        images, classes = attention_images(dataset, [int(number) for number in numbers])
        for number, pixels, label in zip(numbers, images.pixels, classes, strict=True):
            found[number] = pixels, f"{number}: {label}"
    rows = [found[word] for word in words]
    labels = torch.zeros(len(rows), dtype=torch.int64)
    return Images(torch.stack([pixels for pixels, _ in rows]), labels), [name for _, name in rows]


def _picture(word: str, size: tuple[int, int], reading: dict[str, Any]) -> torch.Tensor:
    if not Path(word).exists():
        raise ValueError(f"there is no {word}; an image is a number from 0 on, or a file")
    try:
        return read_picture(Path(word), size, **reading)
    except (ValueError, OSError) as error:
        raise ValueError(f"{word}: {one_line(error)}") from error


def visualize(
    path: str,
    images: list[str] | None,
    queries: list[str] | None,
    overrides: list[str],
    out: Path | None,
    device_name: str,
) -> list[Path]:
    """Write the pictures and return their files; in case of an error, nothing is written.

    Raises:
        ValueError, OSError: with what is wrong, in one line.
    """
    points = None if queries is None else [parse_query(word) for word in queries]
    rows = (ATTENTION_IMAGES if images is None else len(images)) * (
        1 if points is None else len(points)
    )
    if rows > MAX_ROWS:
        raise ValueError(f"{rows} rows, one for each image and query, are more than {MAX_ROWS}")
    device = choose_device(device_name)
    trained = models.load(path, device)
    place = Path(os.path.expanduser(path))
    out = out or (place if place.is_dir() else place.parent) / "attention"
    check_out(out)
    if not models.augmented_layers(trained.network):
        name = trained.description.network["attention"]["name"]
        raise ValueError(f"{path} has no attention to look at (attention={name})")
    found, titles = gather(trained, path, images, overrides)
    about, files = trained.description, {}
    for name, picture in attention_pictures(
        trained.network, found.to(device), titles, about.mean, about.std, points
    ).items():
        figure = figures.attention(name, picture)
        files[out / f"attention-{name}.svg"] = figures.as_svg(figure).encode()
        files[out / f"attention-{name}.png"] = figures.as_png(figure)
    write_files(files)
    return list(files)


@command(options, errors=(RuntimeError,))
def main(args: argparse.Namespace) -> None:
    # NAME=VALUE may also follow --images or --queries, unless a file has that name.
    overrides = list(args.settings)
    given: dict[str, list[str] | None] = {"images": None, "queries": None}
    for name in given:
        if (words := getattr(args, name)) is not None:
            given[name], more = paths_and_overrides(words)
            overrides += more
            if not given[name]:
                raise ValueError(f"--{name} needs at least one value")
    images, queries = given.values()
    files = visualize(args.network, images, queries, overrides, args.out, args.device)
    print(printable("\n".join(f"written: {file}" for file in files)))
