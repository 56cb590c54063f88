"""Compile the fused kernels without a GPU for one of the given compute capability and dtypes.

    python tests/compile_kernels.py 90 float32 bfloat16

Prints each kernel's name, dtype and bytes of shared memory. This is a separate program because
Triton decides when it is imported whether it compiles or interprets.
"""

import sys
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aaconv.backends import fused_ops


class Driver:
    """The part of a GPU's driver that the compiler asks."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", int(sys.argv[1]), 32)


launch = JITFunction.run


def compile_only(kernel, *args, **options):
    compiled = launch(kernel, *args, **(options | {"warmup": True}))
    assert compiled.asm["cubin"]
    print(kernel.fn.__name__, str(args[0].dtype).split(".")[1], compiled.metadata.shared)


driver.set_active(Driver())
JITFunction.run = compile_only
for dtype in (getattr(torch, name) for name in sys.argv[2:]):
    q, k = torch.zeros(2, 2, 8, 32, 32, 20, dtype=dtype).unbind()
    v = torch.zeros(2, 8, 32, 32, 2, dtype=dtype)
    # In fp16 the position bias is float32.
    bias_dtype = torch.float32 if dtype == torch.float16 else dtype
    row_bias, col_bias = torch.zeros(2, 2, 8, 32, 32, 32, dtype=bias_dtype).unbind()
    out, lse = fused_ops._attend(q, k, v, row_bias, col_bias)
    fused_ops._attend_backward(torch.zeros_like(v), q, k, v, row_bias, col_bias, out, lse, True)
