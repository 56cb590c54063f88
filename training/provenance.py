"""Where a result comes from: versions, commit, hardware."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# Bytes of the longest patch that is kept.
MAX_DIFF = 1_000_000


def of_segment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """What `training.records.Segment` says of epochs that are trained here and now."""
    return {
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(device),
        "precision": precision,
        "processes": processes,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result may depend on."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "torchvision", "triton", "hydra-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The clone's commit, followed by ``-dirty`` where tracked files differ; else "unknown"."""
    described = _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    return "unknown" if described is None else described.decode().strip()


def uncommitted() -> bytes:
    """What the clone's tracked files differ by from its commit, as a patch; empty if in nothing.

    At most `MAX_DIFF` bytes; where there are more, the names and sizes of the changes alone.
    """
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff") or b""
    if len(diff) <= MAX_DIFF:
        return diff
    return (_git("diff", "HEAD", "--no-color", "--stat") or b"")[:MAX_DIFF]


def _git(*words: str) -> bytes | None:
    """What git says of the clone; None if it is none, or git does not answer.

    It is never of another repository: one that the clone's files lie in, or that the environment
    names.
    """
    root = Path(__file__).parents[1]
    try:
        return subprocess.run(
            ["git", f"--git-dir={root / '.git'}", f"--work-tree={root}", *words],
            cwd=root,
            env={name: value for name, value in os.environ.items() if name[:4] != "GIT_"},
            capture_output=True,
            timeout=10,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def hardware(device: torch.device) -> str:
    """The GPU's name, or the processor's and the number of threads torch uses on it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
