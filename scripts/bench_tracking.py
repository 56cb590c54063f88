"""What watching a run costs, as a part of its training time.

    python scripts/bench_tracking.py [--rounds 7] [-- model=resnet20 attention=aa]

Measured in one process, on images of CIFAR's size: a training step; in it the norm of the gradient
and the count of right images; the pictures of attention; the tables of the end; and one epoch's row
given to wandb offline. Times are medians (minimum to maximum) of rounds in which the parts take
turns. An epoch is one of 50,000 images in batches of ``batch_size`` without its evaluation, and the
tables are made from 10,000 images, both extrapolated from fewer.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

import train
from configs.schema import register
from training import distributed, media
from training.device import choose_device, choose_dtype
from training.tracking import track

ROOT = Path(__file__).resolve().parent.parent
TRAINING, EVALUATION, EPOCHS = 50_000, 10_000, 30
IMAGES = 1000
register()


def built(overrides: list[str]) -> tuple[Any, train.RunState]:
    """Settings and what trains by them, on images that are made up."""
    words = [*overrides, "data=lookup", "data.train_size=2000", f"data.test_size={IMAGES}"]
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", words)
    device = choose_device(cfg.device, distributed.world())
    dataset = instantiate(cfg.data, _convert_="all").to(device)
    dtype = choose_dtype(cfg.precision.name, device)
    return cfg, train.build(cfg, dataset, distributed.world(), device, dtype)


def parts(cfg: Any, state: train.RunState, tracker: Any) -> dict[str, Callable[[], object]]:
    """What is timed, each as a function that does it once."""
    images, labels = next(state.batches.epoch(0))
    grads: list[Tensor] = [torch.randn_like(p) for p in state.model.parameters()]
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
        "right": lambda: (logits.argmax(dim=1) == labels).float().mean(),
        "pictures": lambda: media.attention_pictures(state.model, state.dataset),
        "tables": tables,
        "row": lambda: tracker.log(row | {"epoch": next(epochs)}),
    }


def measure(overrides: list[str], rounds: int) -> dict[str, list[float]]:
    """Seconds of each part in each round; a first round is not counted."""
    cfg, state = built(overrides)
    seconds: dict[str, list[float]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        track(
            "offline",
            folder=Path(folder),
            project="bench",
            entity=None,
            group="bench",
            name="bench",
            job_type="bench",
            tags=[],
            config={},
            run_id=None,
        ) as tracker,
    ):
        doing = parts(cfg, state, tracker)
        for _ in range(rounds + 1):
            for name, act in doing.items():
                began = time.perf_counter()
                act()
                if state.device.type == "cuda":
                    torch.cuda.synchronize(state.device)
                seconds.setdefault(name, []).append(time.perf_counter() - began)
    return {name: values[1:] for name, values in seconds.items()}


def lines(seconds: dict[str, list[float]], batch_size: int) -> list[str]:
    """The parts and what they are of a step, an epoch, or a run of EPOCHS epochs."""
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    epoch = middle["step"] * TRAINING / batch_size
    run = EPOCHS * epoch
    shares = {
        "norm": ("of a step", middle["norm"] / middle["step"]),
        "right": ("of a step", middle["right"] / middle["step"]),
        "pictures": (f"of {EPOCHS} epochs, three times", 3 * middle["pictures"] / run),
        "tables": (f"of {EPOCHS} epochs, once", middle["tables"] * EVALUATION / IMAGES / run),
        "row": ("of an epoch", middle["row"] / epoch),
    }
    told = []
    for name, values in seconds.items():
        text = f"{name:<9} {1e3 * middle[name]:9.3f} ms ({1e3 * min(values):.3f} to "
        text += f"{1e3 * max(values):.3f})"
        if name in shares:
            of, share = shares[name]
            text += f": {100 * share:.4f} % {of}"
        told.append(text)
    return told


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("overrides", nargs="*", default=["model=resnet20", "attention=aa"])
    given = parser.parse_args()
    cfg, _ = built(given.overrides)
    print("\n".join(lines(measure(given.overrides, given.rounds), cfg.batch_size)))


if __name__ == "__main__":
    main()
