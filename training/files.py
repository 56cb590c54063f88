"""Files that are whole or absent, whenever the process is killed or the machine fails."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# What a run whose loss stopped being finite leaves instead of summary.json: the error, in JSON.
FAILED = "failed.json"


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], before: Path | None = None) -> None:
    """Call ``write`` with an open file that then takes the place of ``path`` in one move.

    Whatever ``write`` raises leaves ``path`` as it was. With ``before`` the file that was at
    ``path`` is kept there; a kill between the two moves leaves that one alone, whole.

    Raises:
        OSError: the disk is full or the folder cannot be written; the message names ``path``.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(
                f"{path} cannot be written ({error.strerror or error}); what was written before "
                "is whole, and resume=auto goes on from there once this is mended"
            ) from error
        raise


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """``rows`` as CSV, the first one's keys as header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, lambda file: file.write(text.getvalue().encode()))


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON."""
    write_whole(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def _sync_folder(folder: Path) -> None:
    # A rename is on the disk only once its folder is.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
