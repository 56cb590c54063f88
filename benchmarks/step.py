"""Time a training step of the networks in configs/, with and without attention.

A step is forward, loss, backward and optimizer on random images, for CIFAR-100 networks. Memory
is the peak of a new process above what was allocated before the step; ratios are to the first
--attention. GFLOPs are those of a forward pass of one image, GFLOP/s those of the whole step.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import timing
from models import count_flops, count_parameters
from training.compose import compose_config
from training.device import choose_dtype, compiled, to_device
from training.settings import build_model

Case = dict[str, Any]
Build = Callable[[Case], nn.Module]
OPTIONS: dict[str, list[Any]] = {
    "model": ["resnet20", "wrn16_4", "wrn28_10"],
    "attention": ["none", "aa"],
    "batch": [32],
    "size": [32],
    "precision": ["auto"],
    "backend": ["auto"],
    "channels_last": ["no"],
    "compile": ["no"],
}
CHOICES = {
    "precision": ("auto", "fp32", "bf16", "fp16"),
    "channels_last": ("yes", "no"),
    "compile": ("yes", "no"),
}
TOGETHER = ("attention",)


def build(case: Case) -> nn.Module:
    """Return the network that the configs describe."""
    overrides = [f"model={case['model']}", f"attention={case['attention']}"]
    if case["attention"] == "aa":
        overrides.append(f"attention.backend={case['backend']}")
    size = (case["size"], case["size"])
    return build_model(compose_config(overrides), num_classes=100, image_size=size)


def training_step(build: Build, case: Case, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one training step on random images."""
    dtype = choose_dtype(case["precision"], device)
    channels_last = case["channels_last"] == "yes"
    torch.manual_seed(0)
    network = to_device(build(case), device, channels_last)
    images = torch.randn(case["batch"], 3, case["size"], case["size"], device=device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = images.contiguous(memory_format=layout)
    labels = torch.arange(case["batch"], device=device) % 10  # networks have 10 classes or more
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    forward = compiled(network) if case["compile"] == "yes" else network

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def compare(build: Build, case: Case, device: torch.device, count: int) -> list[Case]:
    """Return a row for each attention of the network from ``build``; ratios are to the first."""
    rows = [case | {"attention": attention} for attention in case["attention"]]
    make_step = partial(training_step, build)
    steps = {row["attention"]: make_step(row, device) for row in rows}
    times = timing.rounds(steps, device, count)
    for row in rows:
        # The count does not depend on the backend, and this one is available everywhere.
        network = build(row | {"backend": "reference"})
        row["step_ms"] = times[row["attention"]]
        row["time_ratio"] = timing.ratio(row["step_ms"], rows[0]["step_ms"])
        row["peak_mib"] = timing.peak(make_step, row, device)
        row["memory_ratio"] = row["peak_mib"] / rows[0]["peak_mib"]
        row["parameters"] = count_parameters(network)
        row["flops"] = count_flops(network, (case["size"], case["size"]))
        # The backward pass has two products for each product of the forward pass.
        seconds = statistics.median(row["step_ms"]) / 1e3
        row["flop_per_s"] = 3 * row["flops"] * case["batch"] / seconds
        row["images_per_s"] = case["batch"] / seconds
    return rows


measure = partial(compare, build)


def cells(row: Case) -> dict[str, str]:
    """The network, and the time and the memory of its step; GFLOPs are of an image, forward."""
    return {
        "network": row["model"],
        "attention": row["attention"],
        "M parameters": f"{row['parameters'] / 1e6:.2f}",
        "GFLOPs": f"{row['flops'] / 1e9:.3g}",
        "batch": str(row["batch"]),
        "step ms": timing.spread(row["step_ms"]),
        "time ratio": f"{row['time_ratio']:.2f}",
        "peak MiB": f"{row['peak_mib']:.0f}",
        "memory ratio": f"{row['memory_ratio']:.2f}",
        "images/s": f"{row['images_per_s']:.0f}",
        "GFLOP/s": f"{row['flop_per_s'] / 1e9:.0f}",
    }
