"""The provenance of a result: commit, versions, hardware."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# The maximum size of a patch that is kept, in bytes.
MAX_DIFF = 1_000_000


def of_segment(device: torch.device, precision: str, processes: int) -> dict[str, Any]:
    """Return the `training.records.Segment` of epochs trained now, without ``first_epoch``."""
    return {
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(device),
        "precision": precision,
        "processes": processes,
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that may affect a result."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("numpy", "torchvision", "triton", "hydra-core"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Return the clone's commit, with ``-dirty`` if tracked files differ; "unknown" without git."""
    described = _git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    return "unknown" if described is None else described.decode().strip()


def uncommitted() -> bytes:
    """Return the uncommitted changes to tracked files as a patch; empty if there are none.

    If the patch exceeds `MAX_DIFF` bytes, return only a summary of the changed files.
    """
    diff = _git("diff", "HEAD", "--no-color", "--no-ext-diff") or b""
    if len(diff) <= MAX_DIFF:
        return diff
    return (_git("diff", "HEAD", "--no-color", "--stat") or b"")[:MAX_DIFF]


def _git(*words: str) -> bytes | None:
    """Run git in this clone and return its output; None if this is no clone or git fails.

    Never use another repository, whether an enclosing one or one named by the environment.
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
    """Return the name of the GPU, or of the processor with the number of torch's threads."""
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
