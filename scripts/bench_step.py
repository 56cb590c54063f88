"""Time a whole training step, augmented against plain, and compare it with a lower bound.

    python scripts/bench_step.py [--device cpu] [--models resnet20 wrn16_4] [--batch 32]

A step is forward, loss, backward and optimizer on random images. Its floor is a lower bound of its
time: its multiply-adds at the rate of one large matrix product measured on the same device, plus
the exponentials of its logits (once forward, once backward) at the rate of exp2 on a tensor that
stays in the cache. Everything else that is elementwise is not counted. Times are medians (minimum
to maximum) of interleaved rounds; memory is the peak of a new process above what was allocated
before the step. Writes bench_step.md and bench_step.json.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from configs.schema import register
from models import augmented_layers, count_flops
from reporting import timing
from training.device import choose_device, choose_dtype, compiled, to_device
from training.settings import build_model

ROOT = Path(__file__).resolve().parent.parent
IMAGE_SIZE = (32, 32)
CLASSES = 100
register()


def build(model: str, attention: str, backend: str) -> nn.Module:
    """The network that the configs describe, for CIFAR-100."""
    overrides = [f"model={model}", f"attention={attention}"]
    if attention == "aa":
        overrides.append(f"attention.backend={backend}")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("config", overrides)
    torch.manual_seed(0)
    return build_model(cfg, num_classes=CLASSES, image_size=IMAGE_SIZE)


def training_step(case: dict[str, Any], device: torch.device) -> Callable[[], None]:
    """A function that takes one training step of ``case``."""
    dtype = choose_dtype(case["precision"], device)
    plain = build(case["model"], case["attention"], case["backend"])
    network = to_device(plain, device, case["channels_last"])
    images = torch.randn(case["batch"], 3, *IMAGE_SIZE, device=device)
    if case["channels_last"]:
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (case["batch"],), device=device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, nesterov=True)
    forward = compiled(network) if case["compile"] else network

    def step() -> None:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = forward(images)
        F.cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def exponentials(network: nn.Module) -> int:
    """The number of logits of one image: Nh (HW)^2 in every augmented layer."""
    layers = augmented_layers(network).values()
    return sum(m.Nh * (m.shape[0] * m.shape[1]) ** 2 for m in layers)


def rates(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """FLOP/s of a large matrix product and exponentials per second, each the best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    values = torch.rand(2**22 if device.type == "cuda" else 2**18, device=device)
    repeats = 100

    def exp_and_clamp() -> None:
        for _ in range(repeats):
            torch.exp2(values, out=values).clamp_(max=1)

    def clamp() -> None:
        for _ in range(repeats):
            values.clamp_(max=1)

    product = _best(lambda: a @ b, device)
    return {
        "matmul_flops": 2 * size**3 / product,
        "exp_per_s": repeats
        * values.numel()
        / (_best(exp_and_clamp, device) - _best(clamp, device)),
    }


def _best(function: Callable[[], object], device: torch.device) -> float:
    taken = []
    for _ in range(10):
        timing.wait(device)
        started = time.perf_counter()
        function()
        timing.wait(device)
        taken.append(time.perf_counter() - started)
    return min(taken)


def measure(
    model: str, attentions: list[str], shared: dict[str, Any], device: torch.device, count: int
) -> list[dict[str, Any]]:
    """A row for each attention of one network."""
    cases = {a: {"model": model, "attention": a, **shared} for a in attentions}
    steps = {a: training_step(case, device) for a, case in cases.items()}
    times = timing.rounds(steps, device, count)
    limit = rates(device, choose_dtype(shared["precision"], device))
    rows = []
    for attention, case in cases.items():
        network = build(model, attention, "reference")
        images = shared["batch"]
        # The backward pass has two products for each product of the forward pass.
        flops = 3 * count_flops(network, IMAGE_SIZE) * images
        seconds = statistics.median(times[attention]) / 1e3
        products = flops / limit["matmul_flops"]
        powers = 2 * exponentials(network) * images / limit["exp_per_s"]
        rows.append(
            case
            | {
                "step_ms": times[attention],
                "images_per_s": images / seconds,
                "flops": flops,
                "flop_per_s": flops / seconds,
                "of_matmul_rate": products / seconds,
                "floor_ms": {"products": 1e3 * products, "exponentials": 1e3 * powers},
                "of_floor": seconds / (products + powers),
                "peak_mib": timing.peak(training_step, case, str(device)),
                **limit,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ratios are to the plain network."""
    header = ["network", "attention", "batch", "step ms", "to plain", "images/s", "peak MiB"]
    header += ["to plain", "GFLOP/s", "% of matmul", "floor ms: products + exp", "times the floor"]
    lines = []
    for row in rows:
        plain = next(r for r in rows if (r["model"], r["attention"]) == (row["model"], "none"))
        time_ratio = statistics.median(row["step_ms"]) / statistics.median(plain["step_ms"])
        floor = row["floor_ms"]
        lines.append(
            [
                row["model"],
                row["attention"],
                str(row["batch"]),
                timing.spread(row["step_ms"]),
                f"{time_ratio:.2f}",
                f"{row['images_per_s']:.0f}",
                f"{row['peak_mib']:.0f}",
                f"{row['peak_mib'] / plain['peak_mib']:.2f}",
                f"{row['flop_per_s'] / 1e9:.0f}",
                f"{100 * row['of_matmul_rate']:.0f}",
                f"{floor['products']:.1f} + {floor['exponentials']:.1f}",
                f"{row['of_floor']:.1f}",
            ]
        )
    return timing.markdown(header, lines, text_columns=2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--models", nargs="+", default=["resnet20", "wrn16_4", "wrn28_10"])
    parser.add_argument("--attentions", nargs="+", default=["none", "aa"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument(
        "--backend", default="auto", help="backend of the attention, see aaconv.attention_2d"
    )
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    arguments = parser.parse_args()
    if "none" not in arguments.attentions:
        parser.error("--attentions must contain none: ratios are to the plain network")
    device = choose_device(arguments.device)
    names = ("batch", "precision", "backend", "channels_last", "compile")
    shared = {name: getattr(arguments, name) for name in names}
    rows: list[dict[str, Any]] = []
    for model in arguments.models:
        rows += measure(model, arguments.attentions, shared, device, arguments.rounds)
        print(*table(rows).splitlines()[-len(arguments.attentions) :], sep="\n", flush=True)
    about = timing.facts(device) | {"rounds": arguments.rounds}
    print(timing.write(arguments.out, "bench_step", about, rows, table(rows)))


if __name__ == "__main__":
    main()
