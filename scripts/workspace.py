"""Make a dashboard workspace that shows whether attention helps in the runs of a project.

    python scripts/workspace.py                                    # prints it as JSON
    python scripts/workspace.py --save --data cifar100 -- model=resnet20
    python scripts/workspace.py --save --replace URL

It has the comparison, learning curves by variant with their spread over the seeds, sweeps of dk, dv
and Nh with top-1 on held-out images, accuracy against cost, and what the networks see. What comes
after ``--`` chooses the network whose augmented blocks are shown, as for train.py. Nothing is sent
without --save, which posts the workspace as a new view of the project and prints its address;
--replace overwrites an earlier view. Needs
pip install -c constraints.txt -e '.[app,workspace]'.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import PROJECT, command, start


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("--project", default=PROJECT, help=f"wandb project (default: {PROJECT})")
    parser.add_argument(
        "--entity",
        default=os.environ.get("WANDB_ENTITY"),
        help="user or team (default: the account's)",
    )
    parser.add_argument("--data", metavar="NAME", help="runs on cifar100, ...; default: all")
    parser.add_argument("--save", action="store_true", help="post it; prints its address")
    parser.add_argument("--replace", metavar="URL", help="with --save: the view to replace")
    parser.add_argument(
        "network", nargs="*", metavar="OVERRIDE", help="its augmented blocks are shown"
    )


if __name__ == "__main__":
    start(__file__, options)


import torch

from aaconv.text import one_line
from models import augmented_layers
from training import console
from training.compose import compose_config
from training.settings import build_model
from training.tracking import QUIET, has_credentials, with_timeout

# Seconds to wait for the server.
TIMEOUT = 20


def augmented_blocks(overrides: list[str]) -> list[str]:
    """Return the names of the augmented blocks of the network that ``overrides`` choose.

    Raises:
        HydraException, OmegaConfBaseException, ValueError: if there is no such network.
    """
    cfg = compose_config(["attention=aa", *overrides])
    with torch.device("meta"):
        model = build_model(cfg, num_classes=2, image_size=(32, 32))
    return list(augmented_layers(model))


@command(options)
def main(args: argparse.Namespace) -> None:
    if args.replace and not args.save:
        raise ValueError("--replace needs --save")
    try:
        from reporting import workspace
    except ModuleNotFoundError as error:
        install = "pip install -c constraints.txt -e '.[app,workspace]'"
        raise ValueError(f"{error.name} is not installed: {install}") from error
    blocks = augmented_blocks(args.network)
    os.environ.update(QUIET)
    if args.save and not has_credentials():
        raise ValueError("no account to save it with; run `wandb login` first")
    try:
        entity = args.entity or ""
        if args.save and not entity:
            import wandb

            entity = str(with_timeout(TIMEOUT, lambda: wandb.Api(timeout=TIMEOUT).default_entity))
        made = workspace.build(args.project, entity, blocks, args.data)
        if not args.save:
            print(workspace.as_json(made))
        else:
            print(with_timeout(TIMEOUT, lambda: workspace.save(made, args.replace)))
    except Exception as error:  # wandb raises many types
        console.stop("workspace.py", f"{'not saved: ' if args.save else ''}{one_line(error)}", 1)
