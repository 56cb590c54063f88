"""Shared by the benchmarks: interleaved rounds, memory, and facts to report with the numbers."""

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from training import provenance
from training.device import peak_memory_mib

Step = Callable[[], object]


def rounds(steps: Mapping[str, Step], device: torch.device, count: int) -> dict[str, list[float]]:
    """Return the milliseconds of each step in ``count`` rounds; every round runs all steps.

    If the machine is slow for a while, this slows down all of them.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(count + 1):
        for name, step in steps.items():
            wait(device)
            started = time.perf_counter()
            step()
            wait(device)
            if number:  # the first round warms up
                taken[name].append(1e3 * (time.perf_counter() - started))
    return taken


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak(make_step: Callable[..., Step], case: object, device: torch.device) -> float:
    """Peak MiB of a step above what was allocated before it, in a new process.

    ``make_step(case, device)``, a module-level function, makes the step there.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (make_step, case, device))


def _peak_here(make_step: Callable[..., Step], case: object, device: torch.device) -> float:
    step = make_step(case, device)
    if device.type == "cuda":
        step()  # memory that compilation and the optimizer keep does not count
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
    else:
        before = peak_memory_mib(device)
    step()
    return peak_memory_mib(device) - before


def spread(milliseconds: list[float], digits: int = 1) -> str:
    """Median (minimum to maximum), for a cell of a table."""
    figures = (statistics.median(milliseconds), min(milliseconds), max(milliseconds))
    middle, low, high = (f"{figure:.{digits}f}" for figure in figures)
    return f"{middle} ({low} to {high})"


def ratio(milliseconds: list[float], base: list[float]) -> float:
    """The median over the rounds of the ratio of two times of the same round."""
    pairs = zip(milliseconds, base, strict=True)
    return statistics.median(own / other for own, other in pairs)


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command of this benchmark."""
    command = ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
    return {
        "hardware": provenance.hardware(device),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "command": " ".join(command),
    }
