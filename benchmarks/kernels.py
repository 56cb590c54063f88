"""Report how the fused kernels compile for GPUs that need not be present.

A shape is a map, key and value channels per head, and heads; the default shapes are those of the
networks. Reported for each kernel: registers of a thread; spills, the loads and stores of registers
that did not fit, in total and in the innermost loop; shared memory of a block and its limit; warps
that a multiprocessor holds at once; and instructions of a thread per logit in the innermost loop,
one of which is always the exponential. A map of one tile has no loop: there the whole kernel
counts. These are counts, the same on every machine, not times. Each shape takes seconds and needs
triton, but no GPU.

With --measure BATCH the operations are also timed on this machine's GPU, and only its own
--capability is counted. Times are medians and include all kernels and copies of a pass; next to
them is the share that the instructions of the innermost loop would take at one issued per clock.
"""

import collections
import re
import statistics
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from aaconv.backends import fused_ops
from benchmarks import timing
from training.device import DTYPES

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# float32 is computed exactly, or as tf32 if that is allowed.
ALL_DTYPES = DTYPES | {"tf32": torch.float32}
SHAPES = [
    "32x32:20:2:8",  # WRN-28-10
    "16x16:20:4:8",
    "8x8:20:8:8",
    "32x32:20:1:8",  # WRN-16-4
    "16x16:20:2:8",
    "8x8:20:3:8",
    "16x16:8:2:4",  # ResNet-20
    "8x8:8:4:4",
    "56x56:20:4:8",  # ResNet-50 on ImageNet
]


class Multiprocessor(NamedTuple):
    """Limits: registers, warps, bytes of shared memory, blocks; bytes that each block reserves."""

    registers: int
    warps: int
    shared: int
    blocks: int
    reserved: int = 1024


# By compute capability (NVIDIA, CUDA C++ Programming Guide, table of technical specifications).
LIMITS = {
    80: Multiprocessor(65536, 64, 164 * 1024, 32),
    86: Multiprocessor(65536, 48, 100 * 1024, 16),
    89: Multiprocessor(65536, 48, 100 * 1024, 24),
    90: Multiprocessor(65536, 64, 228 * 1024, 32),
    100: Multiprocessor(65536, 64, 228 * 1024, 32),
    120: Multiprocessor(65536, 48, 100 * 1024, 24),
}
OPTIONS: dict[str, list[Any]] = {
    "dtype": ["bf16"],
    "capability": [80, 89, 90],
    "shape": SHAPES,
    "measure": [0],
}
CHOICES = {"dtype": tuple(ALL_DTYPES), "capability": tuple(LIMITS)}


def driver_of(capability: int) -> SimpleNamespace:
    """Return a stand-in for the driver of such a GPU that can compile but not launch."""
    return SimpleNamespace(
        get_current_device=lambda: capability,  # kernels are cached by device
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )


def machine_code(cubin: bytes) -> tuple[list[str], dict[str, int], int]:
    """Return the instructions without predicates, each label's index, and the register count."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([*words, file.name], check=True, capture_output=True, text=True).stdout
            for words in (
                (TOOLS / "cuobjdump", "--dump-resource-usage"),
                (TOOLS / "nvdisasm", "-c"),
            )
        )
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(.*?);", line):
            code.append(found[1].strip())
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None
    return code, labels, int(registers[1])


def innermost(code: list[str], labels: dict[str, int]) -> list[str]:
    """Return the instructions of the shortest loop with exponentials; none if there is no loop."""
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append(code[labels[target[1]] : end + 1])
    return min((loop for loop in loops if exponentials(loop)), key=len, default=[])


def exponentials(code: list[str]) -> int:
    """Return how many of the instructions are exponentials."""
    return sum(instruction.startswith("MUFU.EX2") for instruction in code)


def kinds(code: list[str]) -> collections.Counter[str]:
    """Count the instructions of each kind."""
    return collections.Counter(re.split(r"[ .]", instruction)[0] for instruction in code)


def spills(code: list[str]) -> int:
    """Return how many of the instructions load or store a register that did not fit."""
    return kinds(code)["LDL"] + kinds(code)["STL"]


def describe(compiled: Any, options: dict[str, Any], capability: int) -> dict[str, Any]:
    """Return the row of one kernel."""
    code, labels, registers = machine_code(compiled.asm["cubin"])
    loop = innermost(code, labels)
    warps = options["num_warps"]
    logits = options["BM"] * options["R"] * options["BW"] / (32 * warps)
    counted = loop or code
    limits = LIMITS[capability]
    # Registers are allocated to warps in blocks of 256.
    per_warp = -(-registers * 32 // 256) * 256
    shared = compiled.metadata.shared
    blocks = min(
        limits.registers // per_warp // warps,
        limits.shared // (shared + limits.reserved),
        limits.warps // warps,
        limits.blocks,
    )
    return {
        "registers": registers,
        "spills": spills(code),
        "spills_in_loop": spills(loop),
        "shared": shared,
        "most_shared": limits.shared - limits.reserved,
        "warps": blocks * warps,
        "instructions": len(counted) / logits,
        "exponentials": exponentials(counted) / logits,
        "most": {name: round(n / logits, 2) for name, n in kinds(counted).most_common(8)},
    }


def sizes(shape: str) -> tuple[int, int, int, int, int]:
    """Return H, W, dkh, dvh and Nh of a shape.

    Raises:
        ValueError: if ``shape`` has another form.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(:[1-9]\d*){3}", shape):
        raise ValueError(f"--shape {shape}: write a map, dkh, dvh and Nh, such as {SHAPES[0]}")
    H, W, dkh, dvh, Nh = map(int, re.split("[x:]", shape))
    return H, W, dkh, dvh, Nh


def inputs(shape: str, dtype: torch.dtype, batch: int, device: str) -> list[Tensor]:
    """Return queries, keys and values laid out as in channels_last, tables, and a gradient."""
    H, W, dkh, dvh, Nh = sizes(shape)
    dk, dv = dkh * Nh, dvh * Nh

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(1, (Nh, -1)).permute(0, 1, 3, 4, 2)

    def channels_last(channels: int) -> Tensor:
        random = torch.randn(batch, channels, H, W, dtype=dtype, device=device)
        return random.contiguous(memory_format=torch.channels_last)

    qkv = channels_last(2 * dk + dv).split((dk, dk, dv), dim=1)
    tables = [torch.randn(2 * n - 1, dkh, dtype=dtype, device=device) for n in (H, W)]
    return [*map(heads, qkv), *tables, heads(channels_last(dv))]


def passes(
    shape: str, dtype: torch.dtype, batch: int = 8, device: str = "cpu"
) -> dict[str, Callable[[], object]]:
    """Return the forward, backward and ordered backward pass as functions.

    This runs a forward pass, since the backward passes take its results.
    """
    *given, grad = inputs(shape, dtype, batch, device)
    saved = [grad, *given, *fused_ops._attend(*given)]

    def backward(ordered: bool) -> None:
        torch.use_deterministic_algorithms(ordered)
        fused_ops._attend_backward(*saved)
        torch.use_deterministic_algorithms(False)

    return {
        "attend": lambda: fused_ops._attend(*given),
        "gradients": lambda: backward(False),
        "gradients, ordered": lambda: backward(True),
    }


def count(shape: str, dtype: torch.dtype, capability: int) -> list[dict[str, Any]]:
    """Return the rows of a shape: forward, backward, and backward in a fixed order."""
    rows: list[dict[str, Any]] = []

    def compile_only(kernel: Any, *args: Any, **options: Any) -> None:
        compiled = launch(kernel, *args, **(options | {"warmup": True}))
        name = kernel.fn.__name__
        if options.get("ALL"):
            name += ", peak of all"
        if options.get("ATOMIC") is False:
            name += ", ordered"
        rows.append({"kernel": name} | describe(compiled, options, capability))

    launch = JITFunction.run
    driver.set_active(driver_of(capability))
    JITFunction.run = compile_only
    try:
        steps = passes(shape, dtype)
        steps["gradients"]()
        steps["gradients, ordered"]()
    finally:
        JITFunction.run = launch
        if torch.cuda.is_available():
            driver.reset_active()
    return rows


def measure(case: dict[str, Any], device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each kernel of a shape.

    Raises:
        ValueError: if the shape has another form, or there is no GPU to measure on.
    """
    times: dict[str, list[float]] = {}
    shape, dtype, batch = case["shape"], ALL_DTYPES[case["dtype"]], case["measure"]
    torch.set_float32_matmul_precision("high" if case["dtype"] == "tf32" else "highest")
    if batch:
        if not torch.cuda.is_available():
            raise ValueError("--measure needs a CUDA GPU, and torch finds none here")
        if divmod(case["capability"], 10) != torch.cuda.get_device_capability():
            return []
        # Timed first: counting replaces the driver by a stand-in, though for the same kind of GPU.
        times = timing.rounds(passes(shape, dtype, batch, "cuda"), torch.device("cuda"), rounds)
    rows = [case | row for row in count(shape, dtype, case["capability"])]
    for row in rows:
        if row["kernel"] in times:
            row |= {"ms": times[row["kernel"]], "issue_ms": issue_ms(row)}
    return rows


def issue_ms(row: dict[str, Any]) -> float:
    """Milliseconds of the loop's instructions if four warps issue one each in every clock."""
    H, W, _, _, Nh = sizes(row["shape"])
    gpu = driver.active.utils.get_device_properties(torch.cuda.current_device())
    # Thread instructions issued in a millisecond; the clock is in kHz.
    issued = 4 * 32 * gpu["multiprocessor_count"] * gpu["sm_clock_rate"]
    return float(row["instructions"] * row["measure"] * Nh * (H * W) ** 2 / issued)


def cells(row: dict[str, Any]) -> dict[str, str]:
    """The case, what was counted, and what was timed."""
    return {
        "capability": f"{row['capability'] / 10:.1f}",
        "dtype": row["dtype"],
        "kernel": row["kernel"],
        **dict(zip(("map", "dkh", "dvh", "Nh"), row["shape"].split(":"), strict=True)),
        "registers": str(row["registers"]),
        "spills": str(row["spills"]),
        "in the loop": str(row["spills_in_loop"]),
        "shared KiB": f"{row['shared'] / 1024:.0f} of {row['most_shared'] / 1024:.0f}",
        "warps": str(row["warps"]),
        "instructions a logit": f"{row['instructions']:.2f}",
        **(timed_cells(row) if "ms" in row else {}),
    }


def timed_cells(row: dict[str, Any]) -> dict[str, str]:
    """The time, and the share of it that the loop's instructions alone would take."""
    share = row["issue_ms"] / statistics.median(row["ms"])
    return {"ms": timing.spread(row["ms"]), "% for the loop": f"{100 * share:.0f}"}
