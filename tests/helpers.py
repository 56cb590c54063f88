"""What several test files share: tiny settings, what a run leaves, attention's inputs."""

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
    "precision=fp32",  # whatever the processor has
]

# What may differ between two runs of the same settings.
CLOCK = ("perf/images_per_s", "perf/peak_memory_mib", "perf/epoch_seconds")


def rows(folder):
    """The lines of a run's metrics.csv but for what depends on the clock."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in CLOCK} for row in csv.DictReader(file)]


def everything_below(folder):
    """All paths below a folder, with the contents of those that are files."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def await_(condition, what, process=None, seconds=240):
    """Wait until ``condition()`` is true, while ``process``, if any, runs.

    There is an end to waiting, which is no claim about speed.
    """
    end = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def free_ports(number):
    """So many ports of loopback that nothing listens to."""
    with ExitStack() as stack:
        address = ("127.0.0.1", 0)
        sockets = [stack.enter_context(socket.create_server(address)) for _ in range(number)]
        return [s.getsockname()[1] for s in sockets]


def call(main, *words):
    """Run ``main`` of a command in this process, with these words as its command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program_of(main), *map(str, words)])
        return main()


def exit_code(main, *words):
    """That of a command with these words, which leaves by SystemExit."""
    with pytest.raises(SystemExit) as stopped:
        call(main, *words)
    return stopped.value.code


def refused(captured, main, *words, code=2):
    """The one line with which a command refuses these words; ``captured`` is capsys or capfd."""
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
    """End a test that this machine cannot run: on CI it should, elsewhere it is skipped."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(what)


def offline_records(folder):
    """All that wandb has kept of offline runs whose ``out_dir`` is ``folder``."""
    command = [Path(sys.executable).parent / "wandb", "leet", "inspect", "--json"]
    records = []
    for run in (folder / "wandb").glob("offline-run-*"):
        done = subprocess.run([*command, run], capture_output=True, text=True, check=True)
        records += map(json.loads, done.stdout.splitlines())
    return records


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


def usable(dtype):
    """The backends that compute such tensors here, and their gradients."""
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
    """What is put into the backward pass: multiples of 1/8, which no dtype rounds."""
    return (7 * torch.arange(out.numel()) % 17 - 8).reshape(out.shape).to(out) / 8


def laid_out(tensors, layout):
    """Attention's inputs as the layer splits them from one tensor, or as views with gaps."""
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
    """The gradient of one of ``tensors``: where no other has any, and where all have."""
    expected = with_gradients(function, tensors)[index + 1]
    alone = [t.detach() for t in tensors]
    alone[index].requires_grad_()
    out = function(*alone)
    (got,) = torch.autograd.grad(out, alone[index], direction_of(out))
    return got, expected


def check_operations(backend, given):
    """torch's own check of the operations of a backend, for q, k, v and both tables or none."""
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
    """How far `with_gradients` of attention may be from the truth, before its results are rounded.

    That is of the output, then of the gradients of ``tensors``, which are those of `inputs` in the
    dtype that attention gets them in. Element by element, by the bounds of Higham, Accuracy and
    Stability of Numerical Algorithms, chapter 3, worked out in float64 for these numbers: no
    processor's errors are in them. ``inner`` is the dtype of the weights and of the gradients of
    the logits, ``saved`` that of the output from which the backward pass takes the mean gradient
    of a query's weights, by default the same. With u the unit roundoff of ``inner``:

    - A sum of n products in float32 errs by g(n) times the sum of their sizes; g(n) is n u of
      float32, or 6 sqrt(n) u where that is less, as roundings are as often up as down. This is
      exceeded with a probability of 2 exp(-18) (Higham & Mary, A New Approach to Probabilistic
      Rounding Error Analysis, 2019).
    - A logit has D products, as many for its row and for its column, which are summed in float32
      with a scale and a maximum: g(D + 8). In half precision u^2 of the position terms (sdpa), and
      of that mean (fused), come to it: they are held in two numbers there.
    - A weight in the output is off most when its own logit is too high and all others too low. The
      backward pass has it from the normalizer of the forward pass, whose errors do not cancel.
    - Sums over weights and gradients of logits have at most four roundings to ``inner``: of either
      factor, of a part of the sum (torch's kernel has tiles of queries), and of it all. In float32
      it is g of the number of positions of all heads and images, channels, and 8 for the powers.
    - What is less than 2^-80 (in native), or rounded to less than a normal number, is cut off.
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
    """Within `rounding_errors` and the rounding of the results, each to its own dtype."""
    for index, (a, b, error) in enumerate(zip(got, exact, errors, strict=True)):
        about = torch.finfo(a.dtype)
        error = error.view_as(b)  # heads by (H, W), where positions were one after the other
        error = error + about.eps / 2 * (b.abs() + error + about.smallest_normal)
        assert ((a.cpu().double() - b.cpu()).abs() <= error).all(), index
