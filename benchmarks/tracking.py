"""What watching a run costs, as a part of its training time.

Measured on images of CIFAR's size, with settings as for train.py in --overrides: a training step;
in it the norm of the gradient and the count of correct images; the pictures of attention; the
tables of the end; and one epoch's row given to wandb offline. An epoch is one of 50,000 images in
batches of ``batch_size`` without its evaluation, and the tables are made from 10,000 images, both
extrapolated from fewer.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

import train
from benchmarks import timing
from training import media
from training.compose import compose_config
from training.device import choose_dtype
from training.tracking import track

TRAINING, EVALUATION, EPOCHS = 50_000, 10_000, 30
IMAGES = 1000
OPTIONS = {"overrides": ["model=resnet20", "attention=aa"]}
TOGETHER = ("overrides",)


def build(overrides: list[str], device: torch.device) -> tuple[Any, train.RunState]:
    """Settings and what trains by them, on images that are made up."""
    words = [*overrides, "data=lookup", "data.train_size=2000", f"data.test_size={IMAGES}"]
    cfg = compose_config(words)
    dataset = instantiate(cfg.data, _convert_="all").to(device)
    dtype = choose_dtype(cfg.precision.name, device)
    return cfg, train.build_state(cfg, dataset, train.distributed.world(), device, dtype)


def parts(cfg: Any, state: train.RunState, tracker: Any) -> dict[str, Callable[[], object]]:
    """What is timed, each as a function that does it once."""
    images, labels = next(state.batches.epoch(0))
    grads = [torch.randn_like(p) for p in state.model.parameters()]
    logits = torch.randn(len(labels), state.dataset.num_classes, device=state.device)
    row = {f"metric/{n}": 1.0 for n in range(10)}
    epochs = iter(range(1, 10**6))

    def step() -> None:
        state.model.train()
        train.take_step(cfg, state, images, labels)

    def tables() -> None:
        media.final_media(state.model, state.dataset, cfg.eval_batch_size, state.autocast)

    return {
        "step": step,
        "norm": lambda: torch.nn.utils.get_total_norm(grads),
        "correct": lambda: (logits.argmax(dim=1) == labels).float().mean(),
        "pictures": lambda: media.attention_pictures(state.model, state.dataset),
        "tables": tables,
        "row": lambda: tracker.log(row | {"step": next(epochs)}),
    }


def measure(case: dict[str, Any], device: torch.device, count: int) -> list[dict[str, Any]]:
    """A row for each part."""
    cfg, state = build(case["overrides"], device)
    about: dict[str, Any] = {"entity": None, "tags": [], "config": {}, "run_id": None}
    about |= dict.fromkeys(("project", "group", "name", "job_type"), "bench")
    with (
        tempfile.TemporaryDirectory() as folder,
        track("offline", folder=Path(folder), **about) as tracker,
    ):
        times = timing.rounds(parts(cfg, state, tracker), device, count)
    return [case | row for row in shares(times, cfg.batch_size)]


def shares(times: dict[str, list[float]], batch_size: int) -> list[dict[str, Any]]:
    """The parts with their share of a step, an epoch, or a run of EPOCHS epochs."""
    middle = {name: statistics.median(values) for name, values in times.items()}
    epoch = middle["step"] * TRAINING / batch_size
    run = EPOCHS * epoch
    wholes = {
        "step": ("a step", 1.0),
        "norm": ("a step", middle["norm"] / middle["step"]),
        "correct": ("a step", middle["correct"] / middle["step"]),
        "pictures": (f"{EPOCHS} epochs, three times", 3 * middle["pictures"] / run),
        "tables": (f"{EPOCHS} epochs, once", middle["tables"] * EVALUATION / IMAGES / run),
        "row": ("an epoch", middle["row"] / epoch),
    }
    return [
        {"part": name, "ms": times[name], "of": of, "share": share}
        for name, (of, share) in wholes.items()
    ]


def cells(row: dict[str, Any]) -> dict[str, str]:
    """A part, its time, and what it is a share of."""
    ms, share = timing.spread(row["ms"], digits=3), f"{100 * row['share']:.4f}"
    return {"part": row["part"], "ms": ms, "%": share, "of": row["of"]}
