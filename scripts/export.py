"""Export a trained network to ONNX and torch.export, with dynamic batch size, height and width.

    python scripts/export.py outputs/train/RUN
    python scripts/export.py weights.safetensors --out exported --formats onnx

The network is given as for `models.load`. Writes network.onnx and network.pt2. Their input is
images (B, 3, H, W), normalized by the mean and standard deviation in their metadata, which also has
the class names; their output is logits (B, classes). A file is written only if it reproduces the
network's logits, at the size of its images and at two others. ONNX needs
pip install -c constraints.txt -e '.[app,export]'.
"""

import argparse
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.command import check_out, command, start

# The first one needs no package beyond torch.
FILES = {"torch": "network.pt2", "onnx": "network.onnx"}


def options(parser: argparse.ArgumentParser) -> None:
    """Add the command-line options."""
    parser.add_argument("network", help="a run's folder, a weights.safetensors or a checkpoint")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="where to write (default: beside the network)"
    )
    parser.add_argument(
        "--formats", nargs="+", choices=FILES, default=[*FILES], help="default: both"
    )


if __name__ == "__main__":
    start(__file__, options)

import json
import logging
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import BytesIO, StringIO

import torch
from torch import Tensor, nn
from torch.export import Dim

import models
from models.saved import description_as_text
from reporting.text import printable
from training.files import write_files

# Largest allowed error of the logits, relative to the largest logit.
ALLOWED = 1e-4

Run = Callable[[Tensor], Tensor]


class Named(nn.Module):
    """The network with its input named ``images``, a name that exported programs keep."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits


def to_onnx(trained: models.Trained) -> tuple[bytes, Run]:
    """Return the network as the bytes of an ONNX file, and a function that runs it."""
    import onnxruntime

    names = {"images": {0: "batch", 2: "height", 3: "width"}}
    with redirect_stdout(StringIO()):  # hides its progress
        program = torch.onnx.export(
            Named(trained.network),
            (_examples(trained)[0],),
            dynamo=True,
            dynamic_shapes=names,
            output_names=["logits"],
            verbose=False,
        )
    assert program is not None
    for name in ("class_names", "mean", "std"):
        program.model.metadata_props[name] = json.dumps(getattr(trained.description, name))
    content = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return content, lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def to_torch(trained: models.Trained) -> tuple[bytes, Run]:
    """Return the network as bytes for torch.export.load, and a function that runs it."""
    sizes = {"images": {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}}
    program = torch.export.export(
        Named(trained.network), (_examples(trained)[0],), dynamic_shapes=sizes
    )
    content = BytesIO()
    description = {"config.json": description_as_text(trained.description)}
    torch.export.save(program, content, extra_files=description)
    module = torch.export.load(BytesIO(content.getvalue())).module()
    return content.getvalue(), lambda x: module(x)


FORMATS = {"onnx": to_onnx, "torch": to_torch}


def _examples(trained: models.Trained) -> list[Tensor]:
    """Images of the network's own size, and of two others."""
    height, width = trained.image_size
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, height, width), (1, height + height // 2, width), (3, height, width + 8)]
    return [torch.randn(n, 3, h, w, generator=generator) for n, h, w in shapes]


@torch.no_grad()
def largest_error(run: Run, trained: models.Trained) -> float:
    """Return the error of an exported program's logits, relative to the largest logit."""
    errors = []
    for images in _examples(trained):
        own = trained.network(images)
        largest = own.abs().max().clamp(min=torch.finfo(own.dtype).tiny)  # all may be 0
        errors.append(float((run(images) - own).abs().max() / largest))
    return max(errors)


def export(trained: models.Trained, kind: str, out: Path) -> str:
    """Write one format and return a line that says how exact it is.

    Raises:
        ValueError: if the program's logits differ from the network's; nothing is written.
    """
    content, run = FORMATS[kind](trained)
    error = largest_error(run, trained)
    path = out / FILES[kind]
    if not error <= ALLOWED:
        raise ValueError(f"{path} is not written: its logits are off by {error:.1g} of the largest")
    write_files({path: content})
    return f"{path}: {len(content) / 2**20:.1f} MiB, logits within {error:.1g} of the largest"


@command(options, errors=(RuntimeError,))
def main(args: argparse.Namespace) -> None:
    network = Path(os.path.expanduser(args.network))
    out = args.out or (network if network.is_dir() else network.parent)
    logging.disable(logging.WARNING)  # silences the exporters
    warnings.filterwarnings("ignore")
    trained = models.load(args.network)
    check_out(out)
    try:
        for kind in dict.fromkeys(args.formats):
            print(printable(export(trained, kind, out)), flush=True)
    except ModuleNotFoundError as error:
        install = "pip install -c constraints.txt -e '.[app,export]'"
        line = f"{error.name} is not installed: {install}, or --formats torch"
        raise ValueError(line) from error
