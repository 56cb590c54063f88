"""What several test files share: tiny settings, what a run leaves, attention's inputs."""

import csv
import os
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from aaconv import BACKENDS
from aaconv.functional import unavailable_reason

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"

# A network of three blocks on 96 images: a run of two epochs takes about a second.
TINY = [
    "experiment=lookup",
    "data.train_size=96",
    "data.test_size=40",
    "batch_size=32",
    "epochs=2",
    "model.widths=[4,8,8]",
    "model.stem=4",
    "model.aa={stages:[2,3],dk:0.5,dv:0.25,Nh:4,min_dkh:8}",
    "tracking=csv",
    "precision=fp32",  # whatever the processor has
]

# What may differ between two runs of the same settings.
CLOCK = ("perf/images_per_s", "perf/peak_memory_mib", "perf/epoch_seconds")


def rows(folder):
    """The lines of a run's metrics.csv but for what depends on the clock."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def await_(condition, what, seconds=240):
    """Wait until ``condition()`` is true; an end to waiting, not a claim about speed."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.1)


def machine_lacks(what):
    """End a test that this machine cannot run: on CI it should, elsewhere it is skipped."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


slow = partial(pytest.param, marks=pytest.mark.slow)

# (H, W), heads, dkh, dvh
CASES = [
    ((1, 1), 1, 1, 1),
    ((1, 5), 3, 2, 1),
    slow((7, 13), 1, 64, 2),
    ((5, 3), 2, 3, 5),
    ((3, 7), 1, 20, 2),
    ((4, 2), 3, 1, 13),
]


def usable(dtype, device="cpu"):
    """The backends that compute such tensors here, and their gradients."""
    device = torch.device(device)
    return [b for b in BACKENDS if unavailable_reason(b, device, dtype, needs_grad=True) is None]


def inputs(size, heads, dkh, dvh, dtype=torch.float64, batch=2, scale=1.0):
    torch.manual_seed(0)
    q = torch.randn(batch, heads, *size, dkh, dtype=dtype) * scale
    k = torch.randn(batch, heads, *size, dkh, dtype=dtype) * scale
    v = torch.randn(batch, heads, *size, dvh, dtype=dtype)
    rel_h = torch.randn(2 * size[0] - 1, dkh, dtype=dtype)
    rel_w = torch.randn(2 * size[1] - 1, dkh, dtype=dtype)
    return [t.requires_grad_() for t in (q, k, v, rel_h, rel_w)]


def inputs_like(tensors, dtype):
    return [t.detach().to(dtype).requires_grad_() for t in tensors]


def with_gradients(function, tensors):
    out = function(*tensors)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    direction = direction.to(out.device)
    return [out, *torch.autograd.grad(out, tensors, direction)]
