"""FlexAttention on the CPU, where it has no gradients; test_gpu.py has those."""

import pytest
import torch

from aaconv import AugmentedConv, attention_2d

import reference
from helpers import CASES, inputs, inputs_like, slow


def flex(*tensors):
    return attention_2d(*tensors, backend="flex")


@pytest.mark.parametrize(("size", "heads", "dkh", "dvh"), CASES)
@pytest.mark.parametrize("relative", [True, slow(False)])
def test_equals_the_formula(size, heads, dkh, dvh, relative):
    tensors = inputs(size, heads, dkh, dvh, batch=1)[: 5 if relative else 3]
    with torch.no_grad():
        torch.testing.assert_close(
            flex(*tensors), reference.attention(*tensors), rtol=0, atol=1e-10
        )


@torch.no_grad()
@pytest.mark.parametrize("dtype", [slow(torch.bfloat16), torch.float16])
def test_half_precision_errs_no_more_than_the_formula(dtype):
    tensors = inputs((7, 5), 2, 8, 5, batch=1)
    low = inputs_like(tensors, dtype)
    exact, plain, out = reference.attention(*tensors), reference.attention(*low), flex(*low)
    assert out.dtype == dtype
    assert (out - exact).abs().max() <= 2 * (plain - exact).abs().max()


@torch.no_grad()
def test_large_logits_in_fp16_stay_finite():
    tensors = [t.half() for t in inputs((3, 5), 2, 8, 4, scale=100.0)]
    tensors[3:] = [t * 300 for t in tensors[3:]]
    exact = reference.attention(*(t.double() for t in tensors))
    with torch.autocast("cpu", torch.float16):
        torch.testing.assert_close(flex(*tensors).double(), exact, rtol=0, atol=2e-2)


@pytest.mark.slow
@torch.no_grad()
def test_any_strides():
    wide = [t.repeat_interleave(2, -1).transpose(2, 3) for t in inputs((5, 3), 2, 4, 3)[:3]]
    tables = inputs((3, 5), 2, 4, 3)[3:]
    views = [t[..., ::2] for t in wide]
    torch.testing.assert_close(flex(*views, *tables), reference.attention(*views, *tables))


@pytest.mark.slow
@torch.no_grad()
def test_more_shapes_than_dynamo_compiles_by_default():
    for width in range(1, torch._dynamo.config.recompile_limit + 3):
        tensors = inputs((2, width), 1, 2, 2, batch=1 + width % 2)
        torch.testing.assert_close(flex(*tensors), reference.attention(*tensors))


@pytest.mark.slow
@torch.no_grad()
def test_compiled_in_the_layer():
    layer = AugmentedConv(4, 8, 3, 6, 4, 2, (3, 5), True, backend="flex")
    x = torch.randn(2, 4, 3, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))


def test_gradients_are_refused():
    tensors = inputs((3, 5), 2, 4, 3)
    with pytest.raises(ValueError, match=r"^backend='flex' needs a GPU for gradients.*'auto'$"):
        flex(*tensors)
    flex(*(t.detach() for t in tensors))
