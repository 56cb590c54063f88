"""Where a run computes and in which precision."""

import os
import resource
import sys
from pathlib import Path

import torch
from torch import nn

from training.distributed import World

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, world: World | None = None) -> torch.device:
    """The device of that name; ``auto`` is the GPU if there is one, else the CPU.

    Each of several processes on a machine, of which ``world`` tells, gets a GPU of its own.

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
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device={name} is not supported; use auto, cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={name}, but torch finds no GPU here; use device=cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device={name}, but there are {torch.cuda.device_count()} GPUs")
    if world is not None and world.size > 1 and device.type == "cuda":
        if device.index != world.local_rank:
            raise ValueError(f"device={name} is one GPU for {world.size} processes; use cuda")
        torch.cuda.set_device(device)
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of autocast: ``auto`` is bf16 on a GPU that has it, else fp16, fp32 on the CPU.

    Raises:
        ValueError: bf16 on a GPU without it.
    """
    if precision == "auto" and device.type == "cpu":
        return torch.float32
    has_bf16 = device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "auto":
        return torch.bfloat16 if has_bf16 else torch.float16
    if precision == "bf16" and not has_bf16:
        raise ValueError("precision=bf16, but this GPU has no bf16; use precision=fp16")
    return _DTYPES[precision]


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
    torch.backends.cudnn.benchmark = False


def place(model: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """The model on ``device``, its weights in the chosen memory format."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    # torch's own annotations leave memory_format out.
    return model.to(device, memory_format=layout)  # type: ignore[call-overload]


def peak_memory_mb(device: torch.device) -> float:
    """Most memory used so far, in MiB: of the GPU's allocator, or of the whole process."""
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
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB; bytes on macOS
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
