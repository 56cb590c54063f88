"""Everything a run needs to go on, in one file that is whole or absent."""

from pathlib import Path
from typing import Any

import torch

from training.files import write_whole
from training.variants import deciding

FILE = "last.pt"


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` to the folder's checkpoint."""
    write_whole(folder / FILE, lambda file: torch.save(state, file))


def find(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint that ``resume`` asks for: None, ``auto`` (the folder's own), or a path.

    Raises:
        FileNotFoundError: a path at which there is no checkpoint.
    """
    if resume is None:
        return None
    path = folder / FILE if resume == "auto" else Path(resume).expanduser()
    if path.is_dir():
        path = path / FILE
    if path.is_file():
        return path
    if resume == "auto":
        return None
    raise FileNotFoundError(f"resume={resume}: there is no checkpoint; resume=auto starts afresh")


def load(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The state in ``path``, on the CPU.

    Raises:
        ValueError: it is no checkpoint, or one of a run with other settings; the message names
            those that differ.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        before = state["config"]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no checkpoint that can be read: {reason}") from error
    here, there = deciding(config), deciding(before)
    differing = [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(here.keys() | there.keys())
        if here.get(key, "absent") != there.get(key, "absent")
    ]
    if differing:
        raise ValueError(f"{path} is of a run with other settings: {', '.join(differing)}")
    return state
