"""Files that are whole or absent, whenever the process is killed."""

import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

# What a run whose loss stopped being finite leaves instead of summary.json: the error, in JSON.
FAILED = "failed.json"


def write_whole(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Call ``write`` with an open file that then takes the place of ``path`` in one move.

    Whatever ``write`` raises leaves ``path`` as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
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
