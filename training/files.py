"""Files that are whole or absent, whenever the process is killed or the machine fails.

Text is UTF-8, whatever the locale says.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], before: Path | None = None) -> None:
    """Call ``write`` with an open file that then replaces ``path`` in one move.

    Whatever ``write`` raises leaves ``path`` as it was. With ``before`` the file that was at
    ``path`` is kept there; a kill between the two moves leaves that one alone, whole.

    Raises:
        OSError: the disk is full or the folder cannot be written; the message names ``path``.
    """
    partial = _partial(path)
    try:
        _stage(partial, write)
        if before is not None and path.exists():
            os.replace(path, before)
        os.replace(partial, path)
        _sync_folder(path.parent)
    except BaseException as error:
        with suppress(IsADirectoryError):
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
        raise


def write_text(path: Path, text: str) -> None:
    """``text`` as a file; see `write_whole`."""
    write_texts({path: text})


def write_texts(texts: Mapping[Path, str]) -> None:
    """Several text files; see `write_files`."""
    # Names of folders may hold bytes that are no UTF-8; they come out as they went in.
    write_files({path: t.encode(errors="surrogateescape") for path, t in texts.items()})


def write_files(files: Mapping[Path, bytes]) -> None:
    """Several files, all of them staged before the first one is replaced.

    Folders that are not there are made. A disk that fills up meanwhile leaves every file as it was,
    and no folder that was not there.

    Raises:
        OSError: the disk is full or a folder cannot be written; the message names the file.
    """
    made: list[Path] = []
    staged: list[Path] = []
    path = None
    try:
        for path, content in files.items():
            for folder in reversed([f for f in path.parents if not f.exists()]):
                folder.mkdir(exist_ok=True)  # another process may have been quicker
                made.append(folder)
            staged.append(_partial(path))
            _stage(staged[-1], lambda file, content=content: file.write(content))  # type: ignore[misc]
        for path in files:
            os.replace(_partial(path), path)
        for folder in {path.parent for path in files}:
            _sync_folder(folder)
    except BaseException as error:
        for partial in staged:
            with suppress(IsADirectoryError):
                partial.unlink(missing_ok=True)
        for folder in reversed(made):
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()
        if isinstance(error, OSError):
            raise OSError(f"{path} cannot be written ({error.strerror or error})") from error
        raise


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """``rows`` as CSV, the first one's keys as header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """``rows``, the header first, as the text of a CSV file; None is an empty field."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def write_json(path: Path, value: Any) -> None:
    """``value`` as indented JSON, which has no NaN and no infinity: those raise ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.partial")


def _stage(partial: Path, write: Callable[[IO[bytes]], Any]) -> None:
    # What is there was left by a kill, or is a link to another file or a pipe, which would wait.
    partial.unlink(missing_ok=True)
    with partial.open("xb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # A rename is on the disk only once its folder is. Windows has no such call.
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
