"""The device and the precision of a run."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.distributed import World

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# By their names in the setting ``precision``.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, world: World | None = None) -> torch.device:
    """Return the device called ``name``; ``auto`` is the CUDA GPU if there is one, else the CPU.

    Other accelerators of torch (``mps``, ``xpu``) are accepted by name, but are untested. With
    several processes on a machine, each gets its own GPU, by its local rank in ``world``.

    Raises:
        ValueError: if torch knows no such device, or this machine has none or too few.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if world is not None and world.size > 1 and name == "cuda":
        name = f"cuda:{world.local_rank}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name} is not a device; use auto, cpu or cuda") from None
    _check_device(name, device)
    own = device.index if world is None or world.size == 1 else world.local_rank
    if device.type != "cpu" and device.index != own:
        raise ValueError(f"device={name} is one GPU for several processes; use cuda")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # default for random numbers and memory statistics
    return device


def _check_device(name: str, device: torch.device) -> None:
    if device.type == "cpu":
        return
    here = torch.accelerator.current_accelerator(check_available=True)
    if device.type == "cuda" and (here is None or here.type != "cuda"):
        raise ValueError(f"device={name}, but torch finds no GPU here; use device=cpu")
    if here is None or here.type != device.type:
        known = "auto or cpu" if here is None else f"auto, cpu or {here.type}"
        raise ValueError(f"device={name} is not available here; use {known}")
    if (device.index or 0) >= torch.accelerator.device_count():
        number = torch.accelerator.device_count()
        raise ValueError(
            f"device={name} does not exist; this machine has {number} of its kind, numbered from 0"
        )


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the autocast dtype that ``precision`` stands for on ``device``.

    ``auto`` is bf16 if a CUDA GPU or CPU supports it in hardware. Otherwise it is fp16 on a CUDA
    GPU and fp32 elsewhere: a CPU without hardware support is many times slower in bf16.

    Raises:
        ValueError: if a GPU lacks bf16, or for bf16 or fp16 on any other accelerator.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # is_bf16_supported asks the current device
            has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        if precision == "auto":
            return torch.bfloat16 if has_bf16 else torch.float16
        if precision == "bf16" and not has_bf16:
            raise ValueError("precision=bf16, but this GPU has no bf16; use precision=fp16")
    elif precision == "auto":
        return torch.bfloat16 if device.type == "cpu" and cpu_has_bf16() else torch.float32
    elif device.type != "cpu" and precision != "fp32":
        raise ValueError(f"precision={precision} is for CPU and CUDA; use fp32 on {device.type}")
    return DTYPES[precision]


def precision_name(dtype: str) -> str:
    """Return the value of ``precision`` for a dtype such as ``bfloat16``; ``auto`` if unknown."""
    return next((name for name, kind in DTYPES.items() if str(kind) == f"torch.{dtype}"), "auto")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices faster than float32 ones."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def set_seed(device: torch.device, seed: int) -> None:
    """Seed the random number generator of ``device``, which dropout uses, for example.

    Unlike torch.manual_seed, this leaves other devices alone: for a GPU not yet in use, that
    function stores a traceback of every call, and so would leak memory at each step.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Turn torch's deterministic algorithms on or off for this process.

    An operation without one then raises RuntimeError. Deterministic algorithms are slower on a GPU;
    on the CPU, with a fixed number of threads, all operations used here are deterministic anyway.
    """
    if on:
        # cuBLAS reads this when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if on != torch.are_deterministic_algorithms_enabled():  # setting it takes seconds
        torch.use_deterministic_algorithms(on)
    # Filling takes time, and only exposes memory that is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on  # all steps have the same sizes


def to_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move the model to ``device``, with its weights in the chosen memory format.

    If ``device`` is a CUDA GPU, this also turns on TF32 for float32 matrix multiplication, which is
    what ``precision=fp32`` means there.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # torch's type annotations omit memory_format.
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


def compiled(model: nn.Module) -> Any:
    """Return ``model`` compiled; if torch gives up, raise an error instead of running it eagerly.

    The compiler limits the number of compiled versions of the same code, over all networks. After
    four networks of a sweep, each trained and evaluated, it would leave the next one uncompiled,
    so its cache is cleared first. `training.errors` explains the error.
    """
    from torch import _dynamo  # takes seconds to import

    _dynamo.reset()
    _dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model)


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far in MiB, of the GPU's allocator or else of the whole process.

    0 if the system does not report it.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        # Preferred over getrusage, whose peak starts from that of the parent process.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    except OSError:
        pass
    if resource is None:
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a dtype: ``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
