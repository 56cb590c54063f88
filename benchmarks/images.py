"""Time batches from images that are mapped from the cache, compared with images in memory.

The time is for an epoch of shuffled, augmented batches of `data.Batches`, without a network, from
--mib MiB of random images of --size pixels: held in memory, or mapped by `data.image_cache`, whose
file the system keeps in memory, too, as far as there is room. The time to start is also measured:
mapping and checking a file reads its pixels once.
"""

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks import timing
from data import Augmentation, Batches, Images, image_cache

OPTIONS = {"mib": [256], "size": [32, 224], "batch": [128]}
COLOR = (0.5, 0.5, 0.5)


def epoch(images: Images, batch: int) -> None:
    """Make all batches of an epoch."""
    for _ in Batches(images, batch, Augmentation(4, flip=True), COLOR, COLOR, seed=0).epoch(0):
        pass


def measure(case: dict[str, Any], device: torch.device, count: int) -> list[dict[str, Any]]:
    """Return one row. Raises ValueError for a GPU, to which all images would be copied."""
    if device.type != "cpu":
        raise ValueError(f"--device {device.type}: images are copied there; give --device cpu")
    side = case["size"]
    number = max(case["mib"] * 2**20 // (side * side * 3), case["batch"])
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.zeros(number, dtype=torch.int64)
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(image_cache, "cache_folder", return_value=Path(folder)),
    ):
        blocks = (block.numpy() for block in pixels.split(256))
        if not image_cache.store("bench", blocks, lambda: {"images": number}, pixels.nbytes):
            raise ValueError(f"{folder} has no room for {pixels.nbytes >> 20} MiB")
        kept = image_cache.load("bench", (side, side))
        assert kept is not None
        held, mapped = (Images(tensor, labels) for tensor in (pixels, kept[0]))
        steps = {
            "memory": lambda: epoch(held, case["batch"]),
            "mapped": lambda: epoch(mapped, case["batch"]),
            "begin": lambda: image_cache.load("bench", (side, side)),
        }
        return [{**case, "images": number, "ms": timing.rounds(steps, device, count)}]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """Times of an epoch of batches, their ratio, and the time to start."""
    ms = row["ms"]
    return {
        "images": f"{row['images']}",
        "size": f"{row['size']}x{row['size']}",
        "MiB": f"{row['mib']}",
        "in memory ms": timing.spread(ms["memory"]),
        "mapped ms": timing.spread(ms["mapped"]),
        "mapped / in memory": f"{timing.ratio(ms['mapped'], ms['memory']):.2f}",
        "to map and check ms": timing.spread(ms["begin"]),
    }
