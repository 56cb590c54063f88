"""Time a training step of torchvision's networks, plain and after `aaconv.augment_`.

    python scripts/bench_augment.py [--device cpu] [--models resnet50] [--batch 2] [--size 224]

A step is forward, loss, backward and optimizer on random images. "pooled" is `augment_` by its
defaults, which pool the attention on 28x28 maps as the paper does, "full" has pool=1. Times are
medians (minimum to maximum) of interleaved rounds, and the ratio to plain is the median of the
rounds' ratios; memory is the peak of a new process above what was allocated before the step. Writes
bench_augment.md and bench_augment.json.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aaconv import AugmentedConv, augment_
from data import vision
from reporting import timing
from training.device import choose_device, to_device

assert vision.datasets  # torchvision can be imported from now on
CLASSES = 1000
VARIANTS: dict[str, dict[str, Any] | None] = {"plain": None, "pooled": {}, "full": {"pool": 1}}


def build(case: dict[str, Any]) -> nn.Module:
    """The network of ``case``, augmented if its variant is."""
    from torchvision import models

    torch.manual_seed(0)
    network = models.get_model(case["model"], weights=None)
    options = VARIANTS[case["variant"]]
    if options is not None:
        augment_(network, torch.zeros(1, 3, case["size"], case["size"]), **options)
    for layer in network.modules():
        if isinstance(layer, AugmentedConv):
            layer.backend = case["backend"]
    return network


def training_step(case: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """A function that takes one training step of ``case``."""
    network = to_device(build(case), device, case["channels_last"])
    images = torch.randn(case["batch"], 3, case["size"], case["size"], device=device)
    if case["channels_last"]:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (case["batch"],), device=device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9)

    def step() -> None:
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def flops(case: dict[str, Any]) -> int:
    """FLOPs of a forward pass of one image, two per multiply-add."""
    network = build(case).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, case["size"], case["size"], device="meta"))
    return counter.get_total_flops()


def measure(
    model: str, shared: dict[str, Any], device: torch.device, count: int
) -> list[dict[str, Any]]:
    """A row for each variant of one network."""
    cases = {variant: {"model": model, "variant": variant, **shared} for variant in VARIANTS}
    steps = {variant: training_step(case, device) for variant, case in cases.items()}
    times = timing.rounds(steps, device, count)
    return [
        case
        | {
            "parameters": sum(p.numel() for p in build(case).parameters()),
            "flops": flops(case),
            "step_ms": times[variant],
            "peak_mib": timing.peak(training_step, case, str(device)),
        }
        for variant, case in cases.items()
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the plain network."""
    header = ["network", "attention", "M parameters", "GFLOPs", "step ms", "to plain", "peak MiB"]
    header.append("to plain")
    lines = []
    for row in rows:
        plain = next(r for r in rows if (r["model"], r["variant"]) == (row["model"], "plain"))
        pairs = zip(row["step_ms"], plain["step_ms"], strict=True)
        ratio = statistics.median(own / of_plain for own, of_plain in pairs)
        lines.append(
            [
                row["model"],
                row["variant"],
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['flops'] / 1e9:.2f}",
                timing.spread(row["step_ms"]),
                f"{ratio:.2f}",
                f"{row['peak_mib']:.0f}",
                f"{row['peak_mib'] / plain['peak_mib']:.2f}",
            ]
        )
    return timing.markdown(header, lines, text_columns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", default=["resnet50"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument(
        "--backend", default="auto", help="backend of the attention, see aaconv.attention_2d"
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    names = ("batch", "size", "backend", "channels_last")
    shared = {name: getattr(arguments, name) for name in names}
    rows = [
        row
        for model in arguments.models
        for row in measure(model, shared, device, arguments.rounds)
    ]
    about = timing.facts(device) | {"rounds": arguments.rounds}
    print(timing.write(arguments.out, "bench_augment", about, rows, table(rows)))


if __name__ == "__main__":
    main()
