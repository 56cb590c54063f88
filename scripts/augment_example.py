"""Add attention to a trained network and continue training it.

    python scripts/augment_example.py [--epochs 4] [--epochs-after 12] [--seed 0]

A plain ResNet-8 is trained on the built-in task, which it cannot solve: cue and shape are farther
apart than its convolutions see. Then `aaconv.augment_` replaces one convolution of its last stage,
and training continues with a new optimizer. A copy that stays plain is trained on as well: what it
gains is due to the additional epochs. Prints top-1 accuracies on the test images.
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import command, number, start

BATCH_SIZE = 32


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    count = number(int, at_least=1)
    parser.add_argument("--epochs", type=count, default=4, help="of the plain network (default: 4)")
    parser.add_argument(
        "--epochs-after",
        type=count,
        default=12,
        help="further epochs, with and without attention (default: 12)",
    )
    parser.add_argument("--seed", type=number(int, at_least=0), default=0)
    enough = number(int, at_least=BATCH_SIZE)
    parser.add_argument("--train-size", type=enough, default=10_000, help="training images")


if __name__ == "__main__":
    start(__file__, options)

import copy

import torch
import torch.nn.functional as F
from torch import nn

from aaconv import augment_
from data import Augmentation, Batches, Dataset, evaluation_batches, make_lookup
from models import ResNet

AUGMENTED = "stages.2.0.conv1"
LEARNING_RATE = 2e-3


def train(network: nn.Module, data: Dataset, epochs: int, seed: int) -> None:
    """Train with AdamW and one cycle of the learning rate."""
    batches = Batches(data.train, BATCH_SIZE, Augmentation(), data.mean, data.std, seed)
    # Created here, so that it gets the parameters that the network has now.
    optimizer = torch.optim.AdamW(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=epochs * len(batches)
    )
    network.train()
    for epoch in range(epochs):
        for images, labels in batches.epoch(epoch):
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, data: Dataset) -> float:
    """Top-1 accuracy on the test images, in %."""
    network.eval()
    batches = evaluation_batches(data.evaluation, 500, data.mean, data.std)
    right = sum(int((network(x).argmax(1) == labels).sum()) for x, labels in batches)
    return 100 * right / len(data.evaluation)


@command(options)
def main(args: argparse.Namespace) -> None:
    epochs, more, seed = args.epochs, args.epochs_after, args.seed
    data = make_lookup(train_size=args.train_size)
    torch.manual_seed(seed)
    network = ResNet("basic", [1, 1, 1], [16, 32, 64], 16, "subsample", data.num_classes)
    train(network, data, epochs, seed)
    print(f"plain, {epochs} epochs: {accuracy(network, data):.2f} %", flush=True)
    plain = copy.deepcopy(network)

    example = torch.zeros(1, 3, 32, 32)
    augment_(network, example, dk=1.0, dv=0.75, Nh=2, filter_fn=lambda _, name: name == AUGMENTED)
    print(f"augmented, not trained on: {accuracy(network, data):.2f} %", flush=True)
    train(network, data, more, seed + 1)
    print(f"augmented, {more} epochs more: {accuracy(network, data):.2f} %", flush=True)
    train(plain, data, more, seed + 1)
    print(f"plain, {more} epochs more: {accuracy(plain, data):.2f} %")
