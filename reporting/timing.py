"""What the benchmarks share: interleaved rounds, and the facts that go with every figure."""

import json
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


def rounds(
    steps: Mapping[str, Callable[[], object]], device: torch.device, count: int
) -> dict[str, list[float]]:
    """Milliseconds of each step in ``count`` rounds; every round runs all steps.

    A machine that is slow for a while then slows down all of them.
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
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(make_step: Callable[..., Callable[[], object]], case: object, device_name: str) -> float:
    """Peak MiB of a step above what was allocated before it, in a new process.

    ``make_step(case, device)`` makes it there; it is a function of a module.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (make_step, case, device_name))


def _peak_here(
    make_step: Callable[..., Callable[[], object]], case: object, device_name: str
) -> float:
    device = torch.device(device_name)
    step = make_step(case, device)
    if device.type == "cuda":
        step()  # what compilation and the optimizer keep does not count
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device) / 2**20
    else:
        before = peak_memory_mib(device)
    step()
    return peak_memory_mib(device) - before


def spread(milliseconds: list[float]) -> str:
    """Median (minimum to maximum), for a cell of a table."""
    low, middle, high = min(milliseconds), statistics.median(milliseconds), max(milliseconds)
    return f"{middle:.1f} ({low:.1f} to {high:.1f})"


def facts(device: torch.device) -> dict[str, Any]:
    """Hardware, versions, commit and command of this benchmark."""
    return {
        "hardware": provenance.hardware(device),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
        "command": " ".join(["python", f"scripts/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
    }


def markdown(header: list[str], rows: list[list[str]], text_columns: int) -> str:
    """A table whose columns are right-aligned numbers after the first ``text_columns``."""
    marks = ["---"] * text_columns + ["---:"] * (len(header) - text_columns)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [header, marks, *rows])


def write(
    out: Path, name: str, about: dict[str, Any], rows: list[dict[str, Any]], text: str
) -> str:
    """Write NAME.json and NAME.md to the folder ``out``; returns the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    versions = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    head = f"{about['hardware']}; {versions}; commit {about['commit']}; `{about['command']}`"
    (out / f"{name}.md").write_text(f"{head}\n\n{text}\n")
    return f"{head}\n\n{text}\n"
