"""What only a GPU can show: kernels of its own, half precision, a whole run on it."""

import pytest
import torch
from test_attention import inputs, inputs_like, with_gradients

from aaconv import BACKENDS, AugmentedConv, attention_2d

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


def on_gpu(tensors, dtype):
    return [t.cuda().detach().requires_grad_() for t in inputs_like(tensors, dtype)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 13), (16, 16), (32, 32)])
def test_equals_the_reference_in_double(backend, size):
    tensors = on_gpu(inputs(size, 3, 20, 2), torch.float64)
    expected = with_gradients(lambda *t: attention_2d(*t, backend="reference"), tensors)
    got = with_gradients(lambda *t: attention_2d(*t, backend=backend), tensors)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_full_map(backend, dtype):
    double = on_gpu(inputs((32, 32), 8, 20, 2), torch.float64)
    exact = with_gradients(lambda *t: attention_2d(*t, backend="reference"), double)
    low = on_gpu(inputs((32, 32), 8, 20, 2), dtype)
    got = with_gradients(lambda *t: attention_2d(*t, backend=backend), low)
    for a, b in zip(got, exact, strict=True):
        assert a.isfinite().all()
        assert (a.double() - b).abs().max() < 0.05 * b.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
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


def test_layer_compiles():
    layer = AugmentedConv(16, 32, 3, 40, 8, 4, 16, True, 2).cuda()
    x = torch.randn(8, 16, 32, 32, device="cuda")
    torch.testing.assert_close(torch.compile(layer)(x), layer(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["auto", "fp16", "fp32"])
def test_a_whole_run(run, precision):
    summary = run("device=cuda", f"precision={precision}", folder=precision)
    assert summary["hardware"] == torch.cuda.get_device_name()
    assert summary["train_loss"] < 3
