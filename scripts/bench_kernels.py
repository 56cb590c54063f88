"""Report what the compiler makes of the fused kernels for GPUs that need not be there.

    python scripts/bench_kernels.py [--capabilities 80 89 90] [--shapes 32x32:20:2:8]

A shape is a map, key and value channels per head, and heads; by default those of the networks. For
each kernel: registers of a thread; spills, the loads and stores of registers that did not fit, in
all and in the innermost loop; shared memory of a block and the most that a block may have; warps
that a multiprocessor holds at once; and the instructions of a thread per logit in the innermost
loop, of which one is always the exponential. A map of one tile has no loop: there the whole kernel
counts. These are counts, the same on every machine, and no times. Writes bench_kernels.md and
bench_kernels.json. Takes seconds for each shape and needs triton, but no GPU.

With --measure BATCH the operations are also timed, on the GPU that is there and for its capability
alone: the median of all kernels and copies of a pass, and which part of it the instructions of the
innermost loop alone would take if one was issued in every clock.
"""

import argparse
import collections
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Triton decides when it is imported whether it compiles or interprets.
os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from aaconv.backends import fused_ops
from reporting import timing

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
SHAPES = (
    "32x32:20:2:8",  # WRN-28-10
    "16x16:20:4:8",
    "8x8:20:8:8",
    "32x32:20:1:8",  # WRN-16-4
    "16x16:20:2:8",
    "8x8:20:3:8",
    "16x16:8:2:4",  # ResNet-20
    "8x8:8:4:4",
    "56x56:20:4:8",  # ResNet-50 on ImageNet
)


class Multiprocessor(NamedTuple):
    """What one has: registers, warps, bytes of shared memory, blocks; bytes each block reserves."""

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


class Driver:
    """The part of a GPU's driver that the compiler asks."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """Kernels are kept by device; so each capability is one."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing is launched."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """What the compiler compiles for."""
        return GPUTarget("cuda", self.capability, 32)


def machine_code(cubin: bytes) -> tuple[list[str], dict[str, int], int]:
    """The instructions without their predicates, where each label is, and the registers."""
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
    """The instructions of the shortest loop that takes exponentials, none if there is no loop."""
    loops = []
    for end, instruction in enumerate(code):
        target = re.search(r"BRA.*?`\((\.L_x_\d+)\)", instruction)
        if target and labels.get(target[1], end + 1) <= end:
            loops.append(code[labels[target[1]] : end + 1])
    return min((loop for loop in loops if exponentials(loop)), key=len, default=[])


def exponentials(code: list[str]) -> int:
    """How many of the instructions are exponentials."""
    return sum(instruction.startswith("MUFU.EX2") for instruction in code)


def spills(code: list[str]) -> int:
    """How many of the instructions load or store a register that did not fit."""
    return sum(re.split(r"[ .]", instruction)[0] in ("LDL", "STL") for instruction in code)


def describe(compiled: Any, options: dict[str, Any], capability: int) -> dict[str, Any]:
    """The row of one kernel."""
    code, labels, registers = machine_code(compiled.asm["cubin"])
    loop = innermost(code, labels)
    warps = options["num_warps"]
    logits = options["BM"] * options["R"] * options["BW"] / (32 * warps)
    counted = loop or code
    counts = collections.Counter(re.split(r"[ .]", instruction)[0] for instruction in counted)
    limits = LIMITS[capability]
    # Registers are given to warps in blocks of 256.
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
        "most": {name: round(n / logits, 2) for name, n in counts.most_common(8)},
    }


def given(shape: str, dtype: torch.dtype, batch: int = 8, device: str = "cpu") -> list[Tensor]:
    """Queries, keys, values and a gradient as training in channels_last has them, and tables."""
    size, *rest = shape.split(":")
    H, W = map(int, size.split("x"))
    dkh, dvh, Nh = map(int, rest)
    dk, dv = dkh * Nh, dvh * Nh

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(1, (Nh, -1)).permute(0, 1, 3, 4, 2)

    def channels_last(channels: int) -> Tensor:
        random = torch.randn(batch, channels, H, W, dtype=dtype, device=device)
        return random.contiguous(memory_format=torch.channels_last)

    qkv = channels_last(2 * dk + dv).split((dk, dk, dv), dim=1)
    tables = [torch.randn(2 * n - 1, dkh, dtype=dtype, device=device) for n in (H, W)]
    return [*map(heads, qkv), heads(channels_last(dv)), *tables]


def kernels(shape: str, dtype: str, capability: int) -> Iterator[dict[str, Any]]:
    """The rows of a shape: forward, backward, and backward in a fixed order."""
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
    driver.set_active(Driver(capability))
    JITFunction.run = compile_only
    try:
        q, k, v, grad, *tables = given(shape, DTYPES[dtype])
        out, lse = fused_ops._attend(q, k, v, *tables)
        for ordered in (False, True):
            torch.use_deterministic_algorithms(ordered)
            fused_ops._attend_backward(grad, q, k, v, *tables, out, lse)
    finally:
        JITFunction.run = launch
        if torch.cuda.is_available():
            driver.reset_active()
        torch.use_deterministic_algorithms(False)
    for row in rows:
        yield {"capability": capability, "shape": shape, "dtype": dtype} | row


def measured(shape: str, dtype: str, batch: int, count: int = 20) -> dict[str, list[float]]:
    """Milliseconds of forward, backward and ordered backward on the GPU."""
    q, k, v, grad, *tables = given(shape, DTYPES[dtype], batch, "cuda")
    out, lse = fused_ops._attend(q, k, v, *tables)

    def backward(ordered: bool) -> None:
        torch.use_deterministic_algorithms(ordered)
        fused_ops._attend_backward(grad, q, k, v, *tables, out, lse)
        torch.use_deterministic_algorithms(False)

    steps = {
        "attend": lambda: fused_ops._attend(q, k, v, *tables),
        "gradients": lambda: backward(False),
        "gradients, ordered": lambda: backward(True),
    }
    return timing.rounds(steps, torch.device("cuda"), count)


def issue_ms(row: dict[str, Any], batch: int) -> float | None:
    """Milliseconds of the loop's instructions at one of each of four warps in every clock."""
    size, *_, Nh = row["shape"].split(":")
    H, W = map(int, size.split("x"))
    clock = _clock_mhz()
    if clock is None:
        return None
    units = torch.cuda.get_device_properties(0).multi_processor_count
    issued = 4 * 32 * units * clock * 1e3  # instructions of a thread in a millisecond
    return float(row["instructions"] * batch * int(Nh) * (H * W) ** 2 / issued)


def _clock_mhz() -> float | None:
    words = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return float(said.splitlines()[0])
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return None


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = []
    for row in rows:
        size, dkh, dvh, Nh = row["shape"].split(":")
        shared = f"{row['shared'] / 1024:.0f} of {row['most_shared'] / 1024:.0f}"
        lines.append(
            [
                *(f"{row['capability'] / 10:.1f}", row["dtype"], row["kernel"], size, dkh, dvh, Nh),
                *(
                    str(row["registers"]),
                    str(row["spills"]),
                    str(row["spills_in_loop"]),
                    shared,
                    str(row["warps"]),
                ),
                f"{row['instructions']:.2f}",
            ]
        )
        if "ms" in row:
            lines[-1] += [timing.spread(row["ms"]), share(row)]
        elif any("ms" in other for other in rows):
            lines[-1] += ["", ""]
    header = ["capability", "dtype", "kernel", "map", "dkh", "dvh", "Nh", "registers", "spills"]
    header += ["in the loop", "shared KiB", "warps", "instructions a logit"]
    if any("ms" in row for row in rows):
        header += ["ms", "% for the loop"]
    return timing.markdown(header, lines, text_columns=3)


def share(row: dict[str, Any]) -> str:
    """Which part of the time, in per cent, the loop's instructions would take alone."""
    if row["issue_ms"] is None:
        return "clock unknown"
    return f"{100 * row['issue_ms'] / statistics.median(row['ms']):.0f}"


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capabilities", type=int, nargs="+", default=[80, 89, 90], choices=LIMITS)
    parser.add_argument("--dtypes", nargs="+", default=["bf16"], choices=DTYPES)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--measure", type=int, metavar="BATCH")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "bench")
    args = parser.parse_args()
    for shape in args.shapes:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(:[1-9]\d*){3}", shape):
            parser.error(f"--shapes {shape}: write a map, dkh, dvh and Nh, such as 32x32:20:2:8")
    if args.measure is not None and not torch.cuda.is_available():
        parser.error("--measure needs a CUDA GPU, and torch finds none here")
    return args


def main() -> None:
    """Count, and measure if asked to; print and write the table."""
    args = arguments()
    rows: list[dict[str, Any]] = []
    if args.measure is not None:
        major, minor = torch.cuda.get_device_capability()
        args.capabilities = [10 * major + minor]
    for dtype in args.dtypes:
        torch.set_float32_matmul_precision("high" if dtype == "tf32" else "highest")
        for capability in args.capabilities:
            for shape in args.shapes:
                # Timed first: the compiler is told of another GPU then, though of the same kind.
                times = measured(shape, dtype, args.measure) if args.measure else {}
                for row in kernels(shape, dtype, capability):
                    if row["kernel"] in times:
                        row |= {"ms": times[row["kernel"]], "issue_ms": issue_ms(row, args.measure)}
                    rows.append(row)
    about = timing.facts(torch.device("cpu" if args.measure is None else "cuda"))
    about["versions"]["triton"] = triton.__version__
    print(timing.write(args.out, "bench_kernels", about, rows, table(rows)))


if __name__ == "__main__":
    main()
