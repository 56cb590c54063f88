"""Time making a batch with each augmentation, compared with a training step on it.

The step is that of `bench step`, timed in the same rounds. An augmentation is an option of its
group with settings, such as rand,mixup=1; settings alone are applied on top of `standard`. An
epoch's random draws are made before its first batch; their time is divided among its batches.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks import step, timing
from benchmarks.step import Case
from data import Batches, Images
from training.compose import compose_config, make

ALL = ["none", "standard", "padding=reflect", "flip=alternating", "cutout", "erasing=1"]
ALL += ["trivial", "rand", "auto", "mixup=1", "cutmix=1"]
OPTIONS = {
    "augmentation": ALL,
    "model": ["resnet20"],
    "batch": [128],
    "size": [32],
    "precision": ["auto"],
    "images": [50_000],
}
CHOICES = {"precision": step.CHOICES["precision"]}
TOGETHER = ("augmentation",)
STEP = "step"


def overrides(word: str) -> list[str]:
    """Return the settings of ``word``: OPTION,NAME=VALUE,... with `standard` as default option."""
    option, *settings = word.split(",")
    if "=" in option:
        option, settings = "standard", [option, *settings]
    return [f"augmentation={option}", *(f"augmentation.{setting}" for setting in settings)]


def make_batches(case: Case, augmentation: str, device: torch.device) -> Batches:
    """Return batches of random images."""
    generator = torch.Generator().manual_seed(0)
    shape = (case["images"], case["size"], case["size"], 3)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(100, shape[:1], generator=generator)
    return Batches(
        Images(pixels, labels).to(device),
        case["batch"],
        make(compose_config(overrides(augmentation)).augmentation),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        seed=0,
        num_classes=100,
    )


def endless(batches: Batches) -> Iterator[tuple[Tensor, Tensor]]:
    """Repeat the first epoch forever."""
    while True:
        yield from batches.epoch(0)


def measure(case: Case, device: torch.device, count: int) -> list[Case]:
    """A row for each augmentation."""
    network = case | {"attention": "none", "channels_last": "yes", "compile": "no"}
    steps: dict[str, timing.Step] = {STEP: step.training_step(step.build, network, device)}
    draws: dict[str, timing.Step] = {}
    size = (case["size"], case["size"])
    for name in case["augmentation"]:
        batches = make_batches(case, name, device)
        steps[name] = endless(batches).__next__
        draws[name] = partial(batches.augmentation.draw, case["images"], size, 0, 0)
    made = timing.rounds(steps, device, count)
    drawn = timing.rounds(draws, device, count)
    rows = []
    for name in case["augmentation"]:
        share = case["batch"] / case["images"]
        batch_ms = [a + share * b for a, b in zip(made[name], drawn[name], strict=True)]
        row = case | {"augmentation": name, "batch_ms": batch_ms, "draw_ms": drawn[name]}
        row |= {"step_ms": made[STEP], "of_step": timing.ratio(batch_ms, made[STEP])}
        rows.append(row)
    return rows


def cells(row: Case) -> dict[str, str]:
    """The batch, its share of the step, and the draws of a whole epoch."""
    return {
        "augmentation": row["augmentation"],
        "network": row["model"],
        "batch": str(row["batch"]),
        "step ms": timing.spread(row["step_ms"]),
        "batch ms": timing.spread(row["batch_ms"], 2),
        "of the step": f"{100 * row['of_step']:.1f} %",
        "draws of an epoch ms": timing.spread(row["draw_ms"]),
    }
