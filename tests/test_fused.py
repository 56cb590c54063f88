"""The fused kernels: in Triton's interpreter on the CPU, or on the GPU where there is one."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from aaconv import AugmentedConv, attention_2d

import reference
from helpers import inputs, inputs_like, slow, with_gradients

pytest.importorskip("triton")

from triton.runtime import interpreter

from aaconv import functional
from aaconv.backends import fused_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# (H, W), heads, dkh, dvh, batch
CASES = [
    ((1, 1), 1, 1, 1, 2),
    ((1, 5), 3, 2, 1, 2),
    slow((7, 13), 1, 64, 2, 1),
    slow((5, 3), 2, 20, 5, 2),
    ((4, 2), 3, 1, 17, 2),
    slow((2, 67), 1, 20, 2, 1),  # wider than a tile
]


def by_kernels(*tensors):
    return attention_2d(*tensors, backend="fused")


def on_device(tensors, dtype):
    return [t.detach().to(DEVICE, dtype).requires_grad_() for t in tensors]


def assert_close(got, expected, error):
    """Within ``error`` of the largest value, or of 1: some gradients are sums that cancel."""
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == got[0].dtype
        worst = (a.double().cpu() - b).abs().max().item()
        assert worst <= error * max(1.0, b.abs().max().item()), index


@pytest.mark.parametrize(("size", "heads", "dkh", "dvh", "batch"), CASES)
def test_equals_the_formula_with_gradients(size, heads, dkh, dvh, batch):
    tensors = inputs(size, heads, dkh, dvh, batch=batch)
    expected = with_gradients(reference.attention, tensors)
    assert_close(with_gradients(by_kernels, on_device(tensors, torch.float32)), expected, 5e-6)


@pytest.mark.parametrize("size", [(5, 3), slow((1, 67))])
def test_without_tables(size):
    tensors = inputs(size, 2, 20, 5)[:3]
    expected = with_gradients(reference.attention, tensors)
    assert_close(with_gradients(by_kernels, on_device(tensors, torch.float32)), expected, 5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "heads"), [((3, 5), 2), slow((7, 11), 1)])
def test_half_precision_errs_no_more_than_the_formula(dtype, size, heads, monkeypatch):
    """Output within 2x, gradients within 3x of what the formula errs when computed in it."""
    if fused_ops.INTERPRETED and dtype == torch.bfloat16:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", bfloat16_product)
        monkeypatch.setattr(functional, "check_backend", lambda *_, **__: None)
    exact = with_gradients(reference.attention, inputs(size, heads, 20, 2, batch=1))
    low = inputs_like(inputs(size, heads, 20, 2, batch=1), dtype)
    plain = with_gradients(reference.attention, low)
    got = with_gradients(by_kernels, on_device(low, dtype))
    for index, (a, b, e) in enumerate(zip(got, plain, exact, strict=True)):
        assert a.dtype == dtype
        error, allowed = (a.cpu() - e).abs().max(), (b - e).abs().max()
        assert error <= (2 if index == 0 else 3) * allowed + 1e-6, index


def bfloat16_product(self, a, b, d, *_):
    """tl.dot in float32; the interpreter's own takes the bits of bfloat16 for integers."""
    factors = [(t.data.astype(np.uint32) << 16).view(np.float32) for t in (a, b)]
    return interpreter.TensorHandle(factors[0] @ factors[1] + d.data, d.dtype.scalar)


@pytest.mark.parametrize("layout", [slow("contiguous"), "channels_last", slow("every other")])
def test_strides_are_as_they_come(layout):
    """Heads and channels as the layer splits them from one tensor, and a view with gaps."""
    double = inputs((3, 5), 2, 6, 4)
    tensors = on_device(double, torch.float32)
    if layout == "every other":
        views = [
            t.repeat_interleave(2, -1).repeat_interleave(2, 2)[:, :, ::2, :, ::2]
            for t in tensors[:3]
        ]
    else:
        parts = [t.permute(0, 1, 4, 2, 3).flatten(1, 2) for t in tensors[:3]]
        format = getattr(torch, layout + "_format", None) or getattr(torch, layout)
        together = torch.cat(parts, dim=1).contiguous(memory_format=format)
        views = [
            t.unflatten(1, (2, -1)).permute(0, 1, 3, 4, 2) for t in together.split((12, 12, 8), 1)
        ]
    assert not any(t.is_contiguous() for t in views)
    for a, b in zip(views, tensors, strict=False):
        assert torch.equal(a, b)
    views = [*(t.detach() for t in views), *tensors[3:]]
    views = [t.requires_grad_() for t in views]
    expected = with_gradients(reference.attention, double)
    assert_close(with_gradients(by_kernels, views), expected, 5e-6)


@pytest.mark.slow
def test_a_gradient_that_is_one_number_everywhere():
    tensors = inputs((3, 5), 2, 6, 4)
    expected = torch.autograd.grad(reference.attention(*tensors).sum(), tensors)
    low = on_device(tensors, torch.float32)
    assert_close(torch.autograd.grad(by_kernels(*low).sum(), low), expected, 5e-6)


@pytest.mark.parametrize("index", [0, slow(1), slow(2), 3, slow(4)])
def test_each_input_alone_has_its_gradient(index):
    tensors = inputs((3, 5), 2, 6, 4)
    expected = with_gradients(reference.attention, tensors)[index + 1]
    low = [t.detach() for t in on_device(tensors, torch.float32)]
    low[index].requires_grad_()
    out = by_kernels(*low)
    direction = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape)
    assert_close(torch.autograd.grad(out, low[index], direction), [expected], 5e-6)


def test_second_derivatives_are_refused():
    tensors = on_device(inputs((1, 3), 1, 2, 2), torch.float32)
    (gradient,) = torch.autograd.grad(by_kernels(*tensors).sum(), tensors[0], create_graph=True)
    with pytest.raises((RuntimeError, NotImplementedError), match="attend_backward"):
        gradient.sum().backward()


# torch 2.14's own opcheck reads .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_the_operations_pass_opcheck():
    tensors = on_device(inputs((3, 2), 2, 6, 4), torch.float32)
    for given in (tensors, [*tensors[:3], None, None]):
        torch.library.opcheck(fused_ops._attend, given)
        given = [t if t is None else t.detach() for t in given]
        out, lse = fused_ops._attend(*given)
        torch.library.opcheck(
            fused_ops._attend_backward, (torch.ones_like(out), *given, out, lse)
        )


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "dtypes"), [(80, ["bfloat16"]), (90, ["float32", "bfloat16", "float16"])]
)
def test_the_kernels_compile_for_gpus(capability, dtypes, tmp_path):
    """All three, to machine code; no GPU is needed for that."""
    script = Path(__file__).with_name("compile_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, script, str(capability), *dtypes]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    names = ("attend", "query_gradients", "key_gradients")
    assert [(n, d) for n, d, _ in lines] == [(n, d) for d in dtypes for n in names]
    most_shared = {80: 163, 90: 227}[capability] * 1024  # bytes that a block may have
    assert all(0 < int(shared) <= most_shared for *_, shared in lines)
