"""Everything a run needs to go on: the last two checkpoints, each whole or absent."""

import logging
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from training.files import write_whole
from training.variants import result_settings

FILE = "last.pt"
BEFORE = "previous.pt"

log = logging.getLogger(__name__)


def save(folder: Path, parts: dict[str, Any], device: torch.device, **rest: Any) -> None:
    """Write the folder's checkpoint: the states of ``parts``, of torch's RNGs, and ``rest``.

    The one that was there becomes ``previous.pt``. See `training.files.write_whole` for what
    stays after a kill or on a full disk.
    """
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"rng": torch.get_rng_state(), **rest}
    if device.type == "cuda":
        state["cuda_rng"] = torch.cuda.get_rng_state(device)
    write_whole(folder / FILE, lambda file: _write(state, file), before=folder / BEFORE)


def _write(state: dict[str, Any], file: IO[bytes]) -> None:
    try:
        torch.save(state, file)
    except RuntimeError as error:
        # torch hides what the file has raised, a full disk for example, behind its own error.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def find(resume: str | None, folder: Path) -> list[Path]:
    """The checkpoints that ``resume`` asks for, the newest first: of None, ``auto`` or a path.

    ``auto`` is the folder's own and may find none. A path is a folder, or one file.

    Raises:
        FileNotFoundError: a path at which there is no checkpoint.
    """
    if resume is None:
        return []
    path = folder if resume == "auto" else Path(resume).expanduser()
    files = [path] if path.is_file() else [path / FILE, path / BEFORE]
    found = [file for file in files if file.is_file()]
    if not found and resume != "auto":
        raise FileNotFoundError(
            f"resume={resume}: there is no checkpoint; resume=auto starts afresh"
        )
    return found


def begin(
    resume: str | None, folder: Path, config: dict[str, Any], overwrite: bool
) -> tuple[Path | None, dict[str, Any], list[Path]]:
    """Where a run in ``folder`` begins: a checkpoint or None, its state, and what is in the way.

    What is in the way, of a run that is replaced or damaged, is to be removed in this order: a
    kill meanwhile leaves what can be continued or replaced.

    Raises:
        ValueError: see `load`; or ``folder`` holds a run that is neither resumed nor to be
            replaced.
        FileNotFoundError: see `find`.
    """
    found = find(resume, folder)
    used, state = load(found, config) if found else (None, {})
    results = [folder / "summary.json", folder / "metrics.csv"]
    if used is not None and used.parent.resolve() == folder.resolve():
        # Kept, a damaged one would push the good one out at the next save. The results may be
        # ahead of the good one.
        damaged = found[: found.index(used)]
        return used, state, [*results, *damaged] if damaged else []
    there = [p for p in (*results, folder / BEFORE, folder / FILE) if p.exists()]
    if there and not overwrite:
        raise ValueError(
            f"{folder} already holds a run; resume=auto continues it, overwrite=true replaces it"
        )
    return used, state, there


def load(paths: list[Path], config: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
    """The first of ``paths`` that can be read, and the state in it, on the CPU.

    One that is damaged is reported, and the one behind it is used.

    Raises:
        ValueError: none can be read, or the first that can is of a run with other settings; the
            message names those that differ.
    """
    for place, path in enumerate(paths):
        try:
            state = _read(path)
            break
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            if path == paths[-1]:
                names = " and ".join(map(str, paths))
                raise ValueError(
                    f"{names}: no checkpoint that can be read ({reason}); "
                    "overwrite=true without resume starts afresh"
                ) from error
            log.warning("%s is damaged (%s); going on from %s", path, reason, paths[place + 1])
    here, there = result_settings(config), result_settings(state["config"])
    differing = [
        f"{key} ({there.get(key, 'absent')} there, {here.get(key, 'absent')} here)"
        for key in sorted(here.keys() | there.keys())
        if here.get(key, "absent") != there.get(key, "absent")
    ]
    if differing:
        raise ValueError(f"{path} is of a run with other settings: {', '.join(differing)}")
    return path, state


def _read(path: Path) -> dict[str, Any]:
    # torch.load does not look at the checksums that torch.save writes.
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"wrong checksum of {damaged}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or "so_far" not in state:
        raise ValueError("not written by this version of train.py")
    return state


def restore(state: dict[str, Any], parts: dict[str, Any], device: torch.device, path: Path) -> None:
    """Put ``parts`` and torch's RNGs where the state from ``path`` left them.

    Raises:
        ValueError: the state does not fit, being of another version of the code.
    """
    try:
        for name, part in parts.items():
            part.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is of other code than this: {reason}") from error
    torch.set_rng_state(state["rng"])
    if device.type == "cuda" and "cuda_rng" in state:
        torch.cuda.set_rng_state(state["cuda_rng"], device)
