"""Helpers shared by several test files: tiny settings, outputs of a run, attention inputs."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch

from aaconv import BACKENDS
from aaconv.functional import unavailable_reason
from training import cli

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
    "precision=fp32",  # the default depends on the hardware
]

# Columns that may differ between two runs with the same settings.
CLOCK = ("perf/images_per_s", "perf/peak_memory_mib", "perf/epoch_seconds")


def rows(folder):
    """Return the rows of a run's metrics.csv without the `CLOCK` columns."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def everything_below(folder):
    """Return all paths below a folder, with the contents of the files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def await_(condition, what, process=None, seconds=240):
    """Wait until ``condition()`` is true, and fail if ``process`` (if any) ends before that.

    The timeout only guards against hanging; it does not test speed.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def free_ports(number):
    """Return this many free ports on the loopback interface."""
    with ExitStack() as stack:
        address = ("127.0.0.1", 0)
        sockets = [stack.enter_context(socket.create_server(address)) for _ in range(number)]
        return [s.getsockname()[1] for s in sockets]


def call(main, *words):
    """Run a command's ``main`` in this process, with ``words`` as its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program_of(main), *map(str, words)])
        return main()


def exit_code(main, *words):
    """Return the exit code of a command that must raise SystemExit."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *words)
    return stopped.value.code


def refused(captured, main, *words, code=2):
    """Return the one-line error of a command that must reject ``words``; pass capsys or capfd."""
    assert exit_code(main, *words) == code
    line = captured.readouterr().err
    check_line(line, program_of(main))
    return line


def check_line(text, program="train.py"):
    assert text.startswith(f"{program}: "), text
    assert text.count("\n") == 1, text
    assert "Traceback" not in text


def program_of(main):
    return "train.py" if main is cli.run else f"{main.__module__.rpartition('.')[2]}.py"


def machine_lacks(what):
    """End a test that this machine cannot run: fail on CI, skip elsewhere."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def offline_records(folder):
    """Return all wandb records of the offline runs whose ``out_dir`` is ``folder``."""
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json"]
    records = []
    for run in (folder / "wandb").glob("offline-run-*"):
        done = subprocess.run([*command, run], capture_output=True, text=True, check=True)
        records += map(json.loads, done.stdout.splitlines())
    return records


slow = partial(pytest.param, marks=pytest.mark.slow)
thorough = partial(pytest.param, marks=pytest.mark.thorough)

# (H, W), heads, dkh, dvh
CASES = [
    ((1, 1), 1, 1, 1),
    ((1, 5), 3, 2, 1),
    slow((7, 13), 1, 64, 2),
    ((5, 3), 2, 3, 5),
    ((3, 7), 1, 20, 2),
    ((4, 2), 3, 1, 13),
]


def usable(dtype):
    """Return the backends that support this dtype on the CPU, gradients included."""
    device = torch.device("cpu")
    return [b for b in BACKENDS if unavailable_reason(b, device, dtype) is None]


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
    return [out, *torch.autograd.grad(out, tensors, direction_of(out))]


def direction_of(out):
    """The output gradient for the backward pass: multiples of 1/8, exact in every dtype."""
    return (7 * torch.arange(out.numel()) % 17 - 8).reshape(out.shape).to(out) / 8


def laid_out(tensors, layout):
    """Return attention inputs as views with gaps, or as the layer splits them from one tensor."""
    q, k, v, *tables = (t.detach() for t in tensors)
    if layout == "every other":
        views = [
            t.repeat_interleave(2, -1).repeat_interleave(2, 2)[:, :, ::2, :, ::2] for t in (q, k, v)
        ]
    else:
        parts = [t.permute(0, 1, 4, 2, 3).flatten(1, 2) for t in (q, k, v)]
        together = torch.cat(parts, dim=1).contiguous(memory_format=getattr(torch, layout))
        parts = together.split([part.shape[1] for part in parts], dim=1)
        views = [t.unflatten(1, (q.shape[1], -1)).permute(0, 1, 3, 4, 2) for t in parts]
    assert not any(t.is_contiguous() for t in views)
    assert all(map(torch.equal, views, (q, k, v)))
    return [t.requires_grad_() for t in (*views, *tables)]


def gradient_of_one(function, tensors, index):
    """Return the gradient of one tensor when only it requires grad, and when all of them do."""
    expected = with_gradients(function, tensors)[index + 1]
    alone = [t.detach() for t in tensors]
    alone[index].requires_grad_()
    out = function(*alone)
    (got,) = torch.autograd.grad(out, alone[index], direction_of(out))
    return got, expected


def check_operations(backend, given):
    """Run torch's opcheck on a backend's operations, for q, k, v and both tables or none."""
    given = [*given, None, None][:5]
    forward, backward = (
        getattr(torch.ops.aaconv, f"{backend}_{name}").default
        for name in ("attend", "attend_backward")
    )
    torch.library.opcheck(forward, given)
    given = [t if t is None else t.detach() for t in given]
    out, lse = forward(*given)
    torch.library.opcheck(backward, (torch.ones_like(out), *given, out, lse))


def rounding_errors(tensors, inner=torch.float32, saved=None):
    """Bound the error of `with_gradients` of attention, before its results are rounded.

    Returns elementwise bounds for the output, then for the gradients of ``tensors`` (from `inputs`,
    in the dtype passed to attention). They follow Higham, Accuracy and Stability of Numerical
    Algorithms, chapter 3, and are computed in float64 for these values, so they are independent of
    the hardware. ``inner`` is the dtype of the weights and of the gradients of the logits;
    ``saved`` (by default the same) is that of the output from which the backward pass computes the
    mean gradient of a query's weights. With u the unit roundoff of ``inner``:

    - A sum of n products in float32 has an error of at most g(n) times the sum of their absolute
      values. g(n) is n u of float32, or 6 sqrt(n) u if that is smaller, since roundings go up as
      often as down. This is exceeded with a probability of 2 exp(-18) (Higham & Mary, A New
      Approach to Probabilistic Rounding Error Analysis, 2019).
    - A logit has D products, and D each for its row and column offsets, summed in float32 with a
      scale and a maximum: g(D + 8). Half precision adds u^2 of the position terms (sdpa) and of
      that mean (fused), because they are stored as pairs of numbers there.
    - The error of a weight in the output is largest if its own logit is too high and all others are
      too low. The backward pass uses the forward pass's normalizer, whose errors do not cancel.
    - Sums over weights and logit gradients have at most four roundings to ``inner``: each factor, a
      partial sum (torch's kernel tiles the queries), and the total. In float32 the bound is g of
      the number of positions in all heads and images, plus channels, plus 8 for the powers.
    - Values below 2^-80 (in native), or that round to a subnormal number, are flushed to zero.
    """
    q, k, v, *tables = (t.detach().cpu().double() for t in tensors)
    (H, W, D), out_gradient = q.shape[2:], direction_of(v).flatten(2, 3)
    at = torch.arange(H * W)
    offsets = [
        (place - place[:, None] + size - 1).expand(*q.shape[:2], -1, -1)
        for place, size in ((at // W, H), (at % W, W))
    ][: len(tables)]
    q, k, v = (t.flatten(2, 3) for t in (q, k, v))

    def of_sum(n):
        return min(n, 6 * n**0.5) * 2**-24

    def of_roundings(dtype):
        many = of_sum(q.shape[:3].numel() + v.shape[-1] + 8)
        return many if dtype == torch.float32 else 4 * torch.finfo(dtype).eps / 2

    def logits(q, k, tables):
        terms = [(q @ t.mT).gather(-1, o) for t, o in zip(tables, offsets, strict=True)]
        return D**-0.5 * (q @ k.mT), D**-0.5 * sum(terms, torch.zeros(1))

    def over_keys(t):
        return t.sum(-1, keepdim=True)

    u = of_roundings(inner)
    cut_off = max(2.0**-80, u * torch.finfo(inner).smallest_normal)
    content, position = logits(q.abs(), k.abs(), [t.abs() for t in tables])
    squared = 0 if inner == torch.float32 else (u / 4) ** 2
    logit_error = of_sum(D + 8) * (content + position) + squared * (position + 4)

    weights = sum(logits(q, k, tables)).softmax(-1)
    more, less = weights * logit_error.exp(), weights * (-logit_error).exp()
    most, least = more / (more + over_keys(less) - less), less / (less + over_keys(more) - more)
    out_error = (torch.maximum(most - weights, weights - least) + u * weights + cut_off) @ v.abs()

    error = weights * (logit_error.exp() * over_keys(more) - 1 + u) + cut_off
    gradient = out_gradient @ v.mT
    gradient = gradient - over_keys(weights * gradient)
    own_error = (of_roundings(saved or inner) + squared) * (out_gradient.abs() @ v.abs().mT)
    gradient_error = own_error + over_keys(error * gradient.abs() + weights * own_error)
    logit_gradient_error = D**-0.5 * (
        (error + u * weights) * gradient.abs() + (weights + error) * gradient_error + cut_off
    )
    q_error, table_errors = logit_gradient_error @ k.abs(), []
    for table, offset in zip(tables, offsets, strict=True):
        by_offset = torch.zeros(*q.shape[:3], len(table), dtype=torch.float64)
        by_offset.scatter_add_(-1, offset, logit_gradient_error)
        q_error += by_offset @ table.abs()
        table_errors.append((by_offset.mT @ q.abs()).sum((0, 1)))
    k_error, v_error = logit_gradient_error.mT @ q.abs(), error.mT @ out_gradient.abs()
    return [out_error, q_error, k_error, v_error, *table_errors]


def assert_rounded(got, exact, errors):
    """Check results against `rounding_errors` plus the rounding of each to its own dtype."""
    for index, (a, b, error) in enumerate(zip(got, exact, errors, strict=True)):
        about = torch.finfo(a.dtype)
        error = error.view_as(b)  # (H, W) instead of flattened positions
        error = error + about.eps / 2 * (b.abs() + error + about.smallest_normal)
        assert ((a.cpu().double() - b.cpu()).abs() <= error).all(), index
