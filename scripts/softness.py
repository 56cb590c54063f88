"""Show how soft the attention of a network is at the start and, for a run, after training.

    python scripts/softness.py outputs/train/RUN
    python scripts/softness.py RUN data.root=FOLDER --images 256
    python scripts/softness.py model=resnet56 attention.init=glorot attention.qk_norm=false seed=1

The network is a run's folder, a weights.safetensors or a checkpoint, or a new one given by settings
as for train.py. It gets evenly spaced evaluation images, with batch normalization as in training.
Prints for each augmented layer the entropy of its weights as a share of its maximum (1 is uniform,
0 is one-hot), the largest weight of a query, and the norm of the gradient of the cross-entropy;
below them the gradient norm of the whole network and, at the start, that of the plain network. An
entropy below about 0.6 at the start means that attention starts saturated: its gradient hardly
says where else to look. `aaconv.attention_stats` measures the same in any network.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, number, paths_and_overrides, start

# More would need more memory than training the network.
MAX_IMAGES = 4096


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("words", nargs="+", metavar="NETWORK|NAME=VALUE")
    parser.add_argument(
        "--images",
        type=number(int, at_least=2, at_most=MAX_IMAGES),
        default=128,
        metavar="N",
        help="number of images (default: 128)",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


if __name__ == "__main__":
    start(__file__, options)

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from aaconv import attention_stats
from aaconv.stats import AttentionStats
from data import Dataset, EvaluationSet, evaluation_batches
from models.saved import Network
from reporting.text import printable
from training.compose import compose_config, make
from training.device import choose_device
from training.media import attention_images, spread
from training.settings import build_model, check
from training.trained import compose_settings, load_data


def batch_of(
    dataset: Dataset | EvaluationSet, mean: Any, std: Any, number: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return evenly spaced evaluation images and their labels."""
    images, _ = attention_images(dataset, spread(len(dataset.evaluation), number))
    (batch, *_) = evaluation_batches(images.to(device), len(images), mean, std)
    return batch


def stats_of(network: nn.Module, images: Tensor, labels: Tensor) -> AttentionStats:
    """Return entropy and gradients of ``network`` in training mode."""
    network = network.to(images.device).train()
    return attention_stats(network, images, lambda logits: F.cross_entropy(logits, labels))


def at_start(network: Network, seed: int, images: Tensor, labels: Tensor) -> list[str]:
    """Return the lines on a newly initialized network and on its plain counterpart."""
    attention = network["attention"]
    if "init" not in attention:
        raise ValueError(f"attention={attention['name']} has no attention to look at")
    found = []
    for arguments in (network, network | {"attention": {"name": "none"}}):
        torch.manual_seed(seed)  # as at the start of a run with this seed
        found.append(stats_of(models.build(arguments), images, labels))
    own, plain = found
    assert own.gradient is not None
    assert plain.gradient is not None
    return [
        f"at the start (init={attention['init']}, qk_norm={str(attention['qk_norm']).lower()}, "
        f"seed={seed})",
        str(own),
        f"gradient of the plain network: {plain.gradient:.3g} "
        f"(ratio {own.gradient / plain.gradient:.2f})",
    ]


def of_settings(overrides: list[str], number: int, device: torch.device) -> list[str]:
    """Return the lines on a network that is given by settings.

    Raises:
        ValueError, HydraException, OmegaConfBaseException: if these are wrong or have no effect.
    """
    cfg = compose_config(overrides)
    check(cfg)
    if cfg.init_from is not None:
        raise ValueError(
            f"init_from={cfg.init_from}: settings describe a newly initialized network; for "
            "trained weights, give their run"
        )
    if any(word.startswith("device=") for word in overrides):
        raise ValueError("device= is for train.py; use --device here")
    if any(word.startswith("attention.backend=") for word in overrides):
        raise ValueError("attention.backend= changes nothing here; leave it out")
    dataset: Dataset = make(cfg.data)
    batch = batch_of(dataset, dataset.mean, dataset.std, number, device)
    network = build_model(cfg, num_classes=dataset.num_classes, image_size=dataset.image_size)
    return at_start(models.describe(network), cfg.seed, *batch)


def of_run(path: str, overrides: list[str], number: int, device: torch.device) -> list[str]:
    """Return the lines on a trained network, at its start and after training.

    Raises:
        ValueError, OSError: if it does not exist, has no attention, or its images are unavailable.
    """
    trained = models.load(path)
    described = trained.description
    dataset = load_data(compose_settings(trained, path, overrides, ()), trained, path)
    batch = batch_of(dataset, described.mean, described.std, number, device)
    origin, seed = described.settings.get("init_from"), described.settings.get("seed")
    if origin is not None:
        lines = [f"it began with the weights of {origin}"]
    else:
        lines = at_start(described.network, seed or 0, *batch)
    return [*lines, "", "after training", str(stats_of(trained.network, *batch))]


@command(options, errors=(RuntimeError,))
def main(args: argparse.Namespace) -> None:
    paths, overrides = paths_and_overrides(args.words)
    if len(paths) > 1:
        raise ValueError(f"{paths[1]}: one network at a time")
    device = choose_device(args.device)
    if paths:
        lines = of_run(paths[0], overrides, args.images, device)
    else:
        lines = of_settings(overrides, args.images, device)
    print(printable("\n".join(lines)))
