"""Draw how each augmentation changes training images.

    python scripts/augmentation.py --out augmentation.png data.root=FOLDER
    python scripts/augmentation.py --out mine.png data=folder data.root=DIR --show rand,mixup=0.2

The left column has the first images of an epoch, the same in every row, with an option and settings
of the group augmentation; settings without an option are applied on top of `standard`. The right
column has the operations of the policies on the first image, over TrivialAugment's range of
magnitudes. Any NAME=VALUE that does not follow --show is a setting of train.py.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="of train.py")
    parser.add_argument("--show", nargs="+", metavar="WORD", help="default: all there are")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.png", help="the picture")


if __name__ == "__main__":
    start(__file__, options)

import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.batches import ALL, overrides
from data import Augmentation, Batches, Dataset, policies
from reporting import figures
from training.compose import compose_config, make
from training.files import write_files
from training.settings import check_fields

COLUMNS = 8


def augmented(dataset: Dataset, augmentation: Augmentation, seed: int) -> Tensor:
    """The first images of an epoch, (`COLUMNS`, H, W, 3) uint8."""
    mean_and_std = (dataset.mean, dataset.std)
    batches = Batches(
        dataset.train, COLUMNS, augmentation, *mean_and_std, seed, num_classes=dataset.num_classes
    )
    images, _ = next(batches.epoch(0))
    mean, std = torch.tensor(dataset.mean), torch.tensor(dataset.std)
    return (255 * (images.permute(0, 2, 3, 1) * std + mean)).round().clamp(0, 255).byte()


def operations(image: Tensor) -> dict[str, Tensor]:
    """``image`` (H, W, 3) uint8 after each operation, at `COLUMNS` magnitudes."""
    pixels = image.expand(COLUMNS, -1, -1, -1)
    table = policies.magnitudes(policies.MAX_MAGNITUDE + 1, (image.shape[0], image.shape[1]), True)
    rows = {}
    for (name, change), weak_to_strong in zip(policies.OPERATIONS.items(), table, strict=True):
        if name in policies.SIGNED:
            weak_to_strong = torch.cat([-weak_to_strong.flip(0), weak_to_strong[1:]])
        chosen = torch.linspace(0, len(weak_to_strong) - 1, COLUMNS).round().long()
        rows[name] = change(pixels, weak_to_strong[chosen])
    del rows["Identity"]
    return rows


@figures.style()
def draw(left: dict[str, Tensor], right: dict[str, Tensor]) -> Figure:
    """Draw two columns of rows of images, each row with its name."""
    rows = max(len(left), len(right))
    figure = Figure(figsize=(9, 0.61 * rows), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for column, named in zip(axes.T, (left, right), strict=True):
        for ax in column:
            ax.axis("off")
        for ax, (name, images) in zip(column, named.items(), strict=False):
            gap = images.new_full((images.shape[1], 2, 3), 255)
            row = torch.cat([part for image in images for part in (image, gap)], dim=1)
            ax.imshow(row[:, :-2].numpy(), interpolation="nearest")
            ax.set_title(name, fontsize=7, pad=2)
    return figure


@command(options)
def main(args: argparse.Namespace) -> None:
    words = args.show or ALL
    if args.out.suffix != ".png":
        raise ValueError(f"--out {args.out}: the picture is a PNG file; give a name with .png")
    settings = {word: compose_config([*args.settings, *overrides(word)]) for word in words}
    for cfg in settings.values():
        check_fields(cfg)
    augmentations = {word: make(cfg.augmentation) for word, cfg in settings.items()}
    cfg = next(iter(settings.values()))
    dataset = make(cfg.data)
    if len(dataset.train) < COLUMNS:
        raise ValueError(
            f"{dataset.name} has {len(dataset.train)} training images; {COLUMNS} are drawn"
        )
    left = {word: augmented(dataset, how, cfg.seed) for word, how in augmentations.items()}
    right = operations(augmented(dataset, Augmentation(), cfg.seed)[0])
    write_files({args.out: figures.as_png(draw(left, right))})
    print(f"written: {args.out}")
