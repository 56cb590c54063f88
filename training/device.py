"""Where a run computes and in which precision."""

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

# By the names that the setting ``precision`` has for them.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, world: World | None = None) -> torch.device:
    """The device of that name; ``auto`` is the CUDA GPU if there is one, else the CPU.

    Other accelerators that torch knows (``mps``, ``xpu``) are taken by their name; they have not
    been tried. Each of several processes on a machine, of which ``world`` tells, gets a GPU of
    its own.

    Raises:
        ValueError: torch knows no such device, or this machine has none or too few.
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
        torch.cuda.set_device(device)  # whose random numbers and memory are meant
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
    """The dtype of autocast that ``precision`` stands for on ``device``.

    ``auto`` is bf16 where there are units for it, on a CUDA GPU or a CPU. Without them it is fp16
    on a CUDA GPU, and fp32 elsewhere: a CPU is many times slower in bf16 then.

    Raises:
        ValueError: bf16 on a GPU without it; bf16 or fp16 on another accelerator.
    """
    if device.type == "cuda":
        with torch.cuda.device(device):  # it tells of the current one
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
    """What the setting ``precision`` calls a dtype such as ``bfloat16``; ``auto`` for any other."""
    return next((name for name, kind in DTYPES.items() if str(kind) == f"torch.{dtype}"), "auto")


def cpu_has_bf16() -> bool:
    """Whether the CPU multiplies bf16 matrices faster than float32 ones."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in names)


def set_seed(device: torch.device, seed: int) -> None:
    """Begin the random numbers of ``device`` anew, such as those of dropout.

    Unlike torch.manual_seed no other device's: that keeps a traceback of each call for GPUs that
    are not used, and would grow by one in every step.
    """
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.get_device_module(device).manual_seed(seed)


def set_deterministic(on: bool) -> None:
    """Whether torch keeps to algorithms whose bits do not depend on chance, as this process does.

    An operation that has none then raises RuntimeError. On a GPU they are slower; on the CPU with
    a fixed number of threads those used here have no others.
    """
    if on:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if on != torch.are_deterministic_algorithms_enabled():  # to ask takes torch seconds
        torch.use_deterministic_algorithms(on)
    # It would cost time, and tells only of memory that is read before it is written.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = on
    torch.backends.cudnn.benchmark = not on  # all steps have the same sizes


def to_device(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The model on ``device``, its weights in the chosen memory format.

    From then on a CUDA GPU multiplies float32 as TF32, which is what ``precision=fp32`` means.
    """
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # torch's own annotations leave memory_format out.
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


def compiled(model: nn.Module) -> Any:
    """``model``, compiled, or an error (`training.cli` explains it), but never half of each.

    The compiler keeps a limited number of programs for the same code, which networks share, and
    would leave the next one uncompiled: after four networks of a sweep, each of which is trained
    and evaluated. So here it forgets what it has compiled before.
    """
    from torch import _dynamo  # which takes seconds to import

    _dynamo.reset()
    _dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(model)


def peak_memory_mib(device: torch.device) -> float:
    """Most memory used so far, in MiB: of the GPU's allocator, or of the whole process.

    0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        # Not getrusage where this exists: its peak begins with that of the process which
        # started this one.
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
    """``float32`` for torch.float32."""
    return str(dtype).removeprefix("torch.")
