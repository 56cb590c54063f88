"""The fused kernels, on a GPU if there is one, else in Triton's interpreter on the CPU."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aaconv import AugmentedConv, attention_2d

import reference
from helpers import (
    ROOT,
    assert_rounded,
    check_operations,
    gradient_of_one,
    inputs,
    inputs_like,
    laid_out,
    rounding_errors,
    slow,
    thorough,
    with_gradients,
)

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.errors import OutOfResources

from aaconv import functional
from aaconv.backends import fused_kernels, fused_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (H, W), heads, dkh, dvh, batch
CASES = [
    ((1, 1), 1, 1, 1, 2),
    ((1, 5), 3, 2, 1, 2),
    thorough((7, 13), 1, 64, 2, 1),
    slow((5, 3), 2, 20, 5, 2),
    ((4, 2), 3, 1, 17, 2),
    thorough((2, 67), 1, 20, 2, 1),  # wider than a tile
]


def by_kernels(*tensors):
    return attention_2d(*tensors, backend="fused")


def on_device(tensors, dtype):
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


def check(low, got=None):
    """Check the output and the gradients of ``low`` against the formula in float64."""
    exact = with_gradients(reference.attention, [t.cpu() for t in inputs_like(low, torch.float64)])
    got = with_gradients(by_kernels, low) if got is None else got
    assert all(t.dtype == low[0].dtype for t in got)
    assert_rounded(got, exact, rounding_errors(low, low[0].dtype, torch.float32))


@pytest.mark.parametrize(("size", "heads", "dkh", "dvh", "batch"), CASES)
def test_equals_the_formula_with_gradients(size, heads, dkh, dvh, batch):
    check(on_device(inputs(size, heads, dkh, dvh, batch=batch), torch.float32))


@pytest.mark.parametrize("size", [(5, 3), thorough((1, 67))])
def test_without_tables(size):
    check(on_device(inputs(size, 2, 20, 5)[:3], torch.float32))


@pytest.fixture
def in_order():
    torch.use_deterministic_algorithms(True)  # also fills empty tensors with NaN
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("in_order")
@pytest.mark.parametrize(
    ("size", "heads", "dkh", "dvh", "batch"),
    [((1, 5), 3, 2, 1, 2), slow((5, 3), 2, 20, 5, 2), thorough((2, 67), 1, 20, 2, 1)],
)
def test_gradients_in_a_fixed_order(size, heads, dkh, dvh, batch):
    low = on_device(inputs(size, heads, dkh, dvh, batch=batch), torch.float32)
    got = with_gradients(by_kernels, low)
    check(low, got)
    again = with_gradients(by_kernels, low)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


def peaked(size, last):
    """Return inputs whose logits are small for all keys but the last, which has ``last``."""
    tensors = inputs(size, 2, 4, 3)
    with torch.no_grad():
        tensors[0][..., 0] = 2.0  # sqrt(dkh)
        tensors[1][..., -1, -1, 0] = last
    return tensors


# Warnings of Triton's interpreter; a GPU does not warn.
unconcerned = pytest.mark.filterwarnings("ignore:overflow", "ignore:All-NaN", "ignore:invalid")


@unconcerned
@pytest.mark.parametrize("last", [thorough(60.0), thorough(300.0), 1e5, thorough(-1e5)])
def test_the_peak_may_be_far_from_the_first_keys(last):
    check(on_device(peaked((5, 7), last), torch.float32))


@unconcerned
def test_what_overflows_is_computed_again(monkeypatch):
    """The second launch corrects tiles with such logits and leaves other tiles alone."""
    launch, launched = fused_ops._launch, []

    def count(name, programs, sizes, *given):
        if not sizes.get("ALL"):
            launch(name, programs, sizes, *given)
        launched.append(sizes.get("ALL"))

    monkeypatch.setattr(fused_ops, "_launch", count)
    small, large = (on_device(peaked((5, 7), x), torch.float32) for x in (3.0, 300.0))
    exact = reference.attention(*(t.cpu().double() for t in small))
    assert_rounded([by_kernels(*small)], [exact], rounding_errors(small)[:1])
    assert not by_kernels(*large).isfinite().all()
    assert launched == [False, True] * 2


@unconcerned
@pytest.mark.parametrize("index", range(3))
def test_what_is_not_a_number_stays_so(index):
    tensors = on_device(inputs((3, 5), 1, 2, 2), torch.float32)
    with torch.no_grad():
        tensors[index][0, 0, 1, 2, 0] = float("nan")
    out = by_kernels(*tensors)
    # A query only affects its own output; keys and values affect all outputs.
    assert out[0, 0, 1, 2].isnan().all() if index < 2 else out[0, 0, 1, 2, 0].isnan()
    assert out[1].isfinite().all()


class Largest(TorchDispatchMode):
    """Record the number of elements of the largest tensor that is created."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for t in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return made


@pytest.mark.parametrize("order", [slow("any"), thorough("fixed")])
def test_nothing_as_large_as_all_position_terms_is_stored(order, request):
    if order == "fixed":
        request.getfixturevalue("in_order")
    B, N, H, W = 4, 2, 7, 11
    tensors = on_device(inputs((H, W), N, 4, 2, batch=B), torch.float32)
    with Largest() as largest:
        with_gradients(by_kernels, tensors)
    assert B * N * H * W * 4 <= largest.elements < B * N * H * W * (H + W) / 2


def test_offsets_beyond_31_bits():
    @triton.jit
    def offsets(out, stride, CHANNEL: tl.constexpr):
        at = tl.arange(0, 16)
        strides = (0, 0, stride, CHANNEL, 1)
        value = fused_kernels._offsets(strides, at, at)
        tl.store(out + at[:, None] * 16 + at[None, :], value)

    out = torch.zeros(16, 16, dtype=torch.int64, device=DEVICE)
    offsets[(1,)](out, 2**29 + 1, 2**30 + 3)
    at = torch.arange(16)
    assert torch.equal(out.cpu(), at[:, None] * (2**29 + 1) + at * (2**30 + 3))


def test_a_gpu_with_too_little_of_something_is_told_by_name(monkeypatch):
    class Kernel:
        def __getitem__(self, grid):
            def run(*_, **__):
                raise OutOfResources(300000, 232448, "shared memory")

            return run

    monkeypatch.setattr(fused_kernels, "attend", Kernel())
    tensors = on_device(inputs((2, 3), 1, 5, 3), torch.float32)
    message = (
        "backend='fused' with dkh=5 and dvh=3 needs 300000 of shared memory, this GPU has 232448; "
        "use backend='sdpa'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        by_kernels(*tensors)


@unconcerned
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "heads"), [((3, 5), 2), thorough((7, 11), 1)])
@pytest.mark.parametrize("scale", [1.0, slow(2.5), 8.0])
def test_half_precision_errs_by_its_roundings(dtype, size, heads, scale, monkeypatch):
    """The errors are within the rounding bounds for logits up to 242."""
    if fused_ops.INTERPRETED and dtype == torch.bfloat16:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", bfloat16_product)
        monkeypatch.setattr(interpreter.InterpreterBuilder, "cast_impl", rounded_cast)
        monkeypatch.setattr(functional, "check_backend", lambda *_, **__: None)
    check(on_device(inputs(size, heads, 20, 2, batch=1, scale=scale), dtype))


def rounded_cast(self, source, dtype, cast=interpreter.InterpreterBuilder.cast_impl):
    """Round to the nearest bfloat16, like a GPU; the interpreter truncates."""
    if (source.dtype.scalar, dtype.scalar) != (tl.float32, tl.bfloat16):
        return cast(self, source, dtype)
    rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
    bits = rounded.view(torch.int16).numpy().view(np.uint16)
    return interpreter.TensorHandle(bits, tl.bfloat16)


def bfloat16_product(self, a, b, d, *_):
    """tl.dot in float32; the interpreter's version treats bfloat16 bits as integers."""
    factors = [(t.data.astype(np.uint32) << 16).view(np.float32) for t in (a, b)]
    return interpreter.TensorHandle(factors[0] @ factors[1] + d.data, d.dtype.scalar)


@pytest.mark.parametrize(
    "layout", [slow("contiguous_format"), "channels_last", slow("every other")]
)
def test_strides_are_as_they_come(layout):
    check(laid_out(on_device(inputs((3, 5), 2, 6, 4), torch.float32), layout))


@pytest.mark.slow
def test_a_gradient_that_is_one_number_everywhere():
    low = on_device(inputs((3, 5), 2, 6, 4), torch.float32)
    out = by_kernels(*low)
    one = torch.ones((), device=DEVICE)
    got, expected = (
        torch.autograd.grad(out, low, ones, retain_graph=True)
        for ones in (one.expand_as(out), torch.ones_like(out))
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("index", [0, slow(1), slow(2), 3, slow(4)])
def test_each_input_alone_has_its_gradient(index):
    low = on_device(inputs((3, 5), 2, 6, 4), torch.float32)
    torch.testing.assert_close(*gradient_of_one(by_kernels, low, index))


# torch 2.14's opcheck itself reads .grad of non-leaf tensors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("count", [thorough(3), slow(5)])
def test_the_operations_pass_opcheck(count):
    check_operations("fused", on_device(inputs((3, 2), 2, 6, 4), torch.float32)[:count])


@pytest.mark.slow
def test_compiled_and_exported():
    layer = AugmentedConv(4, 8, 3, 6, 4, 2, (3, 5), True, backend="fused").to(DEVICE)
    x = torch.randn(2, 4, 3, 5, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    gradients = [torch.autograd.grad(m(x).sum(), layer.key_rel_h) for m in (compiled, layer)]
    torch.testing.assert_close(*gradients)
    exported = torch.export.export(layer, (x,)).module()
    torch.testing.assert_close(exported(x), layer(x))


def bench_kernels(*words, **options):
    command = [sys.executable, "-m", "benchmarks.bench", "kernels", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("capability", [80, 90])
def test_no_kernel_spills_or_exceeds_a_card(capability, tmp_path):
    """The kernels are compiled to machine code, which needs no GPU."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    shapes = ["32x32:20:2:8"]
    if capability == 90:  # other shapes take a minute each to compile
        shapes += ["56x56:20:4:8", "8x8:20:8:8"]
    words = ["--capability", str(capability), "--shape", *shapes, "--out", str(tmp_path)]
    done = bench_kernels(*words, env=environment)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "kernels.json").read_text())["rows"]
    assert len(rows) == len(shapes) * 4
    for row in rows:
        assert row["spills_in_loop"] == 0, row
        assert 0 < row["shared"] <= row["most_shared"], row
        assert row["exponentials"] >= 1, row
    if capability == 90:
        count = {(row["shape"], row["kernel"]): row["instructions"] for row in rows}
        assert count["32x32:20:2:8", "attend"] <= 7.5
        assert count["32x32:20:2:8", "gradients"] <= 14


@pytest.mark.thorough
def test_the_report_takes_other_shapes_and_dtypes(tmp_path):
    words = ["--capability", "90", "--shape", "7x5:6:1:2", "--dtype", "fp16", "fp32"]
    done = bench_kernels(*words, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "kernels.md").read_text()
    assert page.count("| 9.0 | fp16 | attend | 7x5 | 6 | 1 | 2 |") == 1
    assert page.count("| 9.0 | fp32 | gradients, ordered | 7x5 |") == 1
    wrong = bench_kernels("--shape", "7x5")
    assert wrong.returncode == 1
    assert "--shape 7x5: write a map, dkh, dvh and Nh" in wrong.stderr
