"""Tests that need a GPU: its own kernels, half precision, a whole run on it."""

import pytest
import torch

from aaconv import BACKENDS, AugmentedConv, attention_2d

from helpers import inputs, inputs_like, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),  # the compiler's advice
]

ON_GPU = [b for b in BACKENDS if b != "native"]


def on_gpu(tensors, dtype):
    return [t.cuda().detach().requires_grad_() for t in inputs_like(tensors, dtype)]


@pytest.mark.parametrize("backend", ["auto", "sdpa", "tiled"])  # fused has no float64
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 13), (16, 16), (32, 32)])
def test_equals_the_reference_in_double(backend, size):
    tensors = on_gpu(inputs(size, 3, 20, 2), torch.float64)
    expected = with_gradients(lambda *t: attention_2d(*t, backend="reference"), tensors)
    got = with_gradients(lambda *t: attention_2d(*t, backend=backend), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 13), (2, 67), (32, 32)])
@pytest.mark.parametrize(("dkh", "dvh"), [(1, 1), (20, 2), (64, 8)])
def test_single_precision(backend, size, dkh, dvh):
    double = on_gpu(inputs(size, 3, dkh, dvh), torch.float64)
    exact = with_gradients(lambda *t: attention_2d(*t, backend="reference"), double)
    got = with_gradients(
        lambda *t: attention_2d(*t, backend=backend), on_gpu(double, torch.float32)
    )
    for a, b in zip(got, exact, strict=True):
        assert (a.double() - b).abs().max() < 1e-4 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("backend", ON_GPU)
def test_large_logits_in_fp16_stay_finite(backend):
    tensors = on_gpu(inputs((3, 5), 2, 8, 4, torch.float32, scale=300.0), torch.float16)
    tensors = [t.detach() * (300 if i > 2 else 1) for i, t in enumerate(tensors)]
    low = [t.requires_grad_() for t in tensors]
    out, *gradients = with_gradients(lambda *t: attention_2d(*t, backend=backend), low)
    exact = attention_2d(*(t.detach().double() for t in low), backend="reference")
    assert (out.double() - exact).abs().max() < 2e-2
    assert all(g.isfinite().all() for g in gradients)


def test_memory_of_the_fused_kernels_grows_with_the_map_not_with_its_square():
    def peak(size):
        tensors = on_gpu(inputs((size, size), 8, 20, 2), torch.bfloat16)
        for _ in range(2):  # the first one compiles
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with_gradients(lambda *t: attention_2d(*t, backend="fused"), tensors)
        return torch.cuda.max_memory_allocated() - before

    # Stored tensors grow with the positions, by 4 times; the logits would grow by 16 times. Scratch
    # memory grows with H + W per program, and with the number of programs until the GPU is full.
    assert peak(64) < 9 * peak(32)
    assert peak(64) < 2 * 8 * 64**4 * 2 / 2  # half of all logits in bf16


@pytest.mark.parametrize("backend", ON_GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_full_map(backend, dtype):
    double = on_gpu(inputs((32, 32), 8, 20, 2), torch.float64)
    exact = with_gradients(lambda *t: attention_2d(*t, backend="reference"), double)
    low = on_gpu(inputs((32, 32), 8, 20, 2), dtype)
    got = with_gradients(lambda *t: attention_2d(*t, backend=backend), low)
    for a, b in zip(got, exact, strict=True):
        assert a.isfinite().all()
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize("backend", ON_GPU)
def test_layer_trains_under_autocast_in_channels_last(backend):
    layer = AugmentedConv(16, 32, 3, 40, 8, 4, 16, True, 2, backend=backend).cuda()
    layer = layer.to(memory_format=torch.channels_last)
    x = torch.randn(8, 16, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("backend", [b for b in ON_GPU if b != "tiled"])
def test_layer_compiles(backend):
    layer = AugmentedConv(16, 32, 3, 40, 8, 4, 16, True, 2, backend=backend).cuda()
    compiled = torch.compile(layer)
    for size in (32, 16):
        x = torch.randn(8, 16, size, size, device="cuda")
        outputs = [m(x) for m in (compiled, layer)]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)
        gradients = [
            torch.autograd.grad(out.square().mean(), tuple(layer.parameters())) for out in outputs
        ]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_whole_run(run, precision):
    summary = run("device=cuda", f"precision={precision}", folder=precision)
    assert summary["segments"][0]["hardware"] == torch.cuda.get_device_name()
    assert summary["train/loss"] < 3
